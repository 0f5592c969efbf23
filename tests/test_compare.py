"""Comparisons of searches: the statistics, the reports, and the command that goes on where it was interrupted."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from command import ROOT, one_sentence, run
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from nets import model_of, problem_of
from omegaconf import DictConfig, OmegaConf
from scipy import stats

import ajpq
from agents.random_search import RandomSearch
from agents.uniform import Uniform
from ajpq import comparing, curves
from ajpq.errors import AjpqError
from ajpq.explain import CONF, explain
from ajpq.intervals import difference, estimate
from ajpq.policy import CompressionPolicy
from ajpq.record import RECORD, read
from ajpq.study import Run, Study, compare

T2 = 4.302652729911275  # 0.975 quantile of Student's distribution, 2 degrees of freedom
ENTRY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
from ajpq.cli import compare
sys.exit(compare())
"""

# -- statistics -------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])  # standard deviation 1
    assert found.mean == 2 and found.half == pytest.approx(T2 / math.sqrt(3))
    assert str(found) == "2.0000 +- 2.4841"
    assert str(estimate([0.5])) == "0.5000"


def test_same_seeds_are_paired() -> None:
    ours, theirs = {0: 0.5, 1: 0.6, 2: 0.7}, {2: 0.6, 1: 0.4, 0: 0.4}  # differences 0.1, 0.2, 0.1
    found = difference(ours, theirs)
    assert (found.method, found.mean) == ("paired", pytest.approx(0.4 / 3))
    assert found.half == pytest.approx(T2 * 0.1 / math.sqrt(3) / math.sqrt(3))
    assert found.word == "no better"  # 0.1333 +- 0.1434
    assert difference({seed: value + 0.02 for seed, value in ours.items()}, theirs).word == "better"
    assert difference(theirs, {seed: value + 0.02 for seed, value in ours.items()}).word == "worse"


def test_other_seeds_are_compared_after_welch() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {5: 0.0, 6: 4.0}
    found = difference(ours, theirs)
    square, freedom = 1 / 3 + 8 / 2, (1 / 3 + 4) ** 2 / ((1 / 3) ** 2 / 2 + 4**2 / 1)
    assert (found.method, found.mean) == ("Welch", 0)
    assert found.half == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(square))
    scipys = stats.ttest_ind([1, 2, 3], [0, 4], equal_var=False).confidence_interval(0.95)
    assert (-found.half, found.half) == pytest.approx((scipys.low, scipys.high))
    assert difference({0: 1.0, 1: 1.0}, {2: 0.5, 3: 0.5}).half == 0


def test_what_has_no_seed_is_known_exactly() -> None:
    ours = {0: 1.0, 1: 2.0, 2: 3.0}
    found = difference(ours, {None: 0.0})
    assert (found.method, found.mean, found.half) == ("one-sample", 2, pytest.approx(T2 / math.sqrt(3)))
    assert found.word == "no better" and difference(ours, {None: -1.0}).word == "better"
    assert difference({None: -1.0}, ours).word == "worse"
    exact = difference({None: 0.3}, {None: 0.2})
    assert (exact.method, exact.half) == ("exact", 0)
    assert exact.sentence("lp", "uniform") == "`lp` is better than `uniform`: +0.1000, neither has a seed"
    assert difference({None: 0.3}, {None: 0.3}).word == "no better"


@pytest.mark.parametrize("theirs", [{0: 0.2}, {1: 0.2}, {None: 0.2}, {1: 0.2, 2: 0.3}])
def test_one_seed_tells_nothing(theirs: dict) -> None:
    found = difference({0: 0.5}, theirs)
    assert found.word is None and "not enough seeds to tell" in found.sentence("ajpq", "random")


# -- studies ----------------------------------------------------------------------------------------------------------


def noise(policy: CompressionPolicy) -> float:
    """Accuracies without any order: no search can be better than another."""
    return int(hashlib.sha256(policy.digest().encode()).hexdigest()[:6], 16) / 2**24


