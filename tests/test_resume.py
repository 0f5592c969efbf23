"""A killed run goes on as if nothing had happened, and a different one is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import hydra
import pytest
import torch
from command import ajpq as command
from command import one_sentence
from nets import model_of, problem_of
from omegaconf import DictConfig

import ajpq
from agents.hierarchical import Hierarchical
from agents.random_search import RandomSearch
from agents.uniform import Uniform
from ajpq import pipeline, snapshot
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.record import RECORD, Record, policy_of, read

SEARCH = ["search=random", "search.evaluations=30", "+search.batch=4", "search_images=256", "norm_images=64"]
PLAIN = [*SEARCH, "finetune=none", "finetune.norm_batches=1", "threads=1", "tensorboard=false", "onnx=false"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    ajpq.save_weights(model_of("digits_cnn"), path)
    return path


def config(weights: Path, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [*PLAIN, f"checkpoint={weights}", *overrides])


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline.run(config(weights), folder)
    return folder


def child(cfg: DictConfig, folder: Path, every: int) -> int:
    """A process of its own that runs the job."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        torch.set_num_threads(1)
        snapshot.EVERY, snapshot.SHARE = every, 1.0
        pipeline.run(cfg, folder)
        status = 0
    finally:
        os._exit(status)


def known(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "every", [pytest.param(4, id="state"), pytest.param(10**9, id="replay", marks=pytest.mark.slow)]
)
def test_ten_kills_change_nothing(weights, whole, tmp_path, every):
    moments = random.Random(every)
    torch.set_num_threads(1)
    kills, seen = 0, []
    cfg, again = config(weights), config(weights, f"resume={tmp_path}")
    record = tmp_path / RECORD
    while kills < 10:
        before = record.stat().st_size if record.is_file() else 0
        pid = child(again if kills else cfg, tmp_path, every)
        # most often in the search, of which each process gets a part; else while the problem is made
        end = time.monotonic() + 60
        while kills % 5 < 4 and time.monotonic() < end:
            if record.is_file() and record.stat().st_size > before:
                break
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.004 if kills % 5 < 4 else 0.3))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the run ended before it could be killed"
        kills += 1
        rows = known(read(record)) if record.is_file() else []
        assert rows[: len(seen)] == seen  # nothing lost, nothing changed
        seen = rows
    assert 5 <= len(seen) < 30
    assert (tmp_path / snapshot.STATE).is_file() == (every == 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child(again, tmp_path, every), 0)[1]) == 0
    assert known(read(record)) == known(read(whole / RECORD))
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole))
    assert all(one[key] == other[key] for key in ("metrics", "policy", "search_score", "evaluations"))


def copy(whole: Path, folder: Path, rows: int, torn: str = "") -> Path:
    """A folder as a kill after some evaluations leaves it, without a state of the search."""
    for name in (pipeline.SEARCH, RECORD):
        shutil.copy(whole / name, folder / name)
    lines = (folder / RECORD).read_text().splitlines(keepends=True)
    (folder / RECORD).write_text("".join(lines[:rows]) + torn)
    return folder


def test_a_network_trained_here_is_fine_tuned_alike_after_a_kill(tmp_path):
    """Training takes the loader some epochs on; a run that finds it trained must begin fine-tuning there too."""
    short = ["train.epochs=2", "finetune.epochs=1", "search=uniform", "control=none", "search.evaluations=6",
             "threads=1", "tensorboard=false", "onnx=false", "norm_images=64", "search_images=64"]  # fmt: skip
    made = [tmp_path / name for name in ("whole", "killed")]

    def settings(*overrides: str) -> DictConfig:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", [*short, *overrides])

    for folder in made:
        folder.mkdir()
    pipeline.run(settings(), made[0])
    for name in ("original.safetensors", pipeline.SEARCH, RECORD):
        shutil.copy(made[0] / name, made[1] / name)
    pipeline.run(settings(f"resume={made[1]}"), made[1])
    assert len({(folder / "model.safetensors").read_bytes() for folder in made}) == 1


def test_torn_last_line_is_measured_again(weights, whole, tmp_path):
    copy(whole, tmp_path, 9, (whole / RECORD).read_text().splitlines()[9][:-7])
    assert len(read(tmp_path / RECORD)) == 9
    pipeline.run(config(weights, f"resume={tmp_path}"), tmp_path)
    assert known(read(tmp_path / RECORD)) == known(read(whole / RECORD))


def test_a_kill_while_the_control_is_scored_changes_nothing(weights, whole, tmp_path):
    rows = read(whole / RECORD)
    assert len(rows) > 32  # the search asks for 30
    copy(whole, tmp_path, 32)
    pipeline.run(config(weights, f"resume={tmp_path}"), tmp_path)
    assert known(read(tmp_path / RECORD)) == known(rows)
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole))
    assert one["control"] == other["control"] and one["control"]["policies"] == len(rows) - 30


@pytest.mark.parametrize("damage", ["{", '{"number": 3}', ""])
def test_damaged_line_is_refused(whole, tmp_path, damage):
    lines = (whole / RECORD).read_text().splitlines()
    lines[2] = damage
    (tmp_path / RECORD).write_text("\n".join(lines) + "\n")
    with pytest.raises(AjpqError, match="line 3 of"):
        Record(tmp_path / RECORD)


def test_record_holds_the_policies(whole):
    for row in read(whole / RECORD):
        assert policy_of(row).digest() == row["policy"]
    with pytest.raises(AjpqError, match="must hold the policy that it names"):
        policy_of({**row, "policy": "0" * 16})


