"""The files of conf/experiment: what they say together, and that a word on the command line is the last."""

from pathlib import Path

import hydra
import pytest

import ajpq

CONF = Path(ajpq.__file__).parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def composed(*overrides, name="config"):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_learns_from_the_original_and_can_be_told_not_to(name):
    cfg = composed(f"experiment={name}")
    assert cfg.finetune.epochs > 0 and cfg.finetune.distillation
    assert any(value is not None for value in cfg.budget.values())
    none = composed(f"experiment={name}", "finetune=none").finetune
    assert none.epochs == 0 and not none.distillation and "lr" not in none


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_comparison_on_an_experiment_trains_nothing_unless_told_to(name):
    assert composed(f"experiment={name}", name="compare").finetune.epochs == 0
    told = composed(f"experiment={name}", "finetune=qat", name="compare").finetune
    assert told.epochs > 0 and told.distillation


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_takes_the_policy_of_an_earlier_run(name):
    search = composed(f"experiment={name}", "search=policy", "search.path=policy.json").search
    assert set(search) == {"_target_", "path"}