def test_two_equal_searches_are_no_better_than_each_other() -> None:
    problem = problem_of(evaluator=noise)
    searches = {
        "one": lambda seed: RandomSearch(10, seed),
        "other": lambda seed: RandomSearch(10, seed + 100),
        "uniform": Uniform(10),
    }
    study = compare(problem, searches, range(5), 10, controls=["uniform", "one"])
    assert problem.evaluations == 0  # every run has a record of its own
    assert [run.seed for run in study.runs] == [*range(5), *range(5), None]
    assert difference(study.rewards("other"), study.rewards("one")) == study.differences(study.rewards)["other", "one"]
    table = study.table()
    assert "`other` is no better than `one`" in table and "| `uniform` | 1 (no seed) |" in table
    first = {seed: max(row["reward"] for row in run.rows) for seed, run in enumerate(study.runs[:5])}
    assert study.rewards("one") == first and len(set(first.values())) == 5
    assert f"| `one` | 5 | 10 | {estimate(list(first.values()))} |" in table


def test_a_worse_search_is_called_worse() -> None:
    searches = {"random": lambda seed: RandomSearch(6, seed), "uniform": Uniform(6)}
    study = compare(problem_of(), searches, range(3), 6, controls=["uniform"])  # accuracy is the mean width
    assert "`random` is worse than `uniform`" in study.table()
    (found,) = study.summary()["differences"]
    assert found["verdict"] == "worse than uniform" and found["method"] == "one-sample" and found["of"] == "reward"
    assert "not enough seeds to tell" in compare(problem_of(), searches, [0], 6, controls=["uniform"]).table()


def test_a_search_that_asks_for_more_is_stopped() -> None:
    searches = {"greedy": lambda seed: RandomSearch(100, seed, batch=4), "modest": lambda seed: RandomSearch(4, seed)}
    greedy, modest = compare(problem_of(evaluator=noise), searches, [3], 6).runs
    assert [row["number"] for row in greedy.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["policy"] for row in greedy.rows[:4]] == [row["policy"] for row in modest.rows]


class Wide:
    """Scores a policy above every budget."""

    def search(self, problem):
        problem.score(problem.space.homogeneous(8))
        return problem.result()


class Broken:
    def search(self, problem):
        problem.score(problem.space.cheapest())
        raise AjpqError("something else")


def test_a_search_without_a_policy_within_budget_has_no_mean() -> None:
    searches = {"wide": Wide(), "random": lambda seed: RandomSearch(3, seed)}
    study = compare(problem_of(), searches, [0, 1], 3, controls=["random"])
    table = study.table()
    assert "none within budget" in table and "`wide` found no policy within budget in 1 of 1 runs" in table
    assert not study.differences(study.rewards) and study.summary()["searches"]["wide"]["reward"] is None
    curves.draw(study)
    with pytest.raises(AjpqError, match="something else"):
        compare(problem_of(), {"broken": Broken()}, [0], 3)
    with pytest.raises(AjpqError, match="'uniform' is not"):
        compare(problem_of(), searches, [0], 3, controls=["uniform"])


def rows(*rewards: float | None) -> list[dict]:
    """None: above a budget."""
    plain = {"accuracy": 0.5, "ratios": {"size": 0.1}, "whole": True, "seconds": 1.0}
    return [
        {"number": i, "reward": 9.0 if reward is None else reward, "within": reward is not None, **plain}
        for i, reward in enumerate(rewards, 1)
    ]


