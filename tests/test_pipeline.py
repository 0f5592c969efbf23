"""The whole job, as a user runs it: through the command, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import hydra
import pytest
import torch
from hydra.errors import HydraException

import ajpq
from ajpq import pipeline, training
from ajpq.console import Screen
from ajpq.cost import Size, total
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.explain import CONF, explain
from ajpq.models import digits_cnn
from ajpq.policy import CompressionPolicy
from ajpq.preparing import Prepared, prepare
from ajpq.shipping import load
from ajpq.tasks import CLASSIFICATION
from ajpq.trials import Tuner

ROOT = Path(__file__).resolve().parent.parent
QUICK = [
    "train.epochs=6",
    "search.evaluations=12",
    "control.evaluations=2",
    "finetune.epochs=6",
    "threads=1",
    "onnx=false",
    "hydra.run.dir=run",
]


# A shell that starts jobs in the background lets them ignore SIGINT, and their children inherit that.
HEARS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ajpq.cli import main
sys.exit(main())
"""


def start(folder: Path, *overrides: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *overrides],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def command(folder: Path, *overrides: str) -> tuple[int, str, str]:
    process = start(folder, *overrides)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("job")
    status, out, err = command(folder, *QUICK, "search.warmup=6", "onnx=true", "timing.seconds=0.1")
    assert status == 0, err
    return folder / "run", json.loads((folder / "run/report.json").read_text()), out


def test_report_has_what_is_promised_and_adds_up(job):
    folder, report, out = job
    assert set(report["metrics"]) == {"original", "searched", "final"}
    assert set(report["bytes"]) == {"original", "claimed", "on_disk"}
    for cost in report["costs"].values():
        assert set(cost) == {"original", "final", "ratio", "unit"}
        assert cost["ratio"] == pytest.approx(cost["final"] / cost["original"])
    assert report["budget"] == {"size": 0.08, "macs": 0.6}
    assert all(report["costs"][name]["ratio"] <= limit for name, limit in report["budget"].items())
    assert report["bytes"]["on_disk"] == (folder / "model.safetensors").stat().st_size
    assert report["bytes"]["on_disk"] <= report["bytes"]["claimed"]
    assert report["onnx"]["bytes"] == (folder / "model.onnx").stat().st_size < report["onnx"]["original_bytes"] / 3
    assert report["onnx"]["metric"] == pytest.approx(report["metrics"]["final"], abs=0.03)
    assert report["onnx"]["agreement"] >= 0.99 and report["onnx"]["images"] == 360 and "same class as packed" in out
    assert report["control"]["policies"] == 2 and not report["control"]["lost"] and "policies of Uniform" in out
    assert report["evaluations"] == 12 + 2 == len((folder / "evaluations.jsonl").read_text().splitlines())
    assert {"train", "search", "fine-tune", "ship", "test"} <= set(report["seconds"])
    assert report["seed"] == 0 and torch.__version__.startswith(report["versions"]["torch"])
    assert "accuracy after fine-tuning" in out and "best" in out and str(folder.name) in out


def test_report_says_how_sure_the_difference_is_and_how_fast_the_network(job):
    _, report, out = job
    for stage in ("searched", "final"):
        for name, found in report["differences"][stage].items():
            ours, theirs = (report["metrics_in_full"][net][name] for net in (stage, "original"))
            assert found["mean"] == pytest.approx(ours - theirs) and found["low"] <= found["mean"] <= found["high"]
            assert found["images"] == found["blocks"] == 360
    row = report["onnx"]["timing"]["runtimes"]["onnxruntime"]
    assert row["ratio"] == pytest.approx(row["shipped"]["median"] / row["original"]["median"])
    assert report["onnx"]["claimed"] == {name: report["costs"][name]["ratio"] for name in ("macs", "bops")}
    assert "on the same 360 test images, 95 % interval" in out and "ONNX Runtime, batch 1, 1 thread: int8" in out


def test_settings_can_be_chosen_without_the_test_split(job):
    folder, report, out = job
    data, original = digits(seed=0), digits_cnn()
    ajpq.load_weights(original, folder / "original.safetensors")
    final, found = load(folder), report["held_out"]
    assert found["final"]["accuracy"] == ajpq.accuracy(final, data.search)
    assert found["original"] == {**training.metrics(original.eval(), data.search), "divergence": 0.0}
    with torch.no_grad():
        apart = [CLASSIFICATION.divergences(final(x), original(x)) for x, *_ in data.search]
    assert found["final"]["divergence"] == pytest.approx(float(torch.cat(apart).mean()), rel=1e-4)
    assert f"{found['final']['divergence']:.4f}" in out and out.count("(search)") == 2