def test_damaged_state_is_said_and_replayed(weights, whole, tmp_path, capsys):
    copy(whole, tmp_path, 9)
    (tmp_path / snapshot.STATE).write_bytes(b"PK\x03\x04 torn")
    pipeline.run(config(weights, f"resume={tmp_path}"), tmp_path)
    assert "replayed from its record" in capsys.readouterr().out
    assert known(read(tmp_path / RECORD)) == known(read(whole / RECORD))


def test_state_of_a_longer_record_is_not_used(whole):
    rows, backend = read(whole / RECORD), RandomSearch()
    done, fault = snapshot.load_state(whole / snapshot.STATE, backend, rows)
    assert (done, fault) == (20, None)
    done, fault = snapshot.load_state(whole / snapshot.STATE, RandomSearch(), rows[:19])
    assert done == 0 and "another record" in fault


def test_failed_save_keeps_the_last_state(whole, tmp_path):
    class Broken:
        def state_dict(self):
            return {"function": lambda: 0}

    shutil.copy(whole / snapshot.STATE, tmp_path)
    before = (tmp_path / snapshot.STATE).read_bytes()
    with pytest.raises(Exception, match="lambda"):
        snapshot.save_state(tmp_path / snapshot.STATE, Broken(), problem_of("digits_cnn"))
    assert (tmp_path / snapshot.STATE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=1", "seed was 0 and is 1"),
        ("budget.size=0.1", "budget.size was 0.08 and is 0.1"),
        ("search._target_=agents.hill_climbing.HillClimbing", "backend was agents.random_search.RandomSearch"),
    ],
)
def test_other_settings_are_refused(weights, whole, tmp_path, override, words):
    copy(whole, tmp_path, 9)
    with pytest.raises(AjpqError, match=words):
        pipeline.run(config(weights, f"resume={tmp_path}", override), tmp_path)
    assert len(read(tmp_path / RECORD)) == 9


def test_other_weights_and_images_are_refused(weights, whole, tmp_path):
    copy(whole, tmp_path, 9)
    model = ajpq.models.digits_cnn()
    other = tmp_path / "other.safetensors"
    ajpq.save_weights(model, other)
    with pytest.raises(AjpqError, match="the weights of the network differ"):
        pipeline.run(config(other, f"resume={tmp_path}"), tmp_path)
    for key, words in (("search", "the search images differ"), ("calibration", "the calibration images differ")):
        then = json.loads((whole / pipeline.SEARCH).read_text())
        (tmp_path / pipeline.SEARCH).write_text(json.dumps({**then, key: "0"}))
        with pytest.raises(AjpqError, match=words):
            pipeline.run(config(weights, f"resume={tmp_path}"), tmp_path)
    assert len(read(tmp_path / RECORD)) == 9


def test_new_run_does_not_replace_a_record(weights, whole):
    before = (whole / RECORD).read_bytes()
    with pytest.raises(AjpqError, match="must not replace the record"):
        pipeline.run(config(weights), whole)
    assert (whole / RECORD).read_bytes() == before


def test_search_that_asks_for_others_is_stopped():
    first = problem_of("digits_cnn")
    RandomSearch(8, seed=0, batch=2).search(first)
    rows = [ajpq.record.row(evaluation) for evaluation in first.history]
    other = first.again()
    other.recall(rows)
    with pytest.raises(AjpqError, match="evaluation 1 is policy"):
        RandomSearch(8, seed=1, batch=2).search(other)
    shorter = first.again()
    shorter.recall(rows)
    RandomSearch(6, seed=0, batch=2).search(shorter)
    with pytest.raises(AjpqError, match="evaluation 7 .* ends before it"):
        shorter.check_recalled()


def test_search_that_begins_with_another_is_replayed_beyond_it():
    def searched(problem):
        torch.manual_seed(0)
        Hierarchical(9, seed=0, start=Uniform(), share=0.5, warmup=2, net_arch=(8,)).search(problem)
        problem.check_recalled()
        return [ajpq.record.row(evaluation) for evaluation in problem.history]

    first = problem_of("digits_cnn")
    rows = searched(first)
    again = first.again()
    again.recall(rows[:7])
    assert known(searched(again)) == known(rows) and len(rows) == 9


# -- the command ------------------------------------------------------------------------------------------------------


def test_command_goes_on_with_the_settings_of_the_run(weights, tmp_path):
    settings = [*PLAIN, f"checkpoint={weights}", "search.evaluations=6"]
    assert command(tmp_path, *settings, "hydra.run.dir=run").returncode == 0
    folder = tmp_path / "run"
    before = read(folder / RECORD)
    assert "is finished" in command(tmp_path, "resume=run").stdout
    said = one_sentence(command(tmp_path, "resume=run", "finetune.epochs=2"))
    assert "a finished run takes no settings, but run has its report and finetune.epochs=2 would change it" in said
    assert "budget.size was 0.08" in one_sentence(command(tmp_path, "resume=run", "budget.size=0.5"))
    (folder / "report.json").unlink()
    (folder / RECORD).write_text("".join((folder / RECORD).read_text().splitlines(keepends=True)[:4]))
    for override, words in (("seed=3", "seed was 0"), ("search=policy", "search was random"), ("hydra.run.dir=x", "x")):
        assert words in one_sentence(command(tmp_path, "resume=run", override))
    assert "must not replace" in one_sentence(command(tmp_path, *settings, "seed=3", "hydra.run.dir=run"))
    done = command(tmp_path, "resume=run", "threads=2")
    assert done.returncode == 0, done.stderr
    assert known(read(folder / RECORD)) == known(before) and (folder / "report.json").is_file()


@pytest.mark.parametrize("place, words", [("nowhere", "is no folder"), (".", "holds no run")])
def test_folder_without_a_run_is_one_sentence(tmp_path, place, words):
    assert words in one_sentence(command(tmp_path, f"resume={place}"))
    assert not list(tmp_path.iterdir())
