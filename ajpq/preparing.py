"""config -> problem: everything of a job up to its search, shared by all commands."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import fx, nn

from ajpq import packing, sharing
from ajpq.budget import Budget
from ajpq.checkpoint import load_weights, save_weights
from ajpq.compression import compress
from ajpq.console import Advance, Screen
from ajpq.correction import Correction, advice, check_correction
from ajpq.data import Data
from ajpq.epochs import skip
from ajpq.errors import AjpqError, check_counts
from ajpq.features import survivors
from ajpq.finetuning import finetune
from ajpq.keywords import check_keywords, check_type
from ajpq.loaders import Batches, check_batches, join, take
from ajpq.memory import keep_freed_memory
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import CALIBRATION_IMAGES, Problem, reachable
from ajpq.reconstruction import reconstruct
from ajpq.rewards import check_risk
from ajpq.space import Choices, SearchSpace
from ajpq.tasks import Task, check_task
from ajpq.tracing import trace
from ajpq.training import check_settings, count_of, fit

PARTS = ("task", "data", "model", "choices", "costs", "importance", "reward", "evaluator")
MADE = {"task": Task, "data": Data, "model": nn.Module, "choices": Choices}
RECIPES = {"train": (fit,), "weights": (sharing.share,), "finetune": (fit, finetune)}  # what takes their keywords
TAKEN = frozenset(  # those that are no settings
    "model batches network draw calibration train student teacher kept unlabelled task seed also checkpoint change"
    " on_epoch on_step".split()
)
MORE = {"train": {"start": str | None}, "finetune": {"distillation": bool, "splits": list[str]}}
TRAIN = ["train"]  # splits that a found network learns from, unless it is told otherwise
TYPES = {
    "seed": int, "threads": int | None, "checkpoint": str | None, "resume": str | None, "onnx": bool,
    "onnx_multiple": int, "timing": dict | None, "tensorboard": bool, "search_images": int | None,
    "norm_images": int, "reconstruct_images": int, "correction": str,
}  # fmt: skip
TRAINED, SHARED = "original.safetensors", "shared.safetensors"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a search starts from. model: the trained CNN, traced: `original`; `network` may have other weights
    (`ajpq.sharing.share`). given: as its training here found it, None where that did not start from weights.
    finetune: the settings of `tuned`. norm_images, reconstruct_images and correction: see `student`."""

    data: Data
    model: nn.Module
    given: nn.Module | None
    original: Network
    network: Network
    problem: Problem
    finetune: Mapping[str, Any]
    norm_images: int
    correction: str
    reconstruct_images: int

    def student(self, policy: CompressionPolicy) -> fx.GraphModule:
        """The compressed network that fine-tuning starts from: reconstructed from calibration images, or, if there
        are to be none, with its batch-norms as the evaluator corrects them."""
        student, images = compress(self.network, policy, self.problem.calibration), self.data.calibration
        if self.reconstruct_images:
            reconstruct(student, self.original, policy, images, self.reconstruct_images)
        elif self.norm_images:
            Correction(self.original, take(images, self.norm_images), self.correction)(student, policy)
        return student

    @property
    def held_out(self) -> Batches | None:
        """The search split, unless `tuned` learns from it: what settings of `tuned` may be chosen by."""
        learned = self.finetune["epochs"] and "search" in self.finetune.get("splits", TRAIN)
        return None if learned else self.data.search

    def tuned(self, student: fx.GraphModule, policy: CompressionPolicy, data: Data, **options) -> fx.GraphModule:
        """The finished network: `student(policy)` fine-tuned on the splits of `data` that the settings name, by the
        keywords of `ajpq.finetuning.finetune` among them; it learns from the original if `distillation` is set.
        options: more of these keywords."""
        settings = dict(self.finetune)
        teacher, splits = self.model if settings.pop("distillation") else None, settings.pop("splits", TRAIN)
        return finetune(
            student, _images_of(data, splits), teacher=teacher, task=self.problem.task,
            kept=survivors(self.network, policy), unlabelled=data.unlabelled,
            also={"reconstruct_images": self.reconstruct_images, "splits": splits}, **settings, **options,
        )  # fmt: skip