def test_picture_shows_median_range_and_what_ended_early(tmp_path: Path) -> None:
    runs = [Run("a", seed, rows(*values)) for seed, values in enumerate([(1, 2, 3, 4), (None, 6, 5, 7), (3, 1, 8, 2)])]
    study = Study([*runs, Run("u", None, rows(5.5))], ["u"], {"size": 0.1, "bops": 0.05}, "accuracy", 4)
    assert runs[1].curve().tolist() == [-math.inf, 6, 6, 7] and runs[1].best["number"] == 4
    figure = curves.draw(study)
    (axes,) = figure.axes
    solid = {line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "-"}
    assert solid == {"a (3 seeds)": [1, 3, 6, 7], "u (no seed)": [5.5]}  # medians of the bests so far
    dashed = [line.get_data() for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) > 1]
    assert [(x.tolist(), y.tolist()) for x, y in dashed] == [([1, 2, 3, 4], [5.5] * 4)]
    (shade,) = axes.collections
    high = shade.get_paths()[0].vertices[:, 1]
    assert np.nanmax(high) == 8 and np.nanmin(high) == 2  # not drawn before every seed has a policy
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["a (3 seeds)", "u (no seed)"] and {"worst to best seed", "search has ended"} < set(legend)
    assert "size ≤ 0.1, bops ≤ 0.05" in axes.get_title() and "accuracy" in axes.get_ylabel()
    study.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- the job ----------------------------------------------------------------------------------------------------------

CALLS: list[str] = []
LIMIT = [10**9]  # calls until Ctrl-C


def counted(policy: CompressionPolicy) -> float:
    if len(CALLS) >= LIMIT[0]:
        raise KeyboardInterrupt
    CALLS.append(policy.digest())
    return noise(policy)


@pytest.fixture(autouse=True)
def uncounted():
    CALLS.clear()
    LIMIT[0] = 10**9


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    ajpq.save_weights(model_of("digits_cnn"), path)
    return path


