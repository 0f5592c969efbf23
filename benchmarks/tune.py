"""What a step of fine-tuning costs, as ratios to a float32 step of the uncompressed network.

    python benchmarks/tune.py                                        # ResNet-20, MobileNetV1 and SkyNet
    python benchmarks/tune.py --networks resnet20 --batch 8 --rounds 1   # only to see that it runs

A step is forward, backward and update on noise, by `ajpq.training.fit`; 4 bits and half of the channels everywhere,
activations of 8 bits. "Distilled" runs the uncompressed network on every batch too. Times are processor seconds,
medians over rounds in which all contestants run one after the other.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.detection import Detection
from ajpq.memory import keep_freed_memory
from ajpq.models import cifar_resnet, mobilenet_v1, skynet
from ajpq.outputs import quantize_outputs
from ajpq.recipe import PRECISIONS
from ajpq.space import Choices, SearchSpace
from ajpq.tasks import CLASSIFICATION, Task
from ajpq.tracing import trace
from ajpq.training import fit

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], Task, int]] = {
    "resnet20": (lambda: cifar_resnet(20), (3, 32, 32), CLASSIFICATION, 128),
    "mobilenet_v1": (mobilenet_v1, (3, 224, 224), CLASSIFICATION, 16),
    "skynet": (skynet, (3, 160, 320), Detection(), 16),
}  # how to make it, its input, its task, images of a batch


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    say(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads, "
        f"{options.rounds} rounds")  # fmt: skip
    for name in options.networks:
        steps = contestants(name, options.batch)
        times: dict[str, list[float]] = {who: [] for who in steps}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for who, step in steps.items():
                began = time.process_time()
                step()
                times[who].append(time.process_time() - began)
        base = next(iter(times.values()))
        for who, found in times.items():
            ratios = [a / b for a, b in zip(found, base, strict=True)]
            say(f"{name:14} {who:32} {statistics.median(ratios):5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
        say(f"{name:14} a float32 step takes {statistics.median(base):.2f} s")


def contestants(name: str, batch: int | None) -> dict[str, Callable[[], object]]:
    make, shape, task, usual = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(batch or usual, *shape)
    y = torch.zeros(len(x), dtype=torch.int64)
    if isinstance(task, Detection):
        y = torch.tensor([0.4, 0.4, 0.6, 0.6]).expand(len(x), 1, 4)
    network = trace(model, x[:2])
    policy = SearchSpace(network, Choices(max_sparsity=0.5)).homogeneous(4, 0.5, 8)
    student = compress(network, policy, calibrate(network, [(x[:4], y[:4])]))
    quantize_outputs(student, x[:4])

    def step(net: nn.Module, precision: str, teacher: nn.Module | None = None) -> Callable[[], object]:
        net = copy.deepcopy(net)
        return lambda: fit(net, [(x, y)], epochs=1, lr=1e-6, task=task, precision=precision, teacher=teacher)

    found = {f"uncompressed, {precision}": step(model, precision) for precision in PRECISIONS}
    for precision in PRECISIONS:
        found[f"compressed, {precision}"] = step(student, precision)
        found[f"compressed, distilled, {precision}"] = step(student, precision, model)
    return found


def say(text: str) -> None:
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, help="images; by default those of the network")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
