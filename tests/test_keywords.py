"""Settings of a wrong name or type are told before anything is spent."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import hydra
import pytest
import torch
from command import ajpq, one_sentence
from omegaconf import OmegaConf
from torch import nn

from ajpq.console import Screen
from ajpq.data import Data
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.keywords import agrees, check_keywords, check_targets, hints_of
from ajpq.preparing import MORE, RECIPES, TAKEN, prepare
from ajpq.problem import Problem
from ajpq.training import fit

RIGHT = (
    (3, int), (3, float), (0.5, float), (None, int | None), (True, bool), ("a", str), ("a", str | Path),
    ([1, 2], Sequence[int]), ([1, 2.5], tuple[float, ...]), ([64, 3], tuple[int, int]), ("max", Literal["max"] | int),
    ({"a": 1}, Mapping[str, float]), ({"_target_": "torch.nn.ReLU"}, int), ("???", int), ("${seed}", int),
    ([1], object),
)  # fmt: skip
WRONG = (
    (True, int), (3.0, int), ("3", float), (None, int), (1, bool), ("yes", bool), (3, str), ("12", Sequence[int]),
    ([1, 2.5], Sequence[int]), ([64], tuple[int, int]), ("min", Literal["max"] | int),
    ({"a": "b"}, Mapping[str, float]),
)  # fmt: skip


def test_values_agree_with_types():
    assert [pair for pair in RIGHT if not agrees(*pair)] == []
    assert [pair for pair in WRONG if agrees(*pair)] == []


def test_types_are_those_of_the_signature():
    hints = hints_of(fit)
    assert hints["epochs"] is int and hints["clip_grad"] == float | None and hints["momentum"] is float


def composed(*overrides: str):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def test_every_choice_of_the_configuration_has_the_right_types():
    for file in sorted(CONF.glob("*/*.yaml")):
        if file.parent.name not in ("experiment", "study"):
            check_targets(OmegaConf.to_container(composed(f"{file.parent.name}={file.stem}")))


@pytest.mark.parametrize("group", RECIPES)
def test_every_recipe_of_the_configuration_has_keywords_that_exist(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        recipe = OmegaConf.to_container(composed(f"{group}={file.stem}")[group])
        check_keywords(group, recipe, *RECIPES[group], taken=TAKEN, **MORE.get(group, {}))


@pytest.mark.parametrize(
    "override, words",
    (
        ("search.evaluations=null", "`search.evaluations` must be a whole number, but it is null"),
        ("search.start.evaluations=many", "`search.start.evaluations` must be a whole number.*, but it is 'many'"),
        ("search.net_arch=64", "`search.net_arch` must be a list, each a whole number, but it is 64"),
        ("evaluator.workers=all", "`evaluator.workers` must be a whole number or null, but it is 'all'"),
        ("choices.weight_bits=8", "`choices.weight_bits` must be a list"),
    ),
)
def test_keywords_of_parts(override, words):
    with pytest.raises(AjpqError, match=words):
        check_targets(OmegaConf.to_container(composed("+search.start.evaluations=1", override)))


@pytest.mark.parametrize(
    "override, words",
    (
        ("+finetune.epoch=1", "`finetune.epoch` must be a keyword of .*finetune, but .*; did you mean `epochs`"),
        ("+finetune.seed=1", "there is no `seed`"),
        ("+train.frozen_norms=1", "`train.frozen_norms` must be a keyword of ajpq.training.fit"),
        ("finetune.weight_decay=some", "`finetune.weight_decay` must be a number, but it is 'some'"),
        ("finetune.distillation=some", "`finetune.distillation` must be true or false"),
        ("finetune.features=lots", "`finetune.features` must be a number"),
        ("weights.steps=2.5", "`weights.steps` must be a whole number, but it is 2.5"),
        ("checkpoint=5", "`checkpoint` must be text or null"),
        ("onnx=maybe", "`onnx` must be true or false"),
        ("seed=null", "`seed` must be a whole number, but it is null"),
        ("seed=4294967296", "seed < 2"),
        ("budget=0.1", "write budget.size=0.1"),
        ("budget=null", "write budget.size=0.1"),
    ),
)
def test_settings_of_the_job(tmp_path, override, words):
    with pytest.raises(AjpqError, match=words):
        prepare(composed(override), tmp_path, Screen())
    assert not list(tmp_path.iterdir())


def some(count: int = 2) -> list:
    return [(torch.zeros(2, 1, 8, 8), torch.arange(2))] * count


def own_data(**splits) -> Data:
    return Data(
        **{"train": some(), "search": some(), "test": some(), "calibration": some()} | splits, classes=("a", "b")
    )


PARTS = {
    "tensor": lambda: torch.zeros(3),
    "no test": lambda: own_data(test=[]),
    "search once": lambda: own_data(search=iter(some())),
    "calibration of nothing": lambda: own_data(calibration=None),
}


def make(name: str):
    return PARTS[name]()


@pytest.mark.parametrize(
    "group, name, words",
    (
        ("data", "tensor", "`data` must make what ajpq.data.Data describes, but .* makes Tensor"),
        ("model", "tensor", "`model` must make what torch.nn.modules.module.Module describes"),
        ("task", "tensor", "`task` must make what ajpq.tasks.Task describes"),
        ("data", "no test", "the test split must hold images, but it has no batch"),
        ("data", "search once", "the search split is read more than once, but list_iterator"),
        ("data", "calibration of nothing", "the calibration split must be batches"),
    ),
)
def test_parts_of_users(tmp_path, group, name, words):
    with pytest.raises(AjpqError, match=words):
        prepare(composed(f"~{group}", f"+{group}={{_target_: {__name__}.make, name: {name}}}"), tmp_path, Screen())
    assert not list(tmp_path.iterdir())


def test_a_problem_needs_images_that_stay():
    with pytest.raises(AjpqError, match="the calibration split must hold images"):
        Problem(nn.Conv2d(1, 2, 3), [], some(), {"size": 0.5})
    with pytest.raises(AjpqError, match="the search split is read more than once"):
        Problem(nn.Conv2d(1, 2, 3), some(), iter(some()), {"size": 0.5})


def test_the_command_says_so(tmp_path):
    said = one_sentence(ajpq(tmp_path, "search.evaluations=null"))
    assert "`search.evaluations` must be a whole number, but it is null" in said
    assert not list(tmp_path.iterdir())
