"""The job of `ajpq-profile`: how fast a network is on this machine, and the latency table that a search needs.

ajpq-profile what=FOLDER                      # of a run: its model.onnx against the original
ajpq-profile what=FOLDER runtime=[onnxruntime,openvino]   # all in turns, ratios to the original on the first
ajpq-profile what=model model=skynet          # the configured model alone
ajpq-profile table=FILE model=... data=...    # measures the table of that model; started again, it goes on
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ajpq.console import Screen
from ajpq.errors import AjpqError
from ajpq.files import write_text
from ajpq.latency_points import Builder
from ajpq.latency_table import EMPTY, WHOLE, LatencyTable
from ajpq.onnx_export import FILE, float_onnx
from ajpq.shipping import FILE as PACKED
from ajpq.shipping import load
from ajpq.timing import Runner, Subject, interleaved, runner
from ajpq.tracing import trace

MODEL, RESULT, CUDA = "model", "profile.json", "cuda"


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure `cfg.what`, build `cfg.table`, or both. Raises AjpqError, before anything is measured, for bad settings.

    Writes profile.json, with what was measured, to `folder`; the table goes where `cfg.table` says.
    """
    screen = Screen()
    check_settings(cfg)
    devices = {name: runner(name, cfg.threads) for name in _runtimes(cfg)}
    if cfg.what is not None:
        _compare(cfg, devices, folder, screen)
    if cfg.table is not None:
        _build(cfg, *devices.values(), screen)


def check_settings(cfg: DictConfig) -> None:
    """Raises AjpqError."""
    if cfg.what is None and cfg.table is None:
        raise AjpqError(
            "ajpq-profile must be told what to do, but it is not; write what=FOLDER of a run, what=model, or table=FILE"
        )
    if cfg.table is not None and Path(cfg.table).is_dir():
        raise AjpqError(
            f"a latency table must be a file, but {cfg.table} is a folder; write table={cfg.table}/table.json"
        )
    if not _runtimes(cfg):
        raise AjpqError("there must be at least one runtime, but runtime is []; write runtime=onnxruntime")
    if cfg.table is not None and (len(_runtimes(cfg)) != 1 or _runtimes(cfg) == [CUDA]):
        raise AjpqError(
            f"a latency table must be of one runtime of ONNX files, but runtime is {cfg.runtime}; take onnxruntime"
        )
    for key, least in (("batch", 1), ("rounds", 5), ("pruned", 0)):
        if isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < least:
            raise AjpqError(f"{key} must be a whole number of at least {least}, but it is {cfg[key]!r}; raise it")
    if isinstance(cfg.seconds, bool) or not isinstance(cfg.seconds, int | float) or not cfg.seconds > 0:
        raise AjpqError(f"seconds must be above 0, but it is {cfg.seconds!r}; write seconds=0.05")


def _runtimes(cfg: DictConfig) -> list[str]:
    return list(cfg.runtime) if OmegaConf.is_list(cfg.runtime) else [cfg.runtime]


# -- what= ------------------------------------------------------------------------------------------------------------


def _compare(cfg: DictConfig, devices: Mapping[str, Runner], folder: Path, screen: Screen) -> None:
    """Everything in turns; ratios are to the original on the first runtime."""
    with screen.stage("load"):
        place = None if cfg.what == MODEL else Path(cfg.what)
        shipped = None if place is None else _onnx_in(place)
        shape = _image_shape(cfg) if shipped is None else _shape_in(shipped)
        images = _images(shape, cfg.batch)
        original = instantiate(cfg.model if place is None else _model_of(place, cfg), _convert_="all").eval()
        runs = {}
        for runtime, device in devices.items():
            runs["original", runtime] = device.start(_subject(original, images, runtime == CUDA))
            if shipped is not None:
                module = load(place / PACKED) if runtime == CUDA else None
                runs["shipped", runtime] = device.start(Subject(images.numpy(), shipped, module))
    with screen.stage("measure"):
        found = interleaved(runs, cfg.rounds)
    for device in devices.values():
        screen.say(f"{device.device}, batch {cfg.batch}, {cfg.rounds} rounds in turns")
    first, rows = next(iter(found)), []
    for (network, runtime), times in found.items():
        ms, ratio = times.row(cfg.batch), times.over(found[first]).row()
        rows.append({"network": network, "device": asdict(devices[runtime].device), "ms": ms, "ratio": ratio})
        line = f"{network:<8} {runtime}: {_told(ms)} ms per image"
        screen.say(line if (network, runtime) == first else f"{line}; {_told(ratio)} of the original on {first[1]}")
    report = {"what": cfg.what, "batch": cfg.batch, "rounds": cfg.rounds, "networks": rows}
    write_text(folder / RESULT, json.dumps(report, indent=1))


def _told(row: Mapping[str, float]) -> str:
    return f"{row['median']:.4g} (quartiles {row['low']:.4g} to {row['high']:.4g})"


