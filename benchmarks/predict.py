"""Which score of a policy that was not fine-tuned foretells its accuracy after it? Makes the table of docs/scores.md.

    python benchmarks/predict.py --root DIR --checkpoint FILE --out FOLDER            # measures; can be continued
    python benchmarks/predict.py --out FOLDER --table                                # Spearman correlations

ResNet-20, CIFAR-10. For each of three budgets, `--policies` random policies within it: every third has independent
answers, the others are nearly homogeneous. Each is scored on 500 search images, fine-tuned for 60 steps of 64 images
from the trained weights, and tested on 1,000 test images. `--part 0 --parts 2` shares the work among processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.checkpoint import load_weights, save_weights
from ajpq.compression import compress
from ajpq.data import cifar10
from ajpq.draft import Draft
from ajpq.loaders import take
from ajpq.matching import match
from ajpq.memory import keep_freed_memory
from ajpq.models import resnet20
from ajpq.policy import CompressionPolicy
from ajpq.problem import reachable
from ajpq.sharing import share
from ajpq.space import SearchSpace
from ajpq.tracing import trace
from ajpq.training import accuracy, fit, recalibrate

BUDGETS = ({"size": 0.1}, {"size": 0.0625}, {"bops": 0.05})
SHARING = {"steps": 400, "lr": 0.02, "precision": "bfloat16"}
METRICS = {"accuracy": 1, "cross_entropy": -1, "divergence": -1}  # and whether more is better
TREATMENTS = {  # name: what it costs beside the forward passes of the search images, in forward passes of images
    "trained weights as they are": ("none", "0"),
    "batch-norm statistics": ("norms", "400"),
    "batch-norm least squares": ("matched", "400 (and 400 of the original once)"),
    "16 steps of fine-tuning": ("tuned16", "400 + 16 x 64 x 3"),
    "shared weights, statistics": ("shared", "400 (and 400 x 128 x 4 once)"),
    "shared weights, least squares": ("shared_matched", "400 (and 400 x 128 x 4 once)"),
}


def drawn(space: SearchSpace, budget: Budget, rng: np.random.Generator, independent: bool) -> CompressionPolicy:
    """A random policy within budget."""
    level = {kind: rng.uniform(-1, 1) for kind in ("sparsity", "width")}
    if rng.random() < 0.5:
        level["sparsity"] = -1.0
    draft = Draft(space, budget)
    while (decision := draft.decision) is not None:
        options = decision.options
        u = rng.random() if independent else (np.clip(level[decision.kind] + rng.normal(0, 0.35), -1, 1) + 1) / 2
        if decision.kind == "sparsity":
            draft.take(options[0] + u * (options[-1] - options[0]))
        else:
            draft.take(options[min(int(u * len(options)), len(options) - 1)])
    return draft.policy()


def measure(args: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    model = resnet20()
    load_weights(model, args.checkpoint)
    model.eval()
    data = cifar10(args.root)
    calibration = list(take(data.calibration, 1000))
    norm = take(calibration, 400)
    search, test = list(take(data.search, 500)), list(take(data.test, 1000))
    steps = [(x[:64], y[:64]) for (x, y), _ in zip(data.train, range(60), strict=False)]
    network = trace(model, calibration[0][0][:2])
    ranges, space = calibrate(network, calibration), SearchSpace(network)
    budgets = [reachable(space, limits) for limits in BUDGETS]
    with torch.inference_mode():
        original = [F.log_softmax(model(x).double(), 1) for x, _ in search]

    @torch.inference_mode()
    def judged(student) -> dict[str, float]:
        student.eval()
        sums = np.zeros(3)
        for (x, y), known in zip(search, original, strict=True):
            found = F.log_softmax(student(x).double(), 1)
            cross_entropy = float(F.nll_loss(found, y, reduction="sum"))
            divergence = float(F.kl_div(found, known, reduction="sum", log_target=True))
            sums += [int((found.argmax(1) == y).sum()), cross_entropy, divergence]
        return dict(zip(METRICS, sums / sum(len(y) for _, y in search), strict=True))

    shared = replace(network, module=_shared(args, network, space, budgets, calibration, data.train))
    shared_ranges = calibrate(shared, calibration)
    out = args.out / f"part{args.part}.jsonl"
    done = {tuple(json.loads(line)["id"]) for line in out.read_text().splitlines()} if out.exists() else set()
    for number, (k, i) in enumerate((k, i) for k in range(args.policies) for i in range(len(BUDGETS))):
        if number % args.parts != args.part or (i, k) in done:
            continue
        policy = drawn(space, budgets[i], np.random.default_rng(1000 * i + k), independent=k % 3 == 0)
        row: dict = {"id": (i, k), "policy": policy.digest(), "ratios": budgets[i].ratios(policy)}
        start = time.perf_counter()
        student = compress(network, policy, ranges)
        row["none"] = judged(student)
        recalibrate(student, norm)
        row["norms"] = judged(student)
        tuned, few = copy.deepcopy(student), copy.deepcopy(student)
        for name, net, seen in (("matched", network, ranges), ("shared_matched", shared, shared_ranges)):
            student = compress(net, policy, seen)
            match(student, net, policy, norm)
            row[name] = judged(student)
        student = compress(shared, policy, shared_ranges)
        recalibrate(student, norm)
        row["shared"] = judged(student)
        with torch.autocast("cpu", torch.bfloat16):
            fit(few, steps[:16], epochs=1, lr=0.02)
            fit(tuned, steps, epochs=1, lr=0.02, teacher=model)
        recalibrate(few, norm)
        recalibrate(tuned, norm)
        row["tuned16"], row["final"] = judged(few), accuracy(tuned, test)
        row["seconds"] = time.perf_counter() - start
        with out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(i, k, {name: round(row[name]["accuracy"], 3) for name in ("norms", "matched", "shared")}, row["final"])


def _shared(args, network, space, budgets, calibration, train):
    path, module = args.out / "shared.safetensors", copy.deepcopy(network.module)
    if not path.exists() and args.part == 0:

        def draw(rng: np.random.Generator) -> CompressionPolicy:
            return drawn(space, budgets[rng.integers(len(budgets))], rng, rng.random() < 1 / 3)

        save_weights(share(network, draw, calibration, train, seed=7, **SHARING).module, path)
    while not path.exists():
        time.sleep(5)  # part 0 makes them
    load_weights(module, path)
    return module


def table(folder: Path) -> None:
    rows = [json.loads(line) for path in sorted(folder.glob("part*.jsonl")) for line in path.read_text().splitlines()]
    names = [", ".join(f"{cost} {limit}" for cost, limit in limits.items()) for limits in BUDGETS]
    print("| score | " + " | ".join(names) + " | mean | forward passes of images, beside the scored ones |")
    print("|---|" + "---|" * (len(names) + 2))
    for label, (key, cost) in TREATMENTS.items():
        for metric, sign in METRICS.items():
            found = []
            for i in range(len(BUDGETS)):
                own = [row for row in rows if row["id"][0] == i]
                found.append(
                    spearmanr([sign * row[key][metric] for row in own], [row["final"] for row in own]).statistic
                )
            cells = [f"{value:.2f}" for value in (*found, np.mean(found))]
            print(f"| {label}: {metric.replace('_', '-')} | " + " | ".join(cells) + f" | {cost} |")
    counts = [sum(row["id"][0] == i for row in rows) for i in range(len(BUDGETS))]
    spans = [[row["final"] for row in rows if row["id"][0] == i] for i in range(len(BUDGETS))]
    print(
        f"\npolicies {counts}, accuracies after fine-tuning " + ", ".join(f"{min(s):.2f}-{max(s):.2f}" for s in spans)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", help="weights of ResNet-20")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--policies", type=int, default=24, help="per budget")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.out)
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        measure(arguments)
