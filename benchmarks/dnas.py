"""What a step of a differentiable search costs, as ratios to a plain float step and to an 8-bit quantization-aware one.

    python benchmarks/dnas.py                                 # ResNet-20, batches of 128, 9 rounds
    python benchmarks/dnas.py --batch 8 --rounds 1            # only to see that it runs

A step is forward, backward and update, on noise; that of a super net draws its mixture, too, and that of the logits
moves no weight, so it finds the quantized weights of the step before. Seven candidate widths of weights in every layer.
The literal super net has a path, and so a convolution, for every candidate; its paths share the quantized input. Time
is the median over rounds in which all contestants run one after the other; memory is by how much a process that does
only this grows, at its peak, in two steps.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq import quantize
from ajpq.architecture import Architecture
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.memory import give_back, keep_freed_memory
from ajpq.mixing import MixedLayer
from ajpq.models import cifar_resnet
from ajpq.policy import CompressionPolicy
from ajpq.space import Choices, SearchSpace
from ajpq.supernet import SuperNet
from ajpq.tracing import trace

WIDTHS = (1, 2, 3, 4, 6, 8, 32)
Step = Callable[[], object]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.grow is not None:
        _grow(options)
        return
    cases = contestants(options.batch)
    say(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads, "
        f"ResNet-20, batch {options.batch}, {options.rounds} rounds")  # fmt: skip
    steps = {name: make() for name, make in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(options.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    del steps
    memory = {name: _grown(name) for name in cases}
    names = list(cases)
    say(f"{'':52} {'time to float':>16} {'to QAT':>8} {'memory to float':>16} {'to QAT':>8} {'MiB':>7}")
    for name in names:
        to_float, to_qat = (_ratio(times[name], times[base]) for base in names[:2])
        spread = _spread(times[name], times[names[0]])
        grown = " ".join(f"{memory[name] / memory[base]:{n}.2f}" for base, n in zip(names[:2], (16, 8), strict=True))
        say(f"{name:52} {to_float:7.2f} +- {spread:.2f}  {to_qat:8.2f} {grown} {memory[name]:7.0f}")
    say(f"a float step takes {statistics.median(times[names[0]]):.3f} s")


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def _spread(times: list[float], base: list[float]) -> float:
    """Half the interquartile range of the ratio."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
    return (high - low) / 2


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# -- contestants ------------------------------------------------------------------------------------------------------


def contestants(batch: int) -> dict[str, Callable[[], Step]]:
    """Name -> what makes the step. The first is plain, the second quantization-aware."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    model = cifar_resnet(20).eval()
    calibration = [(torch.randn(min(batch, 16), 3, 32, 32), None)]
    network = trace(model, x[:2] if batch > 1 else x)
    ranges = calibrate(network, calibration)

    def fixed(net: nn.Module) -> Step:
        net = net.train().requires_grad_(True)
        sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            sgd.zero_grad(set_to_none=True)
            F.cross_entropy(net(x), y).backward()
            sgd.step()

        return step

    def search(granularity: str, acts: tuple[int, ...], widths: tuple[int, ...], logits: bool, literal: bool) -> Step:
        choices = Choices(widths, acts, blocks="max" if granularity == "kernel" else 4, first_last=None)
        architecture = Architecture(SearchSpace(network, choices), granularity)
        net, noise = SuperNet(architecture, ranges), torch.Generator().manual_seed(0)
        if literal:
            for layer in network.layers:
                mixed = net.module.get_submodule(layer.name)
                net.module.set_submodule(layer.name, Literal(mixed))
        sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            sgd.zero_grad(set_to_none=True)
            parts = architecture.sample(1.0, noise)
            loss = F.cross_entropy(net(x, parts if logits else parts.detach()), y)
            if logits:
                torch.autograd.grad(loss, list(architecture.parameters()), allow_unused=True)
            else:
                loss.backward()
                sgd.step()

        return step

    eight, zero = (8,), (0, *WIDTHS)
    return {
        "float": lambda: fixed(copy.deepcopy(network.module)),
        "quantization-aware, 8 bits": lambda: fixed(
            compress(network, CompressionPolicy.homogeneous(network, 8, 8), ranges)
        ),
        "float inputs: 7 widths per layer": lambda: search("layer", (32,), WIDTHS, False, False),
        "float inputs: the same, step of the logits": lambda: search("layer", (32,), WIDTHS, True, False),
        "float inputs: 7 widths and 0 bits per kernel": lambda: search("kernel", (32,), zero, False, False),
        "float inputs: literal, 7 paths per layer": lambda: search("layer", (32,), WIDTHS, False, True),
        "8-bit inputs: 7 widths per layer": lambda: search("layer", eight, WIDTHS, False, False),
        "8-bit inputs: the same, step of the logits": lambda: search("layer", eight, WIDTHS, True, False),
        "8-bit inputs: 7 widths and 0 bits per kernel": lambda: search("kernel", eight, zero, False, False),
        "8-bit inputs: per kernel, step of the logits": lambda: search("kernel", eight, zero, True, False),
        "8-bit inputs: literal, 7 paths per layer": lambda: search("layer", eight, WIDTHS, False, True),
        "4- or 8-bit inputs: 7 widths per layer": lambda: search("layer", (4, 8), WIDTHS, False, False),
        "4- or 8-bit inputs: the same, step of the logits": lambda: search("layer", (4, 8), WIDTHS, True, False),
    }


class Literal(nn.Module):
    """A path for every candidate: the sum of p_k conv(A(x), Q_k(w)), for one p per layer and one width of the input."""

    def __init__(self, mixed: MixedLayer) -> None:
        super().__init__()
        self.geometry, self.weight, self.bias = mixed.geometry, mixed.weight, mixed.bias
        self.widths, self.inputs = mixed.widths, mixed.inputs
        self.scales = mixed.scales
        self.p = self.q = self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        act, step = self.inputs.widths[0], self.inputs.steps[0]
        quantized, paths = quantize.fake_quantize_act(x, step, act, self.inputs.signed), []
        for k, b in enumerate(self.widths):
            bits = torch.full((len(self.weight),), b)
            weight = quantize.fake_quantize(self.weight, bits, self.scales[k])
            paths.append(self.p[k, 0] * self.geometry.apply(quantized, weight, None))
        out = sum(paths[1:], paths[0])
        return out if self.bias is None else out + self.bias.view(1, -1, *[1] * (out.ndim - 2))


# -- memory -----------------------------------------------------------------------------------------------------------


def _grown(name: str) -> float:
    """MiB, of a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--grow", name], capture_output=True, text=True, check=True
    )
    return float(found.stdout)


def _grow(options: argparse.Namespace) -> None:
    """Print by how much this process grows, at its peak, while it does two steps."""
    small = contestants(2)[options.grow]()
    small()  # what torch allocates once
    step = contestants(options.batch)[options.grow]()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = _status("VmRSS")
    step()
    step()
    say(f"{max((_status('VmHWM') - before) / 1024, 0.01):.2f}")


def _status(name: str) -> int:
    """KiB, on Linux."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
