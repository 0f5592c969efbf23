"""Two processes on one machine, against one process and against each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import parallel_job
import pytest
import torch
from torch import nn

from ajpq import parallel
from ajpq.errors import AjpqError
from ajpq.launched import check_alone, launched
from ajpq.training import fit

JOB = Path(parallel_job.__file__)
LAUNCHERS = {
    "torch": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--mixed_precision=no", "--dynamo_backend=no"),
}  # fmt: skip


def start(folder: Path, *launcher: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join((str(JOB.parent), str(JOB.parent.parent), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, *launcher, str(JOB), str(folder)],
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def results(folder: Path, *started: subprocess.Popen) -> list[dict]:
    """What the two processes found, by rank."""
    for process in started:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Of two processes with the variables that launchers set."""
    folder = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return results(folder, *(start(folder, RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_step_as_one_with_the_whole_batch(found):
    alone, (first, second) = parallel_job.plain(None), (rank["plain"] for rank in found)
    assert same(first["state"], second["state"])
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-4, atol=1e-5)
    assert torch.equal(first["state"]["idle"], torch.ones(2, 2))
    for row, other in zip(alone["rows"], first["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"], abs=2e-3)
        assert row["lr"] == other["lr"] and other["skipped"] == 0


def test_weights_steps_and_running_statistics_are_the_same_in_all_processes(found):
    first, second = (rank["compressed"] for rank in found)
    assert same(first["state"], second["state"])
    assert {"running_mean", "scale"} <= {name.rsplit(".", 1)[-1] for name in first["state"]}


def test_only_the_main_process_is_called_and_writes(found):
    first, second = (rank["compressed"] for rank in found)
    assert first["epochs"] == [1, 2, 3] and second["epochs"] == []
    assert not first["rewritten"] and same(first["again"], first["state"]) and same(second["again"], first["state"])


def test_an_order_that_is_not_seeded_is_the_same_in_all_processes(found):
    first, second = (rank["shuffled"] for rank in found)
    assert first["seen"] == second["seen"] and same(first["state"], second["state"])
    assert all(sorted(epoch) == list(range(15)) for epoch in first["seen"]) and first["seen"][0] != first["seen"][1]


def test_a_step_that_fails_in_one_process_is_left_out_in_all(found):
    first, second = (rank["spoiled"] for rank in found)
    assert [row["skipped"] for row in first["rows"] + second["rows"]] == [1, 1]
    assert same(first["state"], second["state"]) and all(t.isfinite().all() for t in first["state"].values())


def test_a_batch_that_is_too_small_is_told_in_all(found):
    assert all("one has 1 images for 2 processes" in rank["too_small"] for rank in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_do_the_same(name, found, tmp_path):
    pytest.importorskip(name, reason=f"needs the package {name}")
    for rank, other in zip(found, results(tmp_path, start(tmp_path, "-m", *LAUNCHERS[name])), strict=True):
        assert same(rank["plain"]["state"], other["plain"]["state"])
        assert same(rank["compressed"]["state"], other["compressed"]["state"])


def test_processes_that_were_launched_and_have_not_joined_are_refused(monkeypatch):
    batch = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    check_alone("ajpq")
    assert parallel.is_main() and launched() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AjpqError, match="parallel.join"):
        fit(nn.Linear(3, 4), batch, epochs=1, lr=0.1)
    with pytest.raises(AjpqError, match="`ajpq` runs in one process, but 2 were launched"):
        check_alone("ajpq")
    assert not parallel.is_main()
