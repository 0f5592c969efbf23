"""The command `ajpq-inspect`: what is in a shipped file, or in the folder of a run. Needs neither data nor a search."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ajpq.errors import AjpqError
from ajpq.layers import FrozenLayer
from ajpq.onnx_export import FILE as ONNX
from ajpq.quantize import FLOAT
from ajpq.shipping import FILE, describe, load

REPORT = "report.json"
BAD_INPUT = 2
NAME = "ajpq-inspect"


def main() -> int:
    """Run the command on `sys.argv`; returns or exits with 0 or 2 (bad input)."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Print what is in a shipped network: layers, kernels by width, channels kept, bytes by part, and "
        "what the report beside it claims against what the file holds.",
    )
    parser.add_argument("path", metavar="PATH", help=f"the folder of a run, or a shipped {FILE}")
    path = parser.parse_args().path
    try:
        sys.stdout.write(inspect(path) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough; Python must not notice it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AjpqError as error:
        if os.environ.get("AJPQ_DEBUG") == "1":
            traceback.print_exception(error)
        sys.stderr.write(f"{NAME}: error: {error}\n")
        return BAD_INPUT
    return 0


def inspect(path: str | Path) -> str:
    """The text that the command prints. Raises AjpqError for what is not a whole shipped network."""
    path = Path(path)
    if not path.exists():
        raise AjpqError(f"what is inspected must exist, but there is no {path}; check the path")
    if path.is_dir() and not (path / FILE).is_file():
        raise AjpqError(f"a folder must hold a shipped {FILE}, but {path} has none; name the folder of a finished run")
    file = path / FILE if path.is_dir() else path
    network = load(file)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, FrozenLayer)}
    parts = [describe(file), _widths(layers)]
    if (file.parent / REPORT).is_file() and file.name == FILE:
        parts += _against(_read(file.parent / REPORT), layers, file)
    else:
        parts.append(f"no {REPORT} beside it: what was pruned and what was claimed is not known")
    return "\n\n".join(parts)


def _widths(layers: dict[str, FrozenLayer]) -> str:
    kernels: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for layer in layers.values():
        for bits, count in Counter(layer.bits.tolist()).items():
            kernels[bits] += count
            weights[bits] += count * layer.codes[0].numel()
    total = max(sum(weights.values()), 1)
    rows = [("bits", "kernels", "weights", "share of the weights")]
    for bits in sorted(weights):
        share = weights[bits] / total
        bar = "#" * round(40 * share)
        rows.append((str(bits), f"{kernels[bits]:,}", f"{weights[bits]:,}", f"{share:.3f} {bar}".rstrip()))
    mean = sum(bits * count for bits, count in weights.items()) / total
    rows.append(("mean", "", "", f"{mean:.2f} bits a weight" + (", float ones as 32" if weights[FLOAT] else "")))
    return _table(rows)


def _against(report: dict[str, Any], layers: dict[str, FrozenLayer], file: Path) -> list[str]:
    """What the report says next to what the file holds."""
    try:
        rows = [("layer", "channels kept", "")]
        for row in report["layers"]:
            claimed = {int(bits): count for bits, count in row["widths"].items() if int(bits)}
            found = Counter(layers[row["name"]].bits.tolist()) if row["name"] in layers else {}
            verdict = "" if claimed == found else f"differs: the file holds {sum(found.values())}, or other widths"
            rows.append((row["name"], f"{row['kept']} of {row['kernels']}", verdict))
        kept, kernels = (sum(row[key] for row in report["layers"]) for key in ("kept", "kernels"))
        rows.append(("all", f"{kept} of {kernels}", ""))
        size = report["bytes"]
        original, onnx = float(size["original"]), report.get("onnx") or {}
        lines = [("bytes", "claimed", "found", "of the original")]
        for name, claim, path, whole in (
            (FILE, size["claimed"], file, original),
            (ONNX, onnx.get("bytes"), file.parent / ONNX, onnx.get("original_bytes", original)),
        ):
            if path.is_file():
                found = path.stat().st_size
                told = "" if claim is None else f"{claim:,.0f}"
                lines.append((name, told, f"{found:,}", f"{found / whole:.4f}"))
        lines.append(("original", f"{original:,.0f}", "", ""))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise AjpqError(
            f"a {REPORT} must be one that ajpq wrote, but that in {file.parent} is not ({type(error).__name__}: "
            f"{error}); inspect {file.name} alone, in another folder"
        ) from error
    return [_table(rows), _table(lines)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AjpqError(f"a report must be readable JSON, but {path} is not ({error}); remove or repair it") from error


def _table(rows: Sequence[Sequence[str]]) -> str:
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip() for row in rows
    )
