"""`evaluator=ray` on a real Ray of this machine: nothing is lost, whatever dies, and nothing depends on who worked."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROOT, run
from evaluators import Marked, MeanWidth
from nets import batches_of, network_of, random_policy

from ajpq.calibration import calibrate
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.scoring import connection
from ajpq.scoring.cluster import Ray
from ajpq.scoring.local import Local
from ajpq.scoring.setting import Measured, Setting


@pytest.fixture(scope="module")
def setting() -> Setting:
    network = network_of("digits_cnn")
    batches = batches_of(network, 2)
    return Setting(network, calibrate(network, batches), batches, batches_of(network, 3, seed=1))


@pytest.fixture(scope="module")
def policies() -> list[CompressionPolicy]:
    return [random_policy(network_of("digits_cnn"), seed, act_bits=(4, 8)) for seed in range(24)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    try:
        connection.connect(None, 4)
    except AjpqError as error:
        pytest.skip(f"Ray does not start here: {error}")
    yield
    connection.disconnect()
    assert not connection.ray_package().is_initialized()


@pytest.fixture(scope="module")
def slow(cluster: None, setting: Setting) -> Iterator[Ray]:
    """Two actors that take 20 ms for a policy."""
    evaluator = Ray(setting, workers=2, evaluator=MeanWidth, seconds=0.02)
    yield evaluator
    evaluator.close()


def widths(policies: list[CompressionPolicy]) -> list[float]:
    return [policy.mean_bits() / 32 for policy in policies]


def accuracies(answers: list[tuple[int, Measured]]) -> list[float]:
    """Of answers that name every policy once, in order."""
    assert [i for i, _ in answers] == list(range(len(answers)))
    return [measured.accuracy for _, measured in answers]


def workers_of(evaluator: Ray, policies: list[CompressionPolicy], wanted: int) -> set[int]:
    """Processes that measured `policies`, asked again until there are as many as wanted: an actor takes seconds to
    start, and those that have started do not wait for it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answers = list(evaluator(policies))
        assert accuracies(answers) == widths(policies)
        found = {measured.images for _, measured in answers}
        if len(found) == wanted:
            return found
    raise AssertionError(f"{len(found)} actors at work, {wanted} wanted")


def test_one_worker_two_workers_and_no_ray_say_the_same(cluster, setting, policies):
    expected = dict(Local(setting, workers=1)(policies))
    assert len({measured.accuracy for measured in expected.values()}) > 3
    for workers in (1, 2):
        evaluator = Ray(setting, workers=workers)
        answers = list(evaluator(policies))
        assert [i for i, _ in answers] == list(range(len(policies)))
        assert dict(answers) == expected
        evaluator.close()


def test_work_is_shared_and_the_floor_reaches_the_actors(slow, policies):
    assert os.getpid() not in workers_of(slow, policies, 2)
    floor = sorted(widths(policies))[12]
    assert [m.whole for _, m in slow(policies, floor)] == [width >= floor for width in widths(policies)]
    assert list(slow([])) == []


def test_two_calls_may_be_under_way_at_once(slow, policies):
    first, second = slow(policies), slow(policies[::-1])
    mixed = [(next(first), next(second)) for _ in policies]
    assert accuracies([a for a, _ in mixed]) == widths(policies)
    assert accuracies([b for _, b in mixed]) == widths(policies[::-1])


def test_a_killed_actor_is_replaced_and_nothing_is_lost(slow, policies):
    before = workers_of(slow, policies, 2)
    answers = iter(slow(policies))
    got = [next(answers)]
    killed = got[0][1].images
    os.kill(killed, signal.SIGKILL)
    got += answers
    assert accuracies(got) == widths(policies)
    after = workers_of(slow, policies, 2)
    assert killed in before and killed not in after and len(after & before) == 1


@pytest.mark.slow
def test_errors_keep_their_type_and_a_policy_that_kills_every_actor_is_one(cluster, setting, policies, tmp_path):
    log = tmp_path / "log"
    faulty, deadly = (policies[i].mean_bits() for i in (2, 3))
    evaluator = Ray(setting, workers=1, evaluator=MeanWidth, log=str(log), faulty=faulty, deadly=deadly)
    with pytest.raises(Marked, match=f"^{faulty} bits$") as caught:
        list(evaluator([policies[2]]))
    assert type(caught.value) is Marked and log.read_text() == "x"  # not tried again
    good = policies[4:8]
    answers = evaluator([*good, policies[3], *good])
    got = [next(answers) for _ in good]
    with pytest.raises(AjpqError, match=r"policy 4 ended 3 actors in a row"):
        next(answers)
    assert accuracies(got) == widths(good)
    evaluator.close()


def test_an_error_of_loading_keeps_its_type(cluster, setting, policies):
    evaluator = Ray(setting, workers=1, evaluator=MeanWidth, broken=True)
    with pytest.raises(AjpqError, match="^the setting must load, but it is broken; mend it$"):
        list(evaluator(policies))
    evaluator.close()


