"""The study of variance: its statistics by hand, its random policies, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hydra
import numpy as np
import pytest
from nets import problem_of

from agents.nearby import Nearby
from ajpq import varying
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.space import Choices
from ajpq.testing import check_backend
from ajpq.variance import HOMOGENEOUS, Trial, Variance

SMALL = (
    "grid=[2,4]", "seeds=[0,1]", "train.epochs=1", "evaluations=6", "search_images=50", "norm_images=50", "threads=1",
    "tensorboard=false",
)  # fmt: skip


def study() -> Variance:
    trials = [
        Trial("2 bits", HOMOGENEOUS, None, "a", 0.10, [0.80, 0.84]),
        Trial("2 bits", "random", 0, "b", 0.11, [0.70, 0.72]),
        Trial("2 bits", "random", 1, "c", 0.09, [0.80, 0.86]),
        Trial("4 bits", HOMOGENEOUS, None, "d", 0.20, [0.9]),
        Trial("4 bits", "filter_nas", 0, "e", 0.20, [0.95]),
        Trial("4 bits", "filter_nas", 1, "f", 0.19, [0.97]),
    ]
    return Variance(trials, "bops", "test")


def test_spreads_by_hand() -> None:
    found = study().spread("2 bits", "random")
    assert (found.policies, found.mean, found.ratio) == (2, pytest.approx(0.77), pytest.approx(0.10))
    assert found.between == pytest.approx(0.12 / math.sqrt(2))  # of the means 0.71 and 0.83
    assert found.repeats == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * 0.03**2) / 2))
    assert found.all == pytest.approx(np.std([0.70, 0.72, 0.80, 0.86], ddof=1))
    one = study().spread("2 bits", HOMOGENEOUS)
    assert math.isnan(one.between) and one.repeats == one.all == pytest.approx(0.04 / math.sqrt(2))
    alone = study().spread("4 bits", HOMOGENEOUS)
    assert alone.mean == 0.9 and all(map(math.isnan, (alone.half, alone.between, alone.repeats, alone.all)))


def test_differences_are_between_policies_and_between_repeats_of_one() -> None:
    found = study().differences()
    assert set(found) == {("2 bits", "random", HOMOGENEOUS), ("4 bits", "filter_nas", HOMOGENEOUS)}
    drawn = found["2 bits", "random", HOMOGENEOUS]
    assert drawn.method == "Welch" and drawn.mean == pytest.approx(-0.05) and drawn.word == "no better"
    searched = found["4 bits", "filter_nas", HOMOGENEOUS]
    assert searched.method == "Welch" and searched.mean == pytest.approx(0.06) and searched.word is None  # one training
    scored = Variance([trial for trial in study().trials if trial.point == "4 bits"], "bops", "search").differences()
    assert scored["4 bits", "filter_nas", HOMOGENEOUS].method == "one-sample"  # what is only scored is known exactly
    repeated = [Trial("p", kind, None, kind, 0.1, [0.8, 0.9]) for kind in (HOMOGENEOUS, "lp")]
    assert Variance(repeated, "bops", "test").differences()["p", "lp", HOMOGENEOUS].method == "Welch"


def test_the_table_and_the_summary_say_the_same(tmp_path: Path) -> None:
    table, summary = study().table(), study().summary()
    rows = [line for line in table.splitlines() if line.startswith(("| 2", "| 4"))]
    assert len(rows) == len(summary["spreads"]) == 4 and len(summary["trials"]) == 6
    assert "| 2 bits | random | 2 | 0.1000 | 0.7700 +-" in rows[1] and "| 0.0849 |" in rows[1]
    assert "- 2 bits: `random` is no better than `homogeneous`: -0.0500 +-" in table
    assert summary["spreads"][2]["between"] is None and json.loads(json.dumps(summary)) == summary
    study().plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


# -- random policies --------------------------------------------------------------------------------------------------


def test_nearby_keeps_the_rules_of_backends() -> None:
    check_backend(Nearby)


@pytest.mark.parametrize("least", (0.8, 0.98))
def test_nearby_policies_are_in_their_band_and_heterogeneous(least: float) -> None:
    problem = problem_of(budget={"bops": 0.03}, choices=Choices(act_bits=(4, 8), first_last=None))
    result = Nearby(8, 0, least).search(problem)
    ratios = [e.score.ratios["bops"] / 0.03 for e in result.history]
    assert len(ratios) == 8 and min(ratios) >= least and max(ratios) <= 1 + 1e-9
    assert np.ptp(ratios) > 0.5 * (1 - least)  # all of the band
    for evaluation in result.history:
        bits = np.concatenate(list(evaluation.policy.weight_bits.values()))
        assert bits.min() > 0 and len(set(bits.tolist())) > 3
    assert {e.policy.digest() for e in Nearby(8, 1, least).search(problem.again()).history}.isdisjoint(
        e.policy.digest() for e in result.history
    )


def test_nearby_tells_what_it_cannot() -> None:
    with pytest.raises(AjpqError, match="0 <= least < 1 must hold"):
        Nearby(least=1.0)
    with pytest.raises(AjpqError, match="'macs' is none of size"):
        Nearby(cost="macs").search(problem_of())
    with pytest.raises(AjpqError, match="bops must reach 0.9 of its budget, but no decision can be raised"):
        Nearby(least=0.9).search(problem_of(budget={"bops": 1.0}))


# -- the command ------------------------------------------------------------------------------------------------------


def run(folder: Path, *overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        varying.run(hydra.compose("variance", list(overrides)), folder)
    return json.loads((folder / "variance.json").read_text())


@pytest.mark.slow
def test_the_study_measures_every_policy_as_often_as_it_is_told(tmp_path: Path) -> None:
    options = (*SMALL, "grid=[2]", "repeats=[0,1]", "finetune.epochs=1")
    found = run(tmp_path, *options)
    assert found["split"] == "test" and found["cost"] == "bops"
    assert [(t["kind"], t["seed"], len(t["accuracies"])) for t in found["trials"]] == [
        ("homogeneous", None, 2), ("random", 0, 2), ("random", 1, 2), ("filter_nas", 0, 2), ("filter_nas", 1, 2),
    ]  # fmt: skip
    homogeneous, random, _, *searched = (t["ratio"] for t in found["trials"])
    assert 0.9 * homogeneous <= random <= 1.1 * homogeneous
    assert all(ratio <= homogeneous * (1 + 1e-9) for ratio in searched)
    by_kind = {row["kind"]: row for row in found["spreads"]}
    assert by_kind["random"]["between"] is not None and by_kind["random"]["repeats"] is not None
    for name in ("variance.md", "variance.png"):
        assert (tmp_path / name).stat().st_size > 200
    whole = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluations.jsonl")}
    assert run(tmp_path, *options) == found  # it goes on: nothing is repeated
    assert whole == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluations.jsonl")} and len(whole) == 4
    with pytest.raises(AjpqError, match="evaluations was 6 in .* and is 7 now"):
        run(tmp_path, *options, "evaluations=7")


def test_without_fine_tuning_policies_are_scored_on_the_search_split(tmp_path: Path) -> None:
    found = run(tmp_path, *SMALL, "finetune=none", "searches=[filter_nas,filled_uniform]")
    assert found["split"] == "search" and len(found["trials"]) == 2 * (1 + 2 + 2 + 1)
    assert all(len(trial["accuracies"]) == 1 for trial in found["trials"])


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("grid=[]", "grid must be a list of at least one"),
        ("grid=[5]", "a point of the grid must be a width above 0"),
        ("grid=[[2,4]]", "one of inputs out of"),
        ("tolerance=0", "0 < tolerance < 1 must hold"),
        ("repeats=[]", "repeats must be a list of at least one"),
        ("repeats=[0,0]", "repeats must be different whole numbers"),
        ("cost=joule", "cost must be one of .*bops"),
        ("searches=[{name: random, search: filter_nas}]", "must not be named 'random'"),
    ),
)
def test_bad_settings_are_told(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AjpqError, match=message):
        run(tmp_path, *SMALL, override)
    assert not list(tmp_path.iterdir())


def test_a_study_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text("")
    with pytest.raises(AjpqError, match="a study must have a folder of its own"):
        run(tmp_path, *SMALL)


def test_the_study_of_the_paper_sets_what_it_says() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("variance", ["study=resnet20", "data.root=here", "grid=[3]"])
    assert (cfg.cost, cfg.search_images, cfg.finetune.epochs, list(cfg.grid)) == ("uniq_bops", 2000, 6, [3])
    assert "resnet" in cfg.model._target_ and cfg.random._target_ == "agents.nearby.Nearby"