def _subject(model: nn.Module, images: torch.Tensor, cuda: bool) -> Subject:
    """A float network as the runtime takes it."""
    return Subject(images.numpy(), None if cuda else float_onnx(model, images), model if cuda else None)


def _model_of(place: Path, cfg: DictConfig) -> Any:
    """The configuration of the original: that of the run in the folder; without one, the present."""
    path = place / ".hydra" / "config.yaml"
    return OmegaConf.load(path).model if path.is_file() else cfg.model


def _onnx_in(place: Path) -> bytes:
    try:
        return (place / FILE).read_bytes()
    except OSError as error:
        raise AjpqError(
            f"what must be the folder of a run that shipped a {FILE}, or {MODEL}, but {place} has none "
            f"({error.strerror}); run ajpq there with onnx=true"
        ) from error


def _shape_in(model: bytes) -> tuple[int, ...]:
    """(C, H, W) that an ONNX model takes."""
    dims = onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims[1:])


def _image_shape(cfg: DictConfig) -> tuple[int, ...]:
    """`cfg.image`; without it that of the data's images."""
    if cfg.image is None:
        return tuple(next(iter(instantiate(cfg.data, _convert_="all").calibration))[0].shape[1:])
    said = OmegaConf.to_container(cfg.image) if OmegaConf.is_config(cfg.image) else cfg.image
    if not isinstance(said, list) or len(said) != 3 or not all(isinstance(n, int) and n > 0 for n in said):
        raise AjpqError(f"image must be three whole numbers, [C,H,W], but it is {said}; write image=[3,32,32]")
    return tuple(said)


def _images(shape: tuple[int, ...], batch: int) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


# -- table= -----------------------------------------------------------------------------------------------------------


def _build(cfg: DictConfig, device: Runner, screen: Screen) -> None:
    with screen.stage("trace"):
        network = trace(instantiate(cfg.model, _convert_="all").eval(), _images(_image_shape(cfg), 2))
    builder = Builder(network, device, Path(cfg.table), cfg.batch, list(cfg.fractions), cfg.seconds, cfg.pruned)
    total, pending = len(builder.points) + len(builder.pruned) + 1, builder.pending
    known = total - len(set(pending))
    screen.say(f"{device.device}, batch {cfg.batch}, {' x '.join(map(str, builder.image))}: {total} points"
               + (f", of which {known} are measured" if known else ""))  # fmt: skip
    try:
        while pending := builder.pending:
            _measure(builder, pending, screen)
        table = builder.finish()
    except KeyboardInterrupt:
        screen.say("to go on, give the same command again")
        raise
    screen.say(told(table))
    screen.say(f"written to {builder.path}; search with costs=latency_table costs.latency.path={builder.path}")


def _measure(builder: Builder, pending: list[str], screen: Screen) -> None:
    """A network and three points tell how long all will take; writing a network's file is most of its time, and the
    first of the points may load what all are measured with."""
    networks = [i for i, key in enumerate(pending) if key not in builder.points]
    points = [i for i, key in enumerate(pending) if key in builder.points]
    probes, spent = [*networks[:1], *points[:3]], {}
    for i in probes:
        start = time.perf_counter()
        builder.measure(pending[i])
        spent[i] = time.perf_counter() - start
    rest = [i for i in range(len(pending)) if i not in spent]
    files = {pending[i] for i in networks} - {pending[i] for i in probes}
    left = sum(spent[i] for i in networks[:1]) * len(files)
    left += float(np.median([spent[i] for i in points[:3]] or [0.0])) * len(points[3:])
    screen.say(
        f"{len(set(pending))} points to measure, {len(pending)} measurements, about {_duration(left)}; a build that is "
        "stopped goes on"
    )
    with screen.stage("table", len(pending)) as advance:
        for done, i in enumerate(rest, len(pending) - len(rest) + 1):
            builder.measure(pending[i])
            advance(done, "")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def told(table: LatencyTable) -> str:
    """What the whole networks took, and how much of it their layers explain, each measured alone."""
    lines = []
    for precision, key in WHOLE.items():
        ms, layers, empty = table.times[key][0], table.layer_sums[precision], table.times[EMPTY][0]
        lines.append(
            f"{precision}: {ms:.4g} ms per image; its layers, each alone, {layers:.4g}, an empty run {empty:.2g}, "
            f"the rest {ms - layers - empty:+.2g}"
        )
    original = sum(float(grid[0, -1, -1]) for grid in table.grids.values())
    lines.append(f"predicted of the original, with times that never fall: {original:.4g} ms")
    if table.pruned:
        off = np.abs(list(table.errors.values()))
        lines.append(
            f"networks pruned at random in int8 ({len(off)}) are predicted within {np.median(off):.1%} (median), "
            f"at worst {off.max():.1%}"
        )
    return "\n".join(lines)
