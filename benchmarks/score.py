"""What scoring a policy costs, as ratios to a plain float32 forward pass of the original network over the same images.

    python benchmarks/score.py                                     # ResNet-20 with random weights, on noise
    python benchmarks/score.py --root DIR --checkpoint FILE        # on CIFAR-10, so that scores mean something
    python benchmarks/score.py --ray                               # also two Ray workers against one

Every figure is the median over rounds in which all contestants run one after the other, so that what else the machine
does hits all of them. The plain pass is what a user would write: the module as it is, in its own memory layout.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ajpq.calibration import calibrate
from ajpq.checkpoint import load_weights
from ajpq.compression import compress
from ajpq.cost import MACs, total
from ajpq.data import cifar10
from ajpq.loaders import take
from ajpq.memory import keep_freed_memory
from ajpq.models import cifar_resnet
from ajpq.policy import CompressionPolicy
from ajpq.scoring.local import Local
from ajpq.scoring.setting import Setting
from ajpq.space import Choices, SearchSpace
from ajpq.tracing import trace
from ajpq.training import accuracy, recalibrate


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, calibration, search = _case(options)
    network = trace(model, calibration[0][0][:2])
    ranges = calibrate(network, calibration)
    folded = Setting(network, ranges, [], search)
    fresh = Setting(network, ranges, take(calibration, 400), search)
    full = CompressionPolicy.homogeneous(network, 4, 8)
    if options.grow is not None:
        _grow(fresh, full, options)
        return
    half = _at_half_the_macs(network)
    keep_freed_memory()  # for every contestant
    say(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.threads} threads, "
        f"ResNet-20, {sum(len(y) for _, y in search)} images, {options.rounds} rounds")  # fmt: skip

    contestants = {"plain": lambda: accuracy(model, search)}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in search]
    contestants["plain, channels-last"] = lambda: accuracy(last, images)
    contestants["plain, channels-last, bfloat16"] = lambda: _in_bfloat16(last, images)
    for name, policy in (("4 bits", full), ("4 bits, half the MACs", half)):
        contestants[f"naive: {name}"] = lambda p=policy: _naive(network, ranges, p, search, None)
        contestants[f"naive, norms re-estimated: {name}"] = lambda p=policy: _naive(
            network, ranges, p, search, fresh.norm_data
        )
        for arithmetic in ("auto", "float32", "bfloat16"):
            for what, setting in (("", folded), (", norms re-estimated", fresh)):
                evaluator = _evaluator(setting, options, arithmetic)
                if evaluator is not None:
                    contestants[f"{arithmetic}{what}: {name}"] = lambda e=evaluator, p=policy: _once(e, p)
    table = compare(contestants, options.rounds)
    for name, (ratio, spread, score) in table.items():
        say(f"{name:48} {ratio:6.3f} +- {spread:.3f}   score {score:.4f}")

    _one_layer(fresh, full, options)
    _scaling(options)
    if options.ray:
        _ray(fresh, options)


def compare(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """name -> median of (time / time of the first, in the same round), half the interquartile range, last answer."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    answers = {name: run() for name, run in contestants.items()}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(seconds(run))
    base = next(iter(times.values()))
    found = {}
    for name, series in times.items():
        ratios = sorted(a / b for a, b in zip(series, base, strict=True))
        low, high = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
        found[name] = statistics.median(ratios), (high - low) / 2, answers[name]
    return found


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# -- contestants ------------------------------------------------------------------------------------------------------


def _naive(network, ranges, policy, search, norm_data) -> float:
    """A new module of fake-quantizing layers for every candidate, scales fitted anew."""
    student = compress(network, policy, ranges)
    if norm_data:
        recalibrate(student, norm_data)
    return accuracy(student, search)


def _evaluator(setting: Setting, options: argparse.Namespace, arithmetic: str) -> Local | None:
    try:
        return Local(setting, workers=options.threads, cache_bytes=0, arithmetic=arithmetic)
    except ValueError as error:
        say(f"left out: {error}")
        return None


def _once(evaluator: Local, policy: CompressionPolicy) -> float:
    evaluator.engine.forget()
    return evaluator.measure(policy).accuracy


def _in_bfloat16(model, images) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return accuracy(model, images)


def _at_half_the_macs(network) -> CompressionPolicy:
    space = SearchSpace(network, Choices())
    policies = [space.homogeneous(4, float(s), 8) for s in np.linspace(0, 0.7, 71)]
    return min(policies, key=lambda p: abs(total(MACs(), network, p) / network.macs - 0.5))


# -- reuse, memory, scaling -------------------------------------------------------------------------------------------


