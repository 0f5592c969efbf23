"""The main job: config -> problem -> search -> policy -> fine-tune -> ship -> report. Called by the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import fx

from ajpq import report as reporting
from ajpq.compression import freeze
from ajpq.console import Screen
from ajpq.control import Beside, Comparison, Control
from ajpq.errors import AjpqError, check_counts
from ajpq.files import remove_parts, write_text
from ajpq.held_out import held_out
from ajpq.loaders import take
from ajpq.onnx_check import seen
from ajpq.onnx_export import FILE as ONNX
from ajpq.onnx_export import float_onnx
from ajpq.padding import check_multiple, pad
from ajpq.policy import CompressionPolicy
from ajpq.preparing import Prepared, check_made, epochs, prepare
from ajpq.problem import SearchBackend, SearchResult
from ajpq.record import RECORD
from ajpq.resume import REPORT, SEARCH
from ajpq.searching import search_in
from ajpq.shipping import load, ship
from ajpq.snapshot import STATE, check_same, fingerprint, keep
from ajpq.speed import check_timing, measured
from ajpq.training import measure, recalibrate

TUNING = "finetune.pt"  # state of the fine-tuning, after every epoch
ONNX_IMAGES = 128  # of the calibration split, for the ranges of residual sums


def run(cfg: DictConfig, folder: Path) -> None:
    """Run one job; everything it writes goes to `folder`. The test split is read once, at the end.

    Writes original.safetensors (when trained here), search.json (what the search depends on), evaluations.jsonl (a line
    per evaluation, at once), search.pt (the state of the search, now and then), policy.json, model.safetensors,
    model.onnx and report.json. An interrupt keeps what there is (during the search policy.json with the best policy so
    far, during fine-tuning the network as it is) and passes on. With `cfg.resume`, a run that was killed in `folder`
    goes on.
    Raises AjpqError where it would replace a record, or continue another search.
    """
    screen = Screen()
    backend = instantiate(cfg.search, _convert_="all")  # its errors come before anything is spent
    control = instantiate(cfg.control, _convert_="all") or None
    check_made("search", cfg.search, backend, SearchBackend)
    if control is not None:
        check_made("control", cfg.control, control, Control)
    check_counts(1, evaluations=getattr(backend, "evaluations", None))
    check_timing(cfg.timing)
    check_multiple(cfg.onnx_multiple)
    _check_folder(folder, resumed=cfg.resume is not None)
    job = prepare(cfg, folder, screen)
    data, model, network, problem = job.data, job.model, job.network, job.problem
    try:
        result, comparison = _search(cfg, folder, screen, job, backend, control)
    except KeyboardInterrupt:
        if problem.best is not None:
            write_text(folder / "policy.json", problem.best.policy.to_json())
        raise
    finally:
        problem.close()
    with screen.stage("reconstruct"):
        student = job.student(result.policy)
        searched = copy.deepcopy(student)  # to be measured at the end: fine-tuning works in place
    try:
        write_text(folder / "policy.json", result.policy.to_json())
        with screen.stage("fine-tune", job.finetune["epochs"]) as advance:
            final = job.tuned(
                student, result.policy, data, checkpoint=folder / TUNING, seed=cfg.seed, on_epoch=epochs(advance)
            )
    except KeyboardInterrupt:
        if job.finetune.get("norm_batches", True):
            recalibrate(student, data.calibration)
        ship(freeze(student), folder)
        raise
    path, onnx = _shipped(cfg, job, result.policy, final, folder, screen)
    loaded = load(path)
    networks, others = {"original": model, "searched": searched, "final": loaded}, None
    if job.held_out is not None:
        with screen.stage("held out"):
            others = held_out(networks, job.held_out, problem.task)
    if job.given is not None:
        networks["given"] = job.given
    with screen.stage("test"):
        found, values = {}, {}
        for name, net in networks.items():
            found[name], values[name] = measure(net, data.test, problem.task)

    costs = reporting.costs_of(problem, result.policy)
    if onnx is not None:
        onnx["claimed"] = reporting.claimed_speed(costs)
    blocks, given = getattr(data.test, "blocks", None), None
    if "given" in found:
        given = {
            "metrics": found.pop("given"),
            "differences": reporting.differences(values, blocks, of=("original", "final"), to="given"),
        }
    report = {
        "metric": problem.task.metric,
        "metrics": {name: values[problem.task.metric] for name, values in found.items()},
        "metrics_in_full": found,
        "held_out": others,
        "differences": reporting.differences(values, blocks),
        "given": given,
        "bytes": {
            "original": costs["size"]["original"] / 8,
            "claimed": costs["size"]["final"] / 8,
            "on_disk": path.stat().st_size,
        },
        "onnx": onnx,
        "costs": costs,
        "budget": problem.budget.limits,
        "search_score": asdict(result.score),
        "control": None if comparison is None else comparison.to_json(),
        "evaluations": result.evaluations,
        "seconds": screen.seconds,
        "seed": cfg.seed,
        "policy": result.policy.digest(),
        "layers": reporting.layers_of(network, result.policy),
        "versions": reporting.versions(),
        "machine": reporting.machine(),
    }
    write_text(folder / REPORT, json.dumps(report, indent=1, default=float))
    (folder / TUNING).unlink(missing_ok=True)
    reporting.show(report, screen.console)
    screen.say(f"written to {folder}")


def _shipped(
    cfg: DictConfig, job: Prepared, policy: CompressionPolicy, final: fx.GraphModule, folder: Path, screen: Screen
) -> tuple[Path, dict[str, Any] | None]:
    """The packed file, and what is to be told of model.onnx; None without one."""
    with screen.stage("ship"):
        path = ship(final, folder)
        if not cfg.onnx:
            return path, None
        images = torch.cat([x for x, *_ in take(job.data.calibration, ONNX_IMAGES)])
        try:
            ship(final, folder, images=images, onnx=pad(final, job.network, policy, cfg.onnx_multiple))
            shipped, original = (folder / ONNX).read_bytes(), float_onnx(job.original.module, images)
        except AjpqError as error:
            screen.say(str(error))
            return ship(final, folder), None
    with screen.stage("test model.onnx"):
        try:
            found = seen(shipped, load(path), job.data.test, job.problem.task)
        except AjpqError as error:
            screen.say(str(error))
            found = {"metric": None, "agreement": None, "failed": str(error)}
    timing = None
    if cfg.timing is not None:
        with screen.stage("measure"):
            timing = measured(original, shipped, images, **cfg.timing)
    return path, {"bytes": len(shipped), "original_bytes": len(original), **found, "timing": timing}


def _check_folder(folder: Path, resumed: bool) -> None:
    """Make a folder ready: of a killed run, or for a new one."""
    record = folder / RECORD
    if resumed:
        remove_parts(folder)
        return
    if record.is_file() and record.stat().st_size:
        raise AjpqError(
            f"a new run must not replace the record of another, but {record} is there; continue it with "
            f"resume={folder} or choose another hydra.run.dir"
        )
    for name in (STATE, SEARCH, TUNING):
        (folder / name).unlink(missing_ok=True)


def _search(
    cfg: DictConfig, folder: Path, screen: Screen, job: Prepared, backend: SearchBackend, control: Control | None
) -> tuple[SearchResult, Comparison | None]:
    now = fingerprint(OmegaConf.to_container(cfg, resolve=True), job, backend)
    if (folder / SEARCH).is_file() or (folder / RECORD).is_file():
        check_same(now, folder)
    else:
        keep(now, folder)
    beside, known = Beside(job.problem, backend, control), getattr(backend, "evaluations", None)
    evaluations = known + len(beside.policies or ()) if known else 0
    return search_in(
        folder, job.problem, backend, seed=cfg.seed, evaluations=evaluations, screen=screen,
        tensorboard=cfg.tensorboard, run=lambda *_: beside.search(),
    )  # fmt: skip