def test_the_task_is_stored_once_and_travels_by_reference(cluster, setting, policies, monkeypatch):
    ray, stored = connection.ray_package(), []

    def put(value):
        stored.append(value)
        return original(value)

    original = ray.put
    monkeypatch.setattr(ray, "put", put)
    evaluator = Ray(setting, workers=2, evaluator=MeanWidth)
    _, sent = pickle.loads(*stored)
    assert isinstance(sent.search_data, list) and len(sent.search_data) == 3
    assert sent.network.module.code == setting.network.module.code
    assert isinstance(evaluator._parts, ray.ObjectRef)
    evaluator.close()


def test_only_who_connected_ends_the_connection(cluster, setting, policies, slow, monkeypatch):
    ray = connection.ray_package()
    first = Ray(setting, workers=1, evaluator=MeanWidth)
    first.close()
    first.close()
    with pytest.raises(AjpqError, match="closed"):
        next(first(policies))
    monkeypatch.setattr(connection, "_holders", 0)  # as if the user had connected
    Ray(setting, workers=1, evaluator=MeanWidth).close()
    assert ray.is_initialized() and connection._holders == 0
    monkeypatch.undo()
    assert accuracies(list(slow(policies[:4]))) == widths(policies[:4])


def test_a_cluster_without_room_is_one_sentence(cluster, setting):
    with pytest.raises(AjpqError, match="an actor of 5 CPUs and 0 GPUs, but it has 4 and"):
        Ray(setting, threads=5, evaluator=MeanWidth)


def test_a_cluster_that_is_full_is_one_sentence(cluster, setting, policies, monkeypatch):
    monkeypatch.setattr("ajpq.scoring.cluster.PATIENCE", 0.5)
    with pytest.raises(AjpqError, match="must find room within 0 s, but"):
        list(Ray(setting, workers=1, threads=5, evaluator=MeanWidth)(policies))


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_counts_are_positive(setting, name):
    with pytest.raises(AjpqError, match=f"`{name} >= 1` must hold for evaluator=ray, but {name}=0"):
        Ray(setting, **{name: 0})


def test_what_does_not_pickle_is_one_sentence(setting):
    pytest.importorskip("ray")
    with pytest.raises(AjpqError, match="must pickle, but cannot pickle '_thread.lock' object; keep"):
        Ray(setting, evaluator=MeanWidth, log=threading.Lock())


def test_without_ray_the_way_out_is_named(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AjpqError, match=r"^evaluator=ray must find the package Ray.*; pip install ajpq\[ray\]$"):
        Ray(setting)


MODULE = """
import os
import time
from ajpq.scoring.setting import Measured

class Mine:
    def __init__(self, setting):
        self.images = sum(len(y) for _, y in setting.search_data)

    def __call__(self, policies, floor=None):
        for i, _ in enumerate(policies):
            time.sleep(0.05)
            yield i, Measured(0.5, self.images)
"""
SCRIPT = """
import os, signal, sys, threading, time
import torch
from torch import nn
from my_scores import Mine
from ajpq.calibration import calibrate
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.scoring.cluster import Ray
from ajpq.scoring.setting import Setting
from ajpq.tracing import trace

class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell starts in the background ignore it
    net = trace(nn.Sequential(nn.Conv2d(1, 4, 3), Mean(), nn.Linear(4, 2)), torch.randn(2, 1, 6, 6))
    batches = [(torch.randn(7, 1, 6, 6), torch.arange(7) % 2)]
    setting = Setting(net, calibrate(net, batches), [], batches)
    policy = CompressionPolicy.homogeneous(net, 4, 8)
    try:
        Ray(setting, address="127.0.0.1:9")
    except AjpqError as error:
        print(error)
    evaluator = Ray(setting, workers=1, evaluator=Mine)
    print([m.images for _, m in evaluator([policy] * 2)])
    obeyed = threading.Event()

    def press():  # again, as people do
        while not obeyed.wait(0.3 if time.monotonic() - start < 0.2 else 3):
            os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    threading.Thread(target=press, daemon=True).start()
    try:
        list(evaluator([policy] * 1000))
    except KeyboardInterrupt:
        obeyed.set()
        print("interrupted", time.monotonic() - start < 10)
    print([m.images for _, m in evaluator([policy])])
    import ray
    print(ray.is_initialized())
    del evaluator
    print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_quiet_cluster_of_its_own_finds_the_users_modules_and_obeys_ctrl_c(cluster, tmp_path: Path):
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(tmp_path, sys.executable, "-W", "error", "script.py", path=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    refused, *rest = done.stdout.splitlines()
    assert refused.startswith("evaluator=ray must find a Ray cluster at address='127.0.0.1:9', but [Errno")
    assert rest == ["[7, 7]", "interrupted True", "[7]", "True", "False"]