def test_log_of_a_run_is_ours(job):
    lines = (job[0] / "ajpq.log").read_text().splitlines()
    names = {line.split("][")[1] for line in lines if "[INFO]" in line}
    assert names == {"ajpq"}


def test_metrics_can_be_measured_again_from_the_files(job):
    folder, report, _ = job
    data, original = digits(seed=0), digits_cnn()
    ajpq.load_weights(original, folder / "original.safetensors")
    assert ajpq.accuracy(original, data.test) == report["metrics"]["original"]
    assert ajpq.accuracy(load(folder), data.test) == report["metrics"]["final"] >= report["metrics"]["searched"]
    after, before = (report["held_out"][stage]["divergence"] for stage in ("final", "searched"))
    assert after < before, "fine-tuning brings it nearer to the original, though perhaps no more digits are right"
    network = ajpq.trace(original, next(iter(data.calibration))[0])
    policy = CompressionPolicy.from_json((folder / "policy.json").read_text())
    policy.validate(network)
    assert total(Size(), network, policy) / 8 == report["bytes"]["claimed"]
    kept = [row["kept"] for row in report["layers"]]
    assert kept == [int((policy.weight_bits[layer.name] > 0).sum()) for layer in network.layers]
    shapes = [tuple(m.codes.shape)[0] for m in load(folder).modules() if hasattr(m, "codes")]
    assert shapes == kept


@pytest.mark.slow
def test_the_same_seed_gives_the_same_policies_and_another_seed_others(job, tmp_path):
    folder, _, _ = job
    again = [
        command(tmp_path, *QUICK, "search.warmup=6", "finetune.epochs=0", f"seed={seed}", f"hydra.run.dir=run{seed}")
        for seed in (0, 1)
    ]
    assert [status for status, _, _ in again] == [0, 0]
    read = [
        [json.loads(line)["policy"] for line in (path / "evaluations.jsonl").read_text().splitlines()]
        for path in (folder, tmp_path / "run0", tmp_path / "run1")
    ]
    assert read[0] == read[1] != read[2]


def test_training_goes_on_from_given_weights(job, tmp_path):
    folder, report, _ = job
    start = [f"train.start={folder / 'original.safetensors'}", "train.epochs=0", "search=uniform", "budget.size=0.5"]
    status, _, err = command(tmp_path, *start, "budget.macs=null", "finetune=none", "onnx=false", "hydra.run.dir=run")
    assert status == 0, err
    found = json.loads((tmp_path / "run/report.json").read_text())
    assert found["metrics"]["original"] == report["metrics"]["original"]
    assert found["given"] is None and report["given"] is None


def test_the_report_tells_of_the_network_as_it_was_given(job, tmp_path):
    folder, report, _ = job
    start = [f"train.start={folder / 'original.safetensors'}", "train.epochs=1", "train.lr=0.05", "search=uniform"]
    quick = ["budget.size=0.5", "budget.macs=null", "finetune=none", "onnx=false", "control=none"]
    status, out, err = command(tmp_path, *start, *quick, "hydra.run.dir=run")
    assert status == 0, err
    found = json.loads((tmp_path / "run/report.json").read_text())
    given = found["given"]
    assert given["metrics"] == report["metrics_in_full"]["original"] != found["metrics_in_full"]["original"]
    assert set(found["metrics_in_full"]) == {"original", "searched", "final"}
    for name in ("original", "final"):
        mean = given["differences"][name]["accuracy"]["mean"]
        assert mean == pytest.approx(found["metrics"][name] - given["metrics"]["accuracy"])
        assert f"{mean:+.4f} to the network as given" in out


def test_a_policy_of_one_run_is_fine_tuned_by_another(job, tmp_path):
    folder, report, _ = job
    status, _, err = command(
        tmp_path,
        f"checkpoint={folder / 'original.safetensors'}",
        "search=policy",
        f"search.path={folder / 'policy.json'}",
        "finetune.epochs=1",
        "threads=1",
        "onnx=false",
        "hydra.run.dir=run",
    )
    assert status == 0, err
    found = json.loads((tmp_path / "run/report.json").read_text())
    assert found["policy"] == report["policy"] and found["metrics"]["searched"] == report["metrics"]["searched"]


class Read(list):
    """Batches that know whether they were read."""

    read = False

    def __iter__(self):
        self.read = True
        return super().__iter__()


