"""The main job: config -> problem -> search -> policy -> fine-tune -> ship -> report. Called by the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ajpq import report as reporting
from ajpq.compression import compress, freeze
from ajpq.console import Screen
from ajpq.data import take
from ajpq.files import write_text
from ajpq.finetuning import finetune
from ajpq.preparing import epochs, prepare
from ajpq.problem import Evaluation
from ajpq.shipping import load, ship
from ajpq.training import accuracy, recalibrate


def run(cfg: DictConfig, folder: Path) -> None:
    """Run one job; everything it writes goes to `folder`. The test split is read once, at the end.

    Writes original.safetensors (when trained here), evaluations.jsonl (a line per evaluation, at once), policy.json,
    model.safetensors and report.json. An interrupt keeps what there is (during the search policy.json with the best
    policy so far, during fine-tuning the network as it is) and passes on.
    """
    screen = Screen()
    backend = instantiate(cfg.search, _convert_="all")  # its errors come before anything is spent
    job = prepare(cfg, folder, screen)
    data, model, network, problem = job.data, job.model, job.network, job.problem
    record, limit = folder / "evaluations.jsonl", getattr(backend, "evaluations", None)
    try:
        with screen.stage("search", limit or 0) as advance, record.open("a") as lines:

            def log(evaluation: Evaluation) -> None:
                lines.write(json.dumps(_row(evaluation)) + "\n")
                lines.flush()
                best = problem.best
                advance(evaluation.number, f"best {best.score.reward:.4f}" if best else "best -")

            problem.on_evaluation = log
            result = backend.search(problem)
    except KeyboardInterrupt:
        if problem.best is not None:
            write_text(folder / "policy.json", problem.best.policy.to_json())
        raise
    finally:
        problem.close()
    student = compress(network, result.policy, problem.calibration)
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
        searched = compress(network, result.policy, problem.calibration)
        if cfg.norm_images:
            recalibrate(searched, take(data.calibration, cfg.norm_images))
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
    write_text(folder / "report.json", json.dumps(report, indent=1, default=float))
    reporting.show(report, screen.console)
    screen.say(f"written to {folder}")


def _row(evaluation: Evaluation) -> dict[str, Any]:
    score = evaluation.score
    return {
        "number": evaluation.number,
        "policy": evaluation.policy.digest(),
        "reward": score.reward,
        "accuracy": score.accuracy,
        "cross_entropy": score.cross_entropy,
        "divergence": score.divergence,
        "ratios": dict(score.ratios),
        "within": score.within,
        "images": score.images,
        "whole": score.whole,
        "seconds": round(evaluation.seconds, 3),
    }
