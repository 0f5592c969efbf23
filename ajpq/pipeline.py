"""The main job: config -> problem -> search -> policy -> fine-tune -> ship -> report. Called by the command line."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import fx

from ajpq import report as reporting
from ajpq.compression import compress, freeze
from ajpq.console import Pace, Screen
from ajpq.correction import correct
from ajpq.data import take
from ajpq.errors import AjpqError
from ajpq.files import remove_parts, write_text
from ajpq.finetuning import finetune
from ajpq.policy import CompressionPolicy
from ajpq.preparing import Prepared, epochs, prepare
from ajpq.problem import Evaluation, SearchBackend, SearchResult
from ajpq.record import RECORD, Record
from ajpq.resume import REPORT, SEARCH
from ajpq.scalars import Scalars
from ajpq.shipping import load, ship
from ajpq.snapshot import STATE, Keeper, check_same, fingerprint, keep, load_state
from ajpq.training import accuracy, recalibrate


def run(cfg: DictConfig, folder: Path) -> None:
    """Run one job; everything it writes goes to `folder`. The test split is read once, at the end.

    Writes original.safetensors (when trained here), search.json (what the search depends on), evaluations.jsonl (a line
    per evaluation, at once), search.pt (the state of the search, now and then), policy.json, model.safetensors and
    report.json. An interrupt keeps what there is (during the search policy.json with the best policy so far, during
    fine-tuning the network as it is) and passes on. With `cfg.resume`, a run that was killed in `folder` goes on.
    Raises AjpqError where it would replace a record, or continue another search.
    """
    screen = Screen()
    backend = instantiate(cfg.search, _convert_="all")  # its errors come before anything is spent
    _check_folder(folder, resumed=cfg.resume is not None)
    job = prepare(cfg, folder, screen)
    data, model, network, problem = job.data, job.model, job.network, job.problem
    try:
        result = _search(cfg, folder, screen, job, backend)
    except KeyboardInterrupt:
        if problem.best is not None:
            write_text(folder / "policy.json", problem.best.policy.to_json())
        raise
    finally:
        problem.close()
    student = _corrected(cfg, job, result.policy)
    settings = dict(job.finetune)
    teacher = model if settings.pop("distillation") else None
    try:
        write_text(folder / "policy.json", result.policy.to_json())
        with screen.stage("fine-tune", settings["epochs"]) as advance:
            final = finetune(student, data.train, teacher=teacher, seed=cfg.seed, **settings, on_epoch=epochs(advance))
    except KeyboardInterrupt:
        recalibrate(student, data.calibration)
        ship(freeze(student), folder)
        raise
    with screen.stage("ship"):
        path = ship(final, folder)
        loaded = load(path)
    with screen.stage("test"):
        searched = _corrected(cfg, job, result.policy)
        metrics = {
            name: accuracy(net, data.test)
            for name, net in (("original", model), ("searched", searched), ("final", loaded))
        }

    costs = reporting.costs_of(problem, result.policy)
    report = {
        "metrics": metrics,
        "bytes": {
            "original": costs["size"]["original"] / 8,
            "claimed": costs["size"]["final"] / 8,
            "on_disk": path.stat().st_size,
        },
        "costs": costs,
        "budget": problem.budget.limits,
        "search_score": asdict(result.score),
        "evaluations": result.evaluations,
        "seconds": screen.seconds,
        "seed": cfg.seed,
        "policy": result.policy.digest(),
        "layers": reporting.layers_of(network, result.policy),
        "versions": reporting.versions(),
        "machine": reporting.machine(),
    }
    write_text(folder / REPORT, json.dumps(report, indent=1, default=float))
    reporting.show(report, screen.console)
    screen.say(f"written to {folder}")


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
    for name in (STATE, SEARCH):
        (folder / name).unlink(missing_ok=True)


def _search(cfg: DictConfig, folder: Path, screen: Screen, job: Prepared, backend: SearchBackend) -> SearchResult:
    problem = job.problem
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # a resumed run has not trained the network
        seed(cfg.seed)
    settings = OmegaConf.to_container(cfg, resolve=True)
    now = fingerprint(settings, job, backend)
    if (folder / SEARCH).is_file() or (folder / RECORD).is_file():
        check_same(now, folder)
    else:
        keep(now, folder)
    record = Record(folder / RECORD)
    scalars = None
    try:
        done, fault = load_state(folder / STATE, backend, record.rows)
        if fault:
            screen.say(f"{folder / STATE} cannot be used ({fault}): the search is replayed from its record")
        problem.recall(record.rows, done)
        if record.rows:
            screen.say(f"resumed after {len(record.rows)} evaluations")
        scalars = _scalars(cfg, folder, screen, done + 1)
        if scalars is not None:
            scalars.evaluations(record.rows, done + 1)
            problem.on_scalar = scalars.scalar
        keeper = Keeper(folder / STATE, problem, before=scalars.flush if scalars else None)
        problem.checkpoint = keeper
        with screen.stage("search", getattr(backend, "evaluations", None) or 0) as advance:
            pace = Pace()

            def log(evaluation: Evaluation) -> None:
                row = record.append(evaluation)
                best = problem.best.score.reward if problem.best else None
                if scalars is not None:
                    scalars.evaluation(row, best)
                advance(evaluation.number, pace.note(best))

            problem.on_evaluation = log
            return backend.search(problem)
    finally:
        record.close()
        if scalars is not None:
            scalars.close()


def _scalars(cfg: DictConfig, folder: Path, screen: Screen, first: int) -> Scalars | None:
    if not cfg.tensorboard:
        return None
    try:
        return Scalars(folder, first)
    except AjpqError as error:
        screen.say(str(error))
        return None


def _corrected(cfg: DictConfig, job: Prepared, policy: CompressionPolicy) -> fx.GraphModule:
    """The compressed network as the evaluator measures it."""
    student = compress(job.network, policy, job.problem.calibration)
    if cfg.norm_images:
        correct(student, job.original, policy, take(job.data.calibration, cfg.norm_images), cfg.correction)
    return student