def _one_layer(setting: Setting, first: CompressionPolicy, options: argparse.Namespace) -> None:
    """Candidates that differ from a known one in one random layer, against the same candidates without reuse."""
    for megabytes in CACHES:
        evaluator = Local(setting, workers=options.threads, cache_bytes=megabytes * 2**20)
        plain = Local(setting, workers=options.threads, cache_bytes=0)
        evaluator.measure(first)
        for (
            layer
        ) in setting.network.layers:  # every kernel is quantized once per width, as in a search that has run a while
            for width in (2, 3, 4, 6, 8):
                evaluator.engine.bank.codes(layer, width), plain.engine.bank.codes(layer, width)
        ratios, equal = [], True
        for policy in _neighbours(setting.network, first, 60):
            began = time.perf_counter()
            reused = evaluator.measure(policy)
            middle = time.perf_counter()
            plain.engine.forget()
            equal &= plain.measure(policy) == reused
            ratios.append((middle - began) / (time.perf_counter() - middle))
        grown = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--grow", str(megabytes)], **_PIPE).stdout
        say(
            f"one layer differs, cache {megabytes:4} MiB: {np.mean(ratios):.3f} of the same without reuse (mean); "
            f"scores equal: {equal}; a process that does only this grows by {grown.strip()} MiB"
        )


_PIPE = {"capture_output": True, "text": True, "check": True}
CACHES = (1024, 512, 256)  # MiB


def _neighbours(network, first: CompressionPolicy, count: int) -> Iterator[CompressionPolicy]:
    random = np.random.default_rng(0)
    for _ in range(count):
        bits = {name: b.copy() for name, b in first.weight_bits.items()}
        layer = network.layers[random.integers(len(network.layers))]
        bits[layer.name][random.random(layer.c_out) < 0.5] = random.choice((2, 3, 6, 8))
        yield CompressionPolicy(bits, first.act_bits)


def _grow(setting: Setting, first: CompressionPolicy, options: argparse.Namespace) -> None:
    """Print by how much this process grows, at its peak, over the network and the images."""
    before = _status("VmRSS")
    evaluator = Local(setting, workers=options.threads, cache_bytes=options.grow * 2**20)
    for policy in (first, *_neighbours(setting.network, first, 30)):
        evaluator.measure(policy)
    say(f"{(_status('VmHWM') - before) / 1024:.0f}")


def _status(name: str) -> int:
    """KiB, on Linux."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)


def _scaling(options: argparse.Namespace) -> None:
    """Seconds against layers, images and candidates; the exponent of the power law through them (1 = linear)."""
    torch.manual_seed(0)

    def timed(depth: int, images: int, candidates: int) -> float:
        search = [(torch.randn(100, 3, 32, 32), torch.zeros(100, dtype=torch.long)) for _ in range(images // 100)]
        network = trace(cifar_resnet(depth).eval(), search[0][0][:2])
        evaluator = Local(Setting(network, calibrate(network, search[:1]), [], search), cache_bytes=0, workers=1)
        policies = [CompressionPolicy.homogeneous(network, 2 + i % 7, 8) for i in range(candidates)]
        evaluator.measure(policies[0])
        return min(seconds(lambda: [evaluator.measure(p) for p in policies]) for _ in range(3))

    for what, sizes, run in (
        ("layers", (20, 32, 56), lambda n: timed(n, 500, 1)),
        ("images", (500, 1000, 2000), lambda n: timed(20, n, 1)),
        ("candidates", (1, 2, 4), lambda n: timed(20, 500, n)),
    ):
        times = [run(n) for n in sizes]
        slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        listed = ", ".join(f"{n}: {t:.3f} s" for n, t in zip(sizes, times, strict=True))
        say(f"time against {what}: {listed}; exponent {slope:.2f}")


def _ray(setting: Setting, options: argparse.Namespace) -> None:
    from ajpq.scoring.cluster import Ray

    random, times = np.random.default_rng(0), {}
    eight, policies = CompressionPolicy.homogeneous(setting.network, 8, 8), []
    for _ in range(16):
        bits = {name: random.choice((2, 3, 4, 6, 8), len(b)).astype(np.uint8) for name, b in eight.weight_bits.items()}
        policies.append(CompressionPolicy(bits, eight.act_bits))
    for workers in (1, 2):
        evaluator = Ray(setting, workers=workers, cache_bytes=0)
        list(evaluator(policies[:workers]))  # start-up
        times[workers] = statistics.median(seconds(lambda e=evaluator: list(e(policies))) for _ in range(3))
        evaluator.close()
    say(f"Ray, 16 policies: 2 workers take {times[2] / times[1]:.3f} of the time of 1 ({times[1]:.2f} s)")


def _case(options: argparse.Namespace):
    torch.manual_seed(0)
    model = cifar_resnet(20)
    if options.checkpoint:
        load_weights(model, options.checkpoint)
    if options.root:
        data = cifar10(options.root)
        return model.eval(), list(take(data.calibration, 1000)), list(take(data.search, options.images))
    batches = [(torch.randn(100, 3, 32, 32), torch.randint(10, (100,))) for _ in range(options.images // 100)]
    return model.eval(), batches[:10], batches


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with CIFAR-10")
    parser.add_argument("--checkpoint", help="weights of ResNet-20")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
