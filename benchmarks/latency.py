"""Does a latency table foretell what a compressed network takes, and do MACs and bit operations?

    python benchmarks/latency.py --out FOLDER                                  # 40 policies of each of three networks
    python benchmarks/latency.py --out FOLDER --networks digits_cnn --policies 2 --seconds 0.02 --rounds 10

Builds the table of every network in FOLDER, or takes it from there, then measures random policies on the same runtime,
each padded as model.onnx is, all of them and the original in turns: a shared machine has slow and fast minutes, in
which ratios differ too. A policy prunes every space to a random number of channels; its layers have 8 bits, as fewer
take the same time, and with --floats a random share of them float32, which no search chooses. Of every predictor it
prints the Spearman correlation with the measured time, as a ratio to the original's in the same turns, and the median
relative error of that ratio; for the table also the error of its milliseconds. FOLDER/NETWORK.jsonl (with --floats
NETWORK.floats.jsonl) has a line per policy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from ajpq import models
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.console import Screen
from ajpq.cost import BOPs, CostModel, MACs, total
from ajpq.latency import LatencyTableCost
from ajpq.latency_points import Builder
from ajpq.latency_samples import drawn
from ajpq.onnx_export import float_onnx, to_onnx
from ajpq.padding import pad
from ajpq.policy import CompressionPolicy
from ajpq.timing import Run, Subject, interleaved, runner
from ajpq.tracing import trace

NETWORKS = {
    "resnet20": (models.resnet20, (3, 32, 32)),
    "mobilenet_v1": (models.mobilenet_v1, (3, 224, 224)),
    "skynet": (models.skynet, (3, 160, 320)),
    "digits_cnn": (models.digits_cnn, (1, 8, 8)),
}
FRACTIONS = tuple(n / 8 for n in range(1, 9))


def noise(shape: tuple[int, ...], n: int) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def with_floats(policy: CompressionPolicy, random: np.random.Generator) -> CompressionPolicy:
    """A random share of the layers in float32."""
    share, bits, inputs = random.uniform(0, 1), dict(policy.weight_bits), dict(policy.act_bits)
    for name, widths in bits.items():
        if random.random() < share:
            bits[name], inputs[name] = np.where(widths > 0, 32, 0).astype(np.uint8), 32
    return CompressionPolicy(bits, inputs)


def study(name: str, args: argparse.Namespace) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    device, images = runner(args.runtime, args.threads), noise(shape, args.batch)
    network = trace(make().eval(), noise(shape, 2))
    path = args.out / f"{name}.json"
    builder, screen = Builder(network, device, path, args.batch, FRACTIONS, args.seconds), Screen()
    while pending := builder.pending:
        with screen.stage(name, len(pending)) as advance:
            for done, key in enumerate(pending, 1):
                builder.measure(key)
                advance(done, "")
    builder.finish()
    predictors: dict[str, CostModel] = {
        "table": LatencyTableCost(path, multiple=args.multiple),
        "MACs": MACs(),
        "BOPs": BOPs(),
    }
    ranges = calibrate(network, [(noise(shape, 8), None)])
    whole = CompressionPolicy.homogeneous(network)
    runs: dict[int | str, Run] = {"original": device.start(Subject(images.numpy(), float_onnx(network.module, images)))}
    rows: list[dict[str, float]] = []
    with screen.stage(f"{name}, policies", args.policies) as advance:
        for seed in range(args.policies):
            random = np.random.default_rng(seed)
            policy = drawn(network, random, args.round)
            policy = with_floats(policy, random) if args.floats else policy
            final = pad(freeze(compress(network, policy, ranges)), network, policy, args.multiple)
            runs[seed] = device.start(Subject(images.numpy(), to_onnx(final, noise(shape, 8))))
            rows.append({key: total(cost, network, policy) for key, cost in predictors.items()})
            rows[-1] |= {
                f"{key} ratio": rows[-1][key] / total(cost, network, whole) for key, cost in predictors.items()
            }
            advance(seed + 1, "")
    found = interleaved(runs, args.rounds)
    for seed, row in enumerate(rows):
        row |= {key: found[run].median / args.batch for key, run in (("original", "original"), ("candidate", seed))}
        row["ratio"] = found[seed].over(found["original"]).median
    record = path.with_suffix(".floats.jsonl" if args.floats else ".jsonl")
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table(name, rows, list(predictors))


def table(name: str, rows: list[dict[str, float]], predictors: list[str]) -> None:
    measured = {key: np.array([row[key] for row in rows]) for key in ("candidate", "ratio")}
    low, high = min(measured["ratio"]), max(measured["ratio"])
    print(f"\n{name}, {len(rows)} policies that take {low:.3f} to {high:.3f} of the original")
    print("| predictor | Spearman | median error of the ratio | median error of the ms |\n|---|---|---|---|")
    for key in predictors:
        rank = spearmanr([row[key] for row in rows], measured["ratio"]).statistic
        off = np.median(np.abs(np.array([row[f"{key} ratio"] for row in rows]) / measured["ratio"] - 1))
        ms = np.median(np.abs(np.array([row[key] for row in rows]) / measured["candidate"] - 1))
        print(f"| {key} | {rank:.3f} | {off:.3f} | {f'{ms:.3f}' if key == 'table' else ''} |")
    print(flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:3])
    parser.add_argument("--policies", type=int, default=40)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--round", type=int, default=1, help="channels are kept in multiples of this")
    parser.add_argument("--multiple", type=int, default=16, help="and padded to multiples of this, as for model.onnx")
    parser.add_argument("--floats", action="store_true", help="leave a random share of the layers in float32")
    parser.add_argument("--seconds", type=float, default=0.05, help="for a measurement of a point of a table")
    parser.add_argument("--rounds", type=int, default=100, help="of the original and all policies in turns")
    arguments = parser.parse_args()
    for each in arguments.networks:
        study(each, arguments)
