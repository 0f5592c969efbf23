"""The main job: config -> problem -> search -> policy -> fine-tune -> ship -> report. Called by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from ajpq import report as reporting
from ajpq.checkpoint import load_weights, save_weights
from ajpq.compression import compress, freeze
from ajpq.console import Advance, Screen
from ajpq.data import Data, take
from ajpq.errors import AjpqError
from ajpq.files import write_text
from ajpq.finetuning import finetune
from ajpq.memory import keep_freed_memory
from ajpq.problem import Evaluation, Problem, reachable
from ajpq.shipping import load, ship
from ajpq.space import SearchSpace
from ajpq.tracing import trace
from ajpq.training import accuracy, check_settings, fit, recalibrate


def run(cfg: DictConfig, folder: Path) -> None:
    """Run one job; everything it writes goes to `folder`. The test split is read once, at the end.

    Writes original.safetensors (when trained here), evaluations.jsonl (a line per evaluation, at once), policy.json,
    model.safetensors and report.json. An interrupt keeps what there is (during the search policy.json with the best
    policy so far, during fine-tuning the network as it is) and passes on.
    """
    screen = Screen()
    keep_freed_memory()
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parts = {
        name: instantiate(cfg[name], _convert_="all")
        for name in ("data", "model", "choices", "costs", "importance", "reward", "evaluator", "search")
    }
    data: Data = parts["data"]
    recipes = {name: instantiate(cfg[name], _convert_="all") for name in ("train", "finetune")}
    for recipe in recipes.values():
        check_settings(**recipe)
    check = getattr(getattr(parts["evaluator"], "func", None), "check", None)
    if check is not None:
        check(**parts["evaluator"].keywords)
    limits = _limits(cfg.budget)
    if cfg.checkpoint is not None:
        load_weights(parts["model"], cfg.checkpoint)
    model, images = parts["model"].eval(), next(iter(data.calibration))[0]
    with screen.stage("trace"):
        network = trace(model, images)
    space = SearchSpace(network, parts["choices"], parts["importance"])
    reachable(space, limits, parts["costs"])  # a budget that cannot be met is told before anything is spent
    if cfg.checkpoint is None:
        _train(model, recipes["train"], cfg.seed, data, screen, folder)
        network = trace(model, images)
    screen.say(str(network))

    record = folder / "evaluations.jsonl"
    backend, limit = parts["search"], getattr(parts["search"], "evaluations", None)
    with screen.stage("prepare"):
        problem = Problem(
            network,
            data.calibration,
            take(data.search, cfg.search_images),
            limits,
            choices=parts["choices"],
            costs=parts["costs"],
            importance=parts["importance"],
            reward=parts["reward"],
            norm_images=cfg.norm_images,
            evaluator=parts["evaluator"],
        )
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
    settings = recipes["finetune"]
    teacher = model if settings.pop("distillation") else None
    try:
        write_text(folder / "policy.json", result.policy.to_json())
        with screen.stage("fine-tune", settings["epochs"]) as advance:
            final = finetune(student, data.train, teacher=teacher, seed=cfg.seed, **settings, on_epoch=_epochs(advance))
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


def _train(model: nn.Module, recipe: Mapping[str, Any], seed: int, data: Data, screen: Screen, folder: Path) -> None:
    with screen.stage("train", recipe["epochs"]) as advance:
        fit(model, data.train, seed=seed, **recipe, on_epoch=_epochs(advance))
    save_weights(model.eval(), folder / "original.safetensors")


def _epochs(advance: Advance) -> Callable[[int, dict], None]:
    return lambda epoch, row: advance(epoch, f"loss {row['loss']:.4f} train accuracy {row['train_accuracy']:.4f}")


def _limits(budget: Mapping[str, Any]) -> dict[str, float]:
    """The costs that have a limit. Raises AjpqError where one is not a number."""
    limits = {str(name): value for name, value in budget.items() if value is not None}
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise AjpqError(
                f"a budget must be a fraction in (0, 1] or null, but budget.{name} is {value!r}; write "
                f"budget.{name}=0.1"
            )
    return limits


def _row(evaluation: Evaluation) -> dict[str, Any]:
    score = evaluation.score
    return {
        "number": evaluation.number,
        "policy": evaluation.policy.digest(),
        "reward": score.reward,
        "accuracy": score.accuracy,
        "ratios": dict(score.ratios),
        "within": score.within,
        "images": score.images,
        "whole": score.whole,
        "seconds": round(evaluation.seconds, 3),
    }