def prepare(cfg: DictConfig, folder: Path, screen: Screen) -> Prepared:
    """Instantiate the parts of a job, load or train its model, and make the problem.

    Whatever is wrong with the settings is told before anything is spent. A model that is trained here is written to
    `folder`/original.safetensors, and read from there if it is there; so are shared weights (shared.safetensors).
    """
    keep_freed_memory()
    _check(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parts = {name: instantiate(cfg[name], _convert_="all") for name in PARTS}
    for name, kind in MADE.items():
        check_made(name, cfg[name], parts[name], kind)
    names = ("weights", "finetune") if cfg.checkpoint else ("train", "weights", "finetune")
    recipes = {name: instantiate(cfg[name], _convert_="all") for name in names}
    for name, recipe in recipes.items():
        check_keywords(name, recipe, *RECIPES[name], taken=TAKEN, **MORE.get(name, {}))
    sharing.check_settings(**recipes["weights"])
    for name in names:
        if name != "weights":
            check_settings(**recipes[name])
    splits = recipes["finetune"].get("splits", TRAIN)
    _check_splits(splits)
    check = getattr(getattr(parts["evaluator"], "func", None), "check", None)
    if check is not None:
        check(**parts["evaluator"].keywords)
    check_risk(getattr(parts["evaluator"], "keywords", {}).get("risk", 0), parts["reward"])
    check_correction(cfg.correction)
    limits, data = limits_of(cfg.budget), parts["data"]
    check_batches(training=data.train, search=data.search, test=data.test, calibration=data.calibration)
    _images_of(data, splits)  # whether they can be joined
    if data.unlabelled is not None and recipes["finetune"]["epochs"] and not recipes["finetune"]["distillation"]:
        raise AjpqError(
            "from images without labels a network learns what the original makes of them, but data.unlabelled is set "
            "and finetune.distillation is false; set it to true, or data.unlabelled=null"
        )
    start = recipes.get("train", {}).pop("start", None)
    if weights := cfg.checkpoint or start:
        load_weights(parts["model"], weights)
    model, (images, targets) = parts["model"].eval(), next(iter(data.calibration))
    with screen.stage("trace"):
        network = trace(model, images)
    given = network.module if start and recipes["train"]["epochs"] else None
    packing.check(network)
    check_task(parts["task"], model, images[:2], targets[:2])
    space = SearchSpace(network, parts["choices"])
    budget = reachable(space, limits, parts["costs"])
    if cfg.checkpoint is None:
        if (folder / TRAINED).is_file():
            load_weights(model, folder / TRAINED)
            skip(data.train, recipes["train"]["epochs"])
        else:
            _train(model, recipes["train"], parts["task"], cfg.seed, data, screen, folder)
        network = trace(model, images)
        space = SearchSpace(network, parts["choices"])
    screen.say(str(network))
    if cfg.norm_images and (told := advice(network, cfg.correction)):
        screen.say(told)
    original = network
    if recipes["weights"]["steps"]:
        network = _share(network, space, budget, recipes["weights"], parts["task"], cfg.seed, data, screen, folder)
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
            original=original,
            correction=cfg.correction,
            task=parts["task"],
            evaluator=parts["evaluator"],
            train=data.train,
        )
    return Prepared(
        data, model, given, original, network, problem, recipes["finetune"], cfg.norm_images, cfg.correction,
        cfg.reconstruct_images,
    )  # fmt: skip


def _images_of(data: Data, splits: Sequence[str]) -> Batches:
    return functools.reduce(join, [getattr(data, split) for split in splits])


def _check_splits(splits: Any) -> None:
    """The test split is read once, at the end, and training images are always learned from."""
    if splits not in (TRAIN, [*TRAIN, "search"]):
        raise AjpqError(
            "a found network is fine-tuned on the training images, or on those of the search, too, once it is over, "
            f"but finetune.splits is {splits!r}; write finetune.splits=[train] or finetune.splits=[train,search]"
        )


def check_made(key: str, cfg: Any, part: Any, kind: type) -> None:
    """Raise AjpqError unless the part that a configuration makes is of a kind."""
    if not isinstance(part, kind):
        raise AjpqError(
            f"`{key}` must make what {kind.__module__}.{kind.__qualname__} describes, but "
            f"{cfg.get('_target_')} makes {type(part).__name__}; set {key}._target_ to what makes it"
        )


def _check(cfg: DictConfig) -> None:
    """What a job is told beside its parts. Raises AjpqError."""
    for name, hint in TYPES.items():
        value = cfg[name]
        check_type(name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, hint)
    check_counts(1, threads=cfg.threads, search_images=cfg.search_images)
    check_counts(0, seed=cfg.seed, norm_images=cfg.norm_images, reconstruct_images=cfg.reconstruct_images)
    if cfg.seed >= 2**32:
        raise AjpqError(f"`seed < 2**32` must hold, as every generator takes it, but seed={cfg.seed}; give another")


def _train(
    model: nn.Module, recipe: Mapping[str, Any], task: Task, seed: int, data: Data, screen: Screen, folder: Path
) -> None:  # fmt: skip
    with screen.stage("train", recipe["epochs"]) as advance:
        fit(model, data.train, seed=seed, task=task, **recipe, on_epoch=epochs(advance))
    save_weights(model.eval(), folder / TRAINED)


def _share(
    network: Network, space: SearchSpace, budget: Budget, recipe: Mapping[str, Any], task: Task, seed: int, data: Data,
    screen: Screen, folder: Path,
) -> Network:  # fmt: skip
    path = folder / SHARED
    if path.is_file():
        module = copy.deepcopy(network.module)
        load_weights(module, path)
        skip(data.train, -(-recipe["steps"] // count_of(data.train)))
        return replace(network, module=module)
    images = take(data.calibration, CALIBRATION_IMAGES)
    with screen.stage("share", recipe["steps"]) as advance:
        shared = sharing.share(
            network, sharing.sampler(space, budget), images, data.train, seed=seed, task=task, **recipe,
            on_step=lambda step, loss: advance(step, f"loss {loss:.4f}"),
        )  # fmt: skip
    save_weights(shared.module, path)
    return shared


def epochs(advance: Advance) -> Callable[[int, dict], None]:
    """A training's `on_epoch` that moves a bar."""
    return lambda epoch, row: advance(epoch, f"loss {row['loss']:.4f} train accuracy {row['train_accuracy']:.4f}")


def limits_of(budget: Mapping[str, Any]) -> dict[str, float]:
    """The costs that have a limit. Raises AjpqError where one is not a number."""
    if not isinstance(budget, Mapping | DictConfig):
        raise AjpqError(f"a budget must limit costs by their names, but budget is {budget!r}; write budget.size=0.1")
    limits = {str(name): value for name, value in budget.items() if value is not None}
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise AjpqError(
                f"a budget must be a fraction in (0, 1] or null, but budget.{name} is {value!r}; write "
                f"budget.{name}=0.1"
            )
    return limits
