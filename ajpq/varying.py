"""The job of `ajpq-variance`: homogeneous, random and searched policies of one cost, each trained several times."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ajpq.budget import Budget
from ajpq.comparing import entries_of
from ajpq.console import Screen
from ajpq.errors import AjpqError
from ajpq.files import remove_parts, write_text
from ajpq.policy import CompressionPolicy
from ajpq.preparing import SHARED, TRAINED, Prepared, prepare
from ajpq.problem import Problem, default_costs
from ajpq.record import RECORD
from ajpq.snapshot import changed
from ajpq.trials import POLICY, Tuner, is_whole, trial
from ajpq.variance import HOMOGENEOUS, Trial, Variance

SETTINGS, RANDOM = "variance.yaml", "random"
FREE = {"threads", "tensorboard", "onnx", "onnx_multiple", "timing"}  # keys that may differ when a study goes on


def run(cfg: DictConfig, folder: Path) -> None:
    """For every width of `cfg.grid`: the homogeneous policy of that width, a random one per seed within `tolerance` of
    its cost, and per search and seed the best one that costs no more. With fine-tuning each is trained once per number
    of `repeats` and measured on the test split, otherwise scored on the search split.

    Writes `<point>/<kind>/...` as a comparison does (`ajpq.comparing`), and after every point variance.json,
    variance.md and variance.png. In a folder where some of that is there it goes on. Raises AjpqError, before anything
    is spent, for bad settings and for a folder made with others.
    """
    screen = Screen()
    entries, points = entries_of(cfg), _grid(cfg)
    for entry in entries:
        entry.backend(next(iter(entry.settings)))  # its errors come before anything is spent
    if names := {entry.name for entry in entries} & {HOMOGENEOUS, RANDOM}:
        raise AjpqError(
            f"a search must not be named {names.pop()!r}, as the study has a control of that name; rename it"
        )
    known = {**default_costs(), **instantiate(cfg.costs, _convert_="all")}
    if cfg.cost not in known:
        raise AjpqError(f"cost must be one of {', '.join(known)}, but it is {cfg.cost!r}; choose one")
    job = _prepared(cfg, folder, screen)
    problem = job.problem
    judge, trials = _Judge(cfg, job, folder, screen), []
    policies = {point: problem.space.homogeneous(*said) for point, said in points.items()}
    ratios = {point: problem.budget.ratios(policy)[cfg.cost] for point, policy in policies.items()}
    spend = partial(trial, screen=screen, tensorboard=cfg.tensorboard)
    low, high = 1 - cfg.tolerance, 1 + cfg.tolerance
    try:
        for point, ratio in ratios.items():
            trials.append(judge.of(policies[point], point, HOMOGENEOUS, None))
            for seed in cfg.seeds:
                backend = instantiate(cfg.random, evaluations=1, seed=seed, least=low / high, cost=cfg.cost)
                place, near = folder / point / RANDOM / f"seed={seed}", min(ratio * high, 1.0)
                if not is_whole(place):
                    spend(place, at(problem, cfg.cost, near), backend, 1, seed, f"{point}, random, seed {seed}")
                trials.append(judge.of(_policy_in(place), point, RANDOM, seed))
            for entry in entries:
                for seed in entry.settings:
                    place = folder / point / entry.folder(seed)
                    if not is_whole(place):
                        here, title = at(problem, cfg.cost, ratio), f"{point}, {entry.title(seed)}"
                        spend(place, here, entry.backend(seed), cfg.evaluations, seed or 0, title)
                    trials.append(judge.of(_policy_in(place), point, entry.name, seed))
            study = Variance(trials, cfg.cost, judge.split)
            write_text(folder / "variance.json", json.dumps(study.summary(), indent=1))
            write_text(folder / "variance.md", study.table())
            study.plot(folder / "variance.png")
    except KeyboardInterrupt:
        screen.say(f"to go on, add hydra.run.dir={folder} to the same command")
        raise
    finally:
        problem.close()
    screen.say((folder / "variance.md").read_text())
    screen.say(f"written to {folder}")


def at(problem: Problem, cost: str, ratio: float) -> Problem:
    """The same problem with an empty record and one budget. Raises AjpqError if that cannot be met."""
    twin = problem.again()
    twin.budget = Budget(problem.network, problem.budget.costs, {cost: ratio}, problem.space.cheapest())
    return twin


class _Judge:
    """Accuracies of a policy."""

    def __init__(self, cfg: DictConfig, job: Prepared, folder: Path, screen: Screen) -> None:
        self.cfg, self.job, self.trained = cfg, job, bool(job.finetune["epochs"])
        self.split = "test" if self.trained else "search"
        fresh = partial(instantiate, cfg.data, _convert_="all")
        self.tuner = Tuner(job, folder, fresh, screen)

    def of(self, policy: CompressionPolicy, point: str, kind: str, seed: int | None) -> Trial:
        title = f"{point}, {kind}" + ("" if seed is None else f", seed {seed}")
        if self.trained:
            found = [self.tuner.test(policy, number, f"{title}, repeat {number}") for number in self.cfg.repeats]
        else:
            found = [self.job.problem.score(policy).accuracy]
        ratio = self.job.problem.budget.ratios(policy)[self.cfg.cost]
        return Trial(point, kind, seed, policy.digest(), ratio, found)


def _policy_in(place: Path) -> CompressionPolicy:
    if not (place / POLICY).is_file():
        raise AjpqError(
            f"every search of the study must find a policy within budget, but that in {place} found none; give it more "
            "evaluations or leave it out"
        )
    return CompressionPolicy.from_json((place / POLICY).read_text())


# -- settings ---------------------------------------------------------------------------------------------------------


def _grid(cfg: DictConfig) -> dict[str, tuple[int, float, int]]:
    """Name of a point -> arguments of `SearchSpace.homogeneous`. Raises AjpqError."""
    choices = instantiate(cfg.choices, _convert_="all")
    for key in ("grid", "repeats"):
        if not OmegaConf.is_list(cfg[key]) or not cfg[key]:
            raise AjpqError(f"{key} must be a list of at least one, but it is {cfg[key]}; write {key}=[2,4]")
    repeats = OmegaConf.to_container(cfg.repeats)
    if len(set(map(str, repeats))) < len(repeats) or not all(isinstance(n, int) and n >= 0 for n in repeats):
        raise AjpqError(f"repeats must be different whole numbers, but they are {repeats}; write repeats=[0,1,2]")
    if not (isinstance(cfg.tolerance, (int, float)) and 0 < cfg.tolerance < 1):
        raise AjpqError(f"0 < tolerance < 1 must hold, but it is {cfg.tolerance}; write tolerance=0.1")
    points: dict[str, tuple[int, float, int]] = {}
    for said in OmegaConf.to_container(cfg.grid):
        width, act = said if isinstance(said, list) and len(said) == 2 else (said, choices.act_bits[-1])
        if width not in choices.weight_bits or not width or act not in choices.act_bits:
            raise AjpqError(
                f"a point of the grid must be a width above 0 of the choices {choices.weight_bits}, or a width and "
                f"one of inputs out of {choices.act_bits}, but it is {said}; write grid=[2,4] or grid=[[2,4]]"
            )
        points[f"w{width}a{act}"] = (width, 0.0, act)
    return points


def _prepared(cfg: DictConfig, folder: Path, screen: Screen) -> Prepared:
    """The problem. Raises AjpqError in a folder of another run, or of a study with other settings."""
    path, plain = folder / SETTINGS, OmegaConf.to_container(cfg, resolve=True)
    ours: dict[str, Any] = {key: value for key, value in plain.items() if key not in FREE}
    remove_parts(folder)
    if not path.is_file():
        if any((folder / name).exists() for name in (TRAINED, SHARED, RECORD)):
            raise AjpqError(
                f"a study must have a folder of its own, but {folder} holds another run; choose another hydra.run.dir"
            )
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(ours)))
        try:
            return prepare(cfg, folder, screen)
        except Exception:
            if not any((folder / name).exists() for name in (TRAINED, SHARED)):
                path.unlink()  # a command that did nothing leaves nothing
            raise
    if change := changed(OmegaConf.to_container(OmegaConf.load(path)), ours, f" in {folder}"):
        raise AjpqError(
            f"a study can go on only with its own settings, but {change}; set it back or choose another hydra.run.dir"
        )
    return prepare(cfg, folder, screen)