def job(folder: Path, weights: Path, *overrides: str) -> dict:
    """Run a small comparison with `counted` as the accuracy; its comparison.json."""
    given = ["searches=[random,uniform]", "seeds=[0,1]", "evaluations=5", "reward=accuracy", "threads=1"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("compare", [*given, "search_images=100", "norm_images=64", *overrides])
        OmegaConf.set_struct(cfg, False)
        accuracy = {"_target_": "hydra.utils.get_method", "path": f"{__name__}.counted"}
        cfg.evaluator = {"_target_": "ajpq.scoring.setting.each", "accuracy": accuracy}
        cfg.checkpoint = str(weights)
        comparing.run(cfg, folder)
    return json.loads((folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def done(weights: Path, tmp_path_factory) -> Path:
    """The folder of a comparison that was not interrupted; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    job(folder, weights)
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def policies(folder: Path) -> dict[str, list[str]]:
    return {
        str(path.parent.relative_to(folder)): [row["policy"] for row in read(path)] for path in folder.rglob(RECORD)
    }


def test_folder_has_everything(done: Path) -> None:
    found = json.loads((done / "comparison.json").read_text())
    assert set(policies(done)) == {"random/seed=0", "random/seed=1", "uniform/once"}
    with (done / "evaluations.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10 + found["searches"]["uniform"]["evaluations"][0]
    costs = {"size_ratio", "macs_ratio", "bops_ratio"}
    keys = {
        "search",
        "seed",
        "number",
        "policy",
        "reward",
        "accuracy",
        "loss",
        "divergence",
        "within",
        "seconds",
    }
    assert keys | costs < set(table[0])
    assert [(row["search"], row["seed"], row["number"]) for row in table[:6:5]] == [
        ("random", "0", "1"),
        ("random", "1", "1"),
    ]
    assert {row["seed"] for row in table if row["search"] == "uniform"} == {""}
    for one in found["runs"]:
        place = done / one["search"] / ("once" if one["seed"] is None else f"seed={one['seed']}")
        best = max(read(place / RECORD), key=lambda row: row["reward"])
        assert one["best"]["policy"] == best["policy"] == json.loads((place / "result.json").read_text())["policy"]
        assert CompressionPolicy.from_json((place / "policy.json").read_text()).digest() == best["policy"]
    text = (done / "comparison.md").read_text()
    assert "`random` is" in text and "than `uniform`" in text and "size <= 0.08, macs <= 0.6" in text
    assert all((done / f"comparison.{kind}").stat().st_size > 10_000 for kind in ("png", "svg"))


def test_whole_runs_are_not_repeated_and_others_are_added(weights: Path, copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("result.json")}
    known = json.loads((copied / "comparison.json").read_text())["searches"]
    assert job(copied, weights)["searches"] == known and not CALLS
    more = job(copied, weights, "seeds=[7,0,1]", "searches=[random,uniform,{name: again, search: random, batch: 2}]")
    assert len(CALLS) == 5 + 3 * 5 and more["searches"]["random"]["seeds"] == [7, 0, 1]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_interrupted_comparison_ends_as_if_it_had_not_been(weights: Path, done: Path, tmp_path: Path) -> None:
    whole = sum(map(len, policies(done).values()))
    LIMIT[0] = whole - 8  # within a run
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, weights)
    assert [len(found) for found in policies(tmp_path).values()].count(2) == 1
    LIMIT[0] = 10**9
    job(tmp_path, weights)
    assert len(CALLS) == whole  # nothing was measured twice
    assert policies(tmp_path) == policies(done)


def test_other_settings_are_refused_by_name(weights: Path, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    model = model_of("digits_cnn")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    ajpq.save_weights(model, other)
    for overrides, words in {
        ("budget.size=0.09",): "budget.size was 0.08 in .* and is 0.09 now",
        ("evaluations=6",): "evaluations was 5",
        ("searches=[{search: random, batch: 3},uniform]",): "search.random.batch was None",
        ("searches=[{name: uniform, search: random}]",): "search.uniform._target_ was agents.uniform.Uniform",
    }.items():
        with pytest.raises(AjpqError, match=words):
            job(copied, weights, *overrides)
    with pytest.raises(AjpqError, match="weights of the network differ"):
        job(copied, other)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / RECORD).write_text("")
    with pytest.raises(AjpqError, match="folder of its own"):
        job(tmp_path / "plain", weights)


def test_best_policies_are_fine_tuned_once_per_seed(weights: Path, copied: Path) -> None:
    tuned = ["finetune=qat", "finetune.epochs=1", "finetune.norm_batches=2"]
    twins = "searches=[random,{name: twin, search: random},uniform]"
    found = job(copied, weights, twins, *tuned)  # fine-tuning may be asked for later
    assert len(CALLS) == 10
    files = sorted((copied / "tuned").iterdir())
    assert len(files) == 4  # twin has the policies of random, uniform is tuned with both seeds
    tests = {(run["search"], run["seed"]): run["tests"] for run in found["runs"]}
    assert tests["random", 0].keys() == {"0"} and tests["twin", 0] == tests["random", 0]
    assert tests["uniform", None].keys() == {"0", "1"} and len(set(tests["uniform", None].values())) == 2
    verdicts = {(d["of"], d["search"], d["control"]): d for d in found["differences"]}
    assert verdicts["test", "random", "uniform"]["method"] == "paired"
    assert verdicts["test", "twin", "random"]["verdict"] == "no better than random"
    assert found["original"].keys() == {"search", "test"}
    assert "accuracy, test split, fine-tuned" in (copied / "comparison.md").read_text()
    before = json.loads(files[-1].read_text())
    files[-1].unlink()
    job(copied, weights, twins, *tuned)
    assert json.loads(files[-1].read_text()) == before  # does not depend on what ran before


BAD = {
    "no such search": (["searches=[random,ajqp]"], ["'ajqp'", "did you mean `ajpq`"]),
    "no list": (["searches=ajpq"], ["searches must be a list", "ajpq"]),
    "no search": (["searches=[]"], ["searches must be a list of at least one"]),
    "twice": (["searches=[random,{search: random, batch: 2}]"], ["name of its own", "'random'"]),
    "own seed": (["searches=[{search: random, seed: 3}]"], ["seed must be the same", "set seeds"]),
    "own evaluations": (["searches=[{search: random, evaluations: 3}]"], ["set evaluations"]),
    "no value": (["searches=[{search: policy}]"], ["'policy' must have a value for path"]),
    "keyword": (["searches=[{search: random, widht: 3}]"], ["keywords", "'widht'"]),
    "value": (["searches=[{search: ajpq, algorithm: PPQ}]"], ["PPQ"]),
    "name": (["searches=[{name: a/b, search: random}]"], ["'a/b'", "folder"]),
    "no file": (["searches=[{name: a}]"], ["add search"]),
    "seeds": (["seeds=[0,0]"], ["each once"]),
    "negative seed": (["seeds=[-1]"], ["whole numbers from 0"]),
    "one seed": (["seeds=3"], ["seeds must be a list"]),
    "evaluations": (["evaluations=0"], ["at least 1"]),
    "control": (["controls=[lp]"], ["controls", "'lp'"]),
    "budget": (["budget.size=0.001"], ["smallest reachable"]),
    "fine-tuning": (["finetune=qat", "finetune.lr=0"], ["lr"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_anything_is_written(case: str, tmp_path: Path) -> None:
    overrides, words = BAD[case]
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises((AjpqError, HydraException)) as caught,
    ):
        comparing.run(hydra.compose("compare", ["searches=[random,uniform]", *overrides]), tmp_path)
    sentence = explain(caught.value)
    assert sentence and "\n" not in sentence and all(word in sentence for word in words), sentence
    assert not list(tmp_path.iterdir())


def test_seed_of_a_run_reaches_whatever_refers_to_it() -> None:
    start = "{name: nested, search: ajpq, start: {_target_: agents.random_search.RandomSearch, seed: '${seed}'}}"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = hydra.compose("compare", ["searches=[lp,single]", "seeds=[4,6]", "evaluations=9", "seed=2"])
        cfg.searches = [*cfg.searches, OmegaConf.create(start)]
        lp, single, nested = comparing.entries_of(cfg)
    assert lp.settings.keys() == {None} and lp.settings[None]["evaluations"] == 9
    assert {seed: made["seed"] for seed, made in single.settings.items()} == {4: 4, 6: 6}
    assert {seed: made["start"]["seed"] for seed, made in nested.settings.items()} == {4: 4, 6: 6}
    assert single.backend(6).seed == 6


@pytest.mark.parametrize("other", ["search=random", "control=uniform"])
def test_search_beside_searches_is_refused(tmp_path: Path, other: str) -> None:
    config = HydraConfig.instance()
    before = config.cfg
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config.set_config(hydra.compose("compare", [other], return_hydra_config=True))
            with pytest.raises(AjpqError, match=f"`{other}`"):
                comparing.run(hydra.compose("compare", [other]), tmp_path)
    finally:
        config.cfg = before


# -- the command ------------------------------------------------------------------------------------------------------

QUICK = ["train.epochs=1", "search_images=100", "norm_images=64", "threads=1", "hydra.run.dir=run"]


def test_command_from_training_to_verdict(tmp_path: Path) -> None:
    given = ["searches=[random,uniform]", "seeds=[0,1]", "evaluations=3", *QUICK]
    done = run(tmp_path, sys.executable, "-c", ENTRY, *given, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run/comparison.md").read_text()
    assert text.strip() in done.stdout and "`random` is" in text
    assert len((tmp_path / "run/random/seed=1/evaluations.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run/original.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "given"), [("compare", ["searches=ajpq"]), *((n, ["sed=1"]) for n in ("compare", "variance", "profile"))]
)
def test_errors_are_signed_by_the_command(name: str, given: list[str], tmp_path: Path) -> None:
    program = f"import sys; from ajpq.cli import {name}; sys.exit({name}())"
    one_sentence(run(tmp_path, sys.executable, "-c", program, *given), f"ajpq-{name}")


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    given = ["searches=[random]", "seeds=[0]", "evaluations=100000", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *given],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    record, end = tmp_path / "run/random/seed=0/evaluations.jsonl", time.monotonic() + 120
    while not (record.is_file() and record.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (
        process.returncode == 130 and "ajpq-compare: interrupted" in err and f"hydra.run.dir={tmp_path / 'run'}" in out
    )
    assert len(read(record)) >= 3
