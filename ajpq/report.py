"""What a run found: `report.json` for programs, a table for people. Accuracies and ratios are fractions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ajpq.network import Network
from ajpq.policy import CompressionPolicy

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
)


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
                "mean_bits": float(kept.mean()),
                "widths": {str(b): int((bits == b).sum()) for b in sorted(set(bits.tolist()))},
                "act_bits": policy.act_bits[layer.name],
            }
        )
    return rows


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
    table.add_row(
        f"{metric} after fine-tuning (test)", f"{metrics['original']:.4f}", f"{metrics['final']:.4f}", end_section=True
    )
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
        table.add_row(f"{metric} of model.onnx (test)", f"{metrics['original']:.4f}", f"{onnx['metric']:.4f}")
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
    spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items())
    console.print(f"{report['evaluations']} evaluations; seconds: {spent}", highlight=False)
