"""How long a shipped model.onnx takes next to its original in float32: measured in turns, on every runtime there is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ajpq.errors import AjpqError
from ajpq.timing import Subject, interleaved, processor, runner

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def check_timing(timing: Mapping[str, Any] | None) -> None:
    """Settings of `measured`; None = nothing is measured. Raises AjpqError."""
    if timing is None:
        return
    if not isinstance(timing, Mapping) or set(timing) != {"batch", "threads", "seconds"}:
        raise AjpqError(f"timing must be batch, threads and seconds, or null, but it is {timing}; write timing=null")
    for key in ("batch", "threads"):
        if isinstance(timing[key], bool) or not isinstance(timing[key], int) or timing[key] < 1:
            raise AjpqError(
                f"timing.{key} must be a whole number of at least 1, but it is {timing[key]!r}; write timing.{key}=1"
            )
    seconds = timing["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise AjpqError(f"timing.seconds must be above 0, but it is {seconds!r}; write timing.seconds=3")


def measured(
    original: bytes, shipped: bytes, images: Tensor, *, batch: int = 1, threads: int = 1, seconds: float = 3.0
) -> dict[str, Any]:
    """processor, batch, threads, and for each of `runtimes` that is installed: version, ms per image of `original` and
    `shipped` (median, low, high: quartiles of the rounds), the ratio of their medians, its quartiles by rounds, and
    ratio_to_onnxruntime, to the original's median there.

    original, shipped: ONNX models of the same input; images (n, C, H, W) of it, n >= 1. seconds: of all networks
    together, five rounds at least, beside loading. OpenVINO computes float32 networks in bfloat16 or float16 where the
    processor has such instructions. Of a runtime that stops there is only `failed`, why; nothing is raised.
    """
    picked = images[torch.arange(batch) % len(images)].numpy()  # (batch, C, H, W)
    runs, rows = {}, {}
    for name in NAMES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            device = runner(name, threads)
            pair = [device.start(Subject(picked, model)) for model in (original, shipped)]
            for run in pair:
                run()
        except Exception as error:  # runtimes raise their own kinds
            rows[name] = {"failed": _why(name, error)}
        else:
            rows[name] = {"version": device.device.version}
            runs |= dict(zip(_keys(name), pair, strict=True))
    try:
        found = interleaved(runs, seconds=seconds) if runs else {}
    except Exception as error:
        rows = {name: {"failed": _why(name, error)} for name in rows}
        found = {}
    for name in rows:
        if _keys(name)[0] in found:
            ours, theirs = (found[key] for key in reversed(_keys(name)))
            low, high = ours.over(theirs).quartiles
            rows[name] |= {
                "original": theirs.row(batch), "shipped": ours.row(batch),
                "ratio": ours.median / theirs.median, "ratio_low": low, "ratio_high": high,
            }  # fmt: skip
            base = found.get(_keys("onnxruntime")[0])
            if base is not None:
                rows[name]["ratio_to_onnxruntime"] = ours.median / base.median
    return {"processor": processor(), "batch": batch, "threads": threads, "runtimes": rows}


def told(timing: Mapping[str, Any], claimed: Mapping[str, float]) -> list[str]:
    """A line for each runtime. claimed: cost name -> ratio to the original."""
    threads = f"{timing['threads']} thread{'s' if timing['threads'] > 1 else ''}"
    claim = ", ".join(f"{name} {ratio:.2f}" for name, ratio in claimed.items())
    lines = []
    for name, row in timing["runtimes"].items():
        if "failed" in row:
            lines.append(row["failed"])
            continue
        ours, theirs = row["shipped"]["median"], row["original"]["median"]
        kind = "float32 " if name == "onnxruntime" else ""
        line = (
            f"{NAMES[name]}, batch {timing['batch']}, {threads}: int8 {ours:.3g} ms per image against {kind}"
            f"{theirs:.3g} ms of the original: {row['ratio']:.2f} times its time "
            f"(quartiles {row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        )
        if name != "onnxruntime" and "ratio_to_onnxruntime" in row:
            line += f", and {row['ratio_to_onnxruntime']:.2f} times that on ONNX Runtime"
        lines.append(line + (f"; claimed: {claim}" if claim else ""))
    return lines


def _keys(name: str) -> tuple[str, str]:
    return f"{name} original", f"{name} shipped"


def _why(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0][:200]
    return f"{NAMES[name]} could not be measured ({type(error).__name__}: {reason})"