def test_a_found_network_learns_from_the_splits_that_it_is_told_to(tmp_path):
    told = ["train.epochs=0", "finetune.epochs=1", "reconstruct_images=0", "norm_images=0"]
    outputs = {}
    for splits in ("[train]", "[train,search]"):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            job = prepare(hydra.compose("config", [*told, f"finetune.splits={splits}"]), tmp_path, Screen())
        policy = CompressionPolicy.homogeneous(job.network, 8, 8)
        parts = {name: Read(getattr(job.data, name)) for name in ("train", "search", "test", "calibration")}
        final = job.tuned(job.student(policy), policy, replace(job.data, **parts))
        assert (parts["train"].read, parts["search"].read) == (True, "search" in splits)
        assert not parts["test"].read and not parts["calibration"].read
        assert job.held_out is (None if "search" in splits else job.data.search)
        outputs[splits] = final(parts["calibration"][0][0])
    assert not torch.equal(*outputs.values())


def test_a_found_network_learns_from_images_without_labels(tmp_path):
    told = ["train.epochs=0", "finetune.epochs=1", "finetune.features=1", "reconstruct_images=0", "norm_images=0"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = prepare(hydra.compose("config", told), tmp_path, Screen())
    policy = CompressionPolicy.homogeneous(job.network, 8, 8)
    more, outputs = Read([(x + 1, -1 - y) for x, y in job.data.calibration]), []
    for unlabelled in (None, more):
        final = job.tuned(
            job.student(policy), policy, replace(job.data, train=[*job.data.calibration], unlabelled=unlabelled)
        )
        outputs.append(final(more[0][0]))
    assert more.read and not torch.equal(*outputs)


class Watched(Prepared):
    """Keeps the networks that it finished."""

    finals: ClassVar[list] = []

    def tuned(self, *args, **options):
        self.finals.append(super().tuned(*args, **options))
        return self.finals[-1]


def test_what_was_tuned_before_does_not_change_what_is_learned_from_images_without_labels(tmp_path):
    told = ["train.epochs=0", "finetune.epochs=1", "reconstruct_images=0", "norm_images=0"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = Watched(**vars(prepare(hydra.compose("config", told), tmp_path, Screen())))

    def fresh():
        return replace(digits(), unlabelled=digits(seed=1).train)

    first, second = (CompressionPolicy.homogeneous(job.network, width, 8) for width in (8, 4))
    found = []
    for name, order in (("both", (first, second)), ("one", (second,))):
        tuner = Tuner(job, tmp_path / name, fresh, Screen())
        for policy in order:
            tuner.test(policy, 3, "")
        found.append(job.finals[-1](next(iter(job.data.calibration))[0]))
    assert len(job.finals) == 3 and torch.equal(*found)


def test_images_without_labels_and_without_an_original_to_ask_are_told_before_the_search(tmp_path):
    (tmp_path / "more_data.py").write_text(
        "from dataclasses import replace\nfrom ajpq.data import digits\n"
        "def load(seed):\n    data = digits(seed)\n    return replace(data, unlabelled=data.search)\n"
    )
    status, _, err = command(tmp_path, "data._target_=more_data.load", "finetune.distillation=false")
    assert status == 2 and "data.unlabelled is set and finetune.distillation is false" in err
    assert "Traceback" not in err and not list(tmp_path.rglob("original.safetensors"))


def test_a_network_that_cannot_be_shipped_is_told_before_it_is_trained(tmp_path):
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2),\n"
        "        nn.TransformerEncoderLayer(36, 1), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    status, _, err = command(tmp_path, "model._target_=my_net.make")
    assert status == 2 and "2: an argument in a shipped network must be" in err and "Traceback" not in err
    assert not list(tmp_path.rglob("original.safetensors"))


def test_splits_that_cannot_be_joined_are_told_before_the_search(tmp_path):
    (tmp_path / "mixed_data.py").write_text(
        "from dataclasses import replace\nfrom ajpq.data import digits\n"
        "def load(seed):\n    data = digits(seed)\n    return replace(data, search=list(data.search))\n"
    )
    status, _, err = command(tmp_path, "data._target_=mixed_data.load", "finetune.splits=[train,search]")
    assert status == 2 and "ImageBatches and list; pass two of a kind" in err and "Traceback" not in err
    assert not list(tmp_path.rglob("evaluations.jsonl")) and not list(tmp_path.rglob("original.safetensors"))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["budget.size=0"], ["size", "0 < budget <= 1"]),
        (["budget.size=1.5"], ["size", "1.5"]),
        (["budget.size=0.001"], ["size=0.001", "smallest reachable"]),
        (["budget.size=tiny"], ["budget.size", "'tiny'"]),
        (["budget.size=null", "budget.macs=null"], ["budget", "empty"]),
        (["+budget.joules=0.5"], ["joules", "size"]),
        (["checkpoint=nowhere.pt"], ["nowhere.pt"]),
        (["train.start=nowhere.pt"], ["nowhere.pt"]),
        (["data=cifar10", "data.root=no_such_folder"], ["no_such_folder"]),
        (["search=policy", "search.path=nowhere.json"], ["nowhere.json"]),
        (["choices.weight_bits=[0,9]"], ["weight_bits", "9"]),
        (["search.algorithm=PPO"], ["algorithm", "PPO"]),
        (["evaluator.workers=0"], ["workers >= 1", "workers=0"]),
        (["evaluator.arithmetic=int4"], ["arithmetic", "'int4'", "auto"]),
        (["timing.threads=0"], ["timing.threads", "0"]),
        (["train.epochs=-1"], ["epochs"]),
        (["finetune.lr=0"], ["lr"]),
        (["finetune.epochs=many"], ["epochs", "'many'"]),
        (["finetune.splits=[search]"], ["finetune.splits", "['search']", "[train,search]"]),
        (["finetune.splits=[train,test]"], ["finetune.splits", "'test'"]),
        (["threads=-1"], ["threads >= 1", "-1"]),
        (["seed=abc"], ["seed", "whole number", "'abc'"]),
        (["search_images=0"], ["search_images >= 1"]),
        (["norm_images=-1"], ["norm_images >= 0", "-1"]),
        (["search=random", "search.evaluations=2.5"], ["evaluations >= 1", "2.5"]),
        (["search.batch=0"], ["batch >= 1"]),
        (["search=nsga2", "search.population=1"], ["population >= 2"]),
        (["choices.weight_bits=4"], ["weight_bits", "4"]),
        (["evaluator.risk=0.1"], ["evaluator.risk is 0.1", "reward=accuracy"]),
        (["model=torchvision", "model.name=resnet18", "data=digits"], ["example input"]),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(overrides, words, tmp_path):
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises((AjpqError, HydraException)) as caught,
    ):
        pipeline.run(hydra.compose("config", ["train.epochs=1", *overrides]), tmp_path)
    sentence = explain(caught.value)
    assert sentence and "\n" not in sentence and all(word in sentence for word in words), sentence
    assert not list(tmp_path.iterdir())


