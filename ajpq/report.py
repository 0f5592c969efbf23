"""What a run found: `report.json` for programs, a table for people. Accuracies and ratios are fractions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ajpq import control
from ajpq.bootstrap import Paired, paired
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.speed import told

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "gymnasium",
    "stable_baselines3",
    "hydra-core",
    "safetensors",
    "onnx",
    "onnxruntime",
    "openvino",
)
_STAGES = {"original": "of the original", "searched": "after search", "final": "after fine-tuning"}
_KNOWN = {"original": "the original", "given": "the network as given, before it was trained here,"}
_VERDICTS = {"better": "better", "worse": "worse", "no better": "no difference can be told"}


def versions() -> dict[str, str]:
    """Of Python, this package and what it computes with."""
    found = {"python": platform.python_version()}
    for name in ("ajpq", *_PACKAGES):
        try:
            found[name.replace("_", "-")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    return {"processor": _processor(), "threads": torch.get_num_threads(), "system": platform.platform()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def costs_of(problem: Any, policy: CompressionPolicy) -> dict[str, dict[str, Any]]:
    """cost name -> original, final, ratio, unit."""
    final = problem.budget.values(policy)
    return {
        name: {
            "original": problem.budget.original[name],
            "final": value,
            "ratio": value / problem.budget.original[name],
            "unit": problem.budget.costs[name].unit,
        }
        for name, value in final.items()
    }


def layers_of(network: Network, policy: CompressionPolicy) -> list[dict[str, Any]]:
    """What became of every layer."""
    rows = []
    for layer in network.layers:
        bits = policy.weight_bits[layer.name]
        kept = bits[bits > 0]
        rows.append(
            {
                "name": layer.name,
                "kernels": layer.c_out,
                "kept": len(kept),
                "mean_bits": float(kept.mean()) if len(kept) else 0.0,
                "widths": {str(b): int((bits == b).sum()) for b in sorted(set(bits.tolist()))},
                "act_bits": policy.act_bits[layer.name],
            }
        )
    return rows


def claimed_speed(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the cost models say of the time: ratios of the costs in ms; without one, of macs and bops."""
    timed = [name for name, cost in costs.items() if cost["unit"] == "ms"]
    return {name: costs[name]["ratio"] for name in timed or ("macs", "bops") if name in costs}


def differences(
    values: Mapping[str, Mapping[str, np.ndarray]],
    blocks: torch.Tensor | None = None,
    of: Sequence[str] = ("searched", "final"),
    to: str = "original",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each network of `of` -> metric -> `ajpq.bootstrap.Paired` against the network `to`, as a dictionary.

    values: network -> metric -> value of each test image (n,). blocks: (n,), see `ajpq.bootstrap.paired`.
    """
    return {
        name: {metric: asdict(paired(column, values[to][metric], blocks)) for metric, column in values[name].items()}
        for name in of
    }


def difference_told(metric: str, stage: str, found: Mapping[str, Any], to: str = "original") -> str:
    """found: as `differences` gives it, against the network `to`."""
    pair = Paired(**found)
    where = f"{pair.images} test images" + (
        f" in {pair.blocks} block{'s' * (pair.blocks > 1)}" if pair.blocks < pair.images else ""
    )
    line = f"{metric} {_STAGES[stage]}: {pair.mean:+.4f} to {_KNOWN[to]} on the same {where}"
    if pair.word is None:
        return f"{line}, too few for an interval"
    return f"{line}, 95 % interval {pair.low:+.4f} to {pair.high:+.4f}: {_VERDICTS[pair.word]}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(report: Mapping[str, Any], console: Console) -> None:
    """The closing table."""
    table = Table(title="Result", title_justify="left")
    for name, justify in (
        ("", "left"),
        ("original", "right"),
        ("compressed", "right"),
        ("ratio", "right"),
        ("budget", "right"),
    ):
        table.add_column(name, justify=justify)
    metrics, size, budget, metric = report["metrics"], report["bytes"], report["budget"], report["metric"]
    table.add_row(f"{metric} after search (test)", f"{metrics['original']:.4f}", f"{metrics['searched']:.4f}")
    table.add_row(f"{metric} after fine-tuning (test)", f"{metrics['original']:.4f}", f"{metrics['final']:.4f}")
    whole = report["metrics_in_full"]
    for other in (name for name in whole["final"] if name != metric):
        table.add_row(f"{other} after fine-tuning", f"{whole['original'][other]:.4f}", f"{whole['final'][other]:.4f}")
    if (others := report["held_out"]) is not None:
        before, after = others["original"], others["final"]
        table.add_row(f"{metric} after fine-tuning (search)", f"{before[metric]:.4f}", f"{after[metric]:.4f}")
        table.add_row("divergence from the original (search)", "", f"{after['divergence']:.4f}")
    table.add_section()
    table.add_row(
        "bytes claimed",
        f"{size['original']:,.0f}",
        f"{size['claimed']:,.0f}",
        f"{size['claimed'] / size['original']:.4f}",
    )
    table.add_row(
        "bytes on disk",
        f"{size['original']:,.0f}",
        f"{size['on_disk']:,.0f}",
        f"{size['on_disk'] / size['original']:.4f}",
        end_section=True,
    )
    if report["onnx"] is not None:
        onnx = report["onnx"]
        if onnx["agreement"] is not None:
            table.add_row(f"{metric} of model.onnx (test)", f"{metrics['original']:.4f}", f"{onnx['metric']:.4f}")
            table.add_row(f"same {onnx['answer']} as packed, of {onnx['images']:,}", "", f"{onnx['agreement']:.4f}")
        table.add_row(
            "bytes of model.onnx, int8",
            f"{onnx['original_bytes']:,.0f}",
            f"{onnx['bytes']:,.0f}",
            f"{onnx['bytes'] / onnx['original_bytes']:.4f}",
            end_section=True,
        )
    for name, cost in report["costs"].items():
        limit = f"<= {budget[name]:g}" if name in budget else ""
        table.add_row(
            f"{name} ({cost['unit']})",
            _number(cost["original"]),
            _number(cost["final"]),
            f"{cost['ratio']:.4f}",
            limit,
        )
    console.print(table)
    lines = [
        difference_told(name, stage, difference)
        for stage, found in report["differences"].items()
        for name, difference in found.items()
        if stage == "final" or name == metric
    ]
    if report["given"] is not None:
        found = report["given"]["differences"]
        lines += [difference_told(metric, stage, found[stage][metric], to="given") for stage in found]
    if report["onnx"] is not None and report["onnx"]["timing"] is not None:
        lines += told(report["onnx"]["timing"], report["onnx"]["claimed"])
    if report["control"] is not None:
        lines.append(control.told(report["control"]))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items())
    console.print(f"{report['evaluations']} evaluations; seconds: {spent}", highlight=False)