def test_bad_input_on_the_command_line_is_one_line_and_status_2(tmp_path):
    status, _, err = command(tmp_path, "budget.size=0.001", "threads=1")
    assert status == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("ajpq: error: ") and "smallest reachable" in err
    assert not list(tmp_path.iterdir())


def _interrupt(folder: Path, ready, *overrides: str) -> tuple[int, str]:
    process = start(folder, *overrides)
    end = time.monotonic() + 120
    while not ready() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    try:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def test_ctrl_c_during_the_search_keeps_the_best_policy(tmp_path):
    record = tmp_path / "run/evaluations.jsonl"
    status, err = _interrupt(
        tmp_path,
        lambda: record.exists() and len(record.read_text().splitlines()) >= 3,
        "train.epochs=1",
        "search=random",
        "search.evaluations=100000",
        "threads=1",
        "onnx=false",
        "hydra.run.dir=run",
    )
    assert status == 130 and "interrupted" in err
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    best = max(rows, key=lambda row: (row["reward"], -row["number"]))
    assert CompressionPolicy.from_json((tmp_path / "run/policy.json").read_text()).digest() == best["policy"]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_ctrl_c_during_fine_tuning_keeps_a_network(tmp_path):
    status, err = _interrupt(
        tmp_path,
        (tmp_path / "run/policy.json").exists,
        "train.epochs=1",
        "search=uniform",
        "threads=1",
        "onnx=false",
        "hydra.run.dir=run",
        "finetune.epochs=100000",
    )
    assert status == 130 and "interrupted" in err
    assert load(tmp_path / "run")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


FRESH = """
import sys, torch
torch.set_num_threads(1)
import ajpq
small = ajpq.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(small(x), sys.argv[3])
assert not {"hydra", "gymnasium", "stable_baselines3", "sklearn", "omegaconf"} & set(sys.modules), sys.modules.keys()
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path):
    torch.manual_seed(0)
    data, model = digits(), digits_cnn()
    ajpq.fit(model, data.train, epochs=1, lr=0.1)
    problem = ajpq.Problem(model, data.calibration, data.search, {"size": 0.1})
    student = ajpq.compress(problem.network, problem.space.cheapest(), problem.calibration)
    final = ajpq.finetune(student, data.train, epochs=1, teacher=model)
    ajpq.ship(final, tmp_path)
    x = next(iter(data.test))[0]
    torch.save(x, tmp_path / "x.pt")
    subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path, tmp_path / "x.pt", tmp_path / "y.pt"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), final(x))
