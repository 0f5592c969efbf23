"""Batch-norms that are matched to those of the original network in closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import batches_of, conv, network_of, random_policy, traced
from torch import nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.correction import Correction, advice
from ajpq.errors import AjpqError
from ajpq.matching import match, matched, matching, outputs
from ajpq.policy import CompressionPolicy
from ajpq.scoring import engine
from ajpq.scoring.local import Local
from ajpq.scoring.reference import Reference
from ajpq.scoring.setting import Setting
from ajpq.training import recalibrate


def test_the_least_squares_solution_by_hand():
    x, goal = torch.randn(64, 3, 5, 5), torch.randn(64, 3, 5, 5)
    goal = goal + 0.7 * x + 2
    y, mean, var, correlation = matching(x, goal, goal.mean((0, 2, 3)), 1e-9)
    for c in range(3):
        a, b = np.polyfit(x[:, c].flatten().double().numpy(), goal[:, c].flatten().double().numpy(), 1)
        assert torch.allclose(y[:, c], a * x[:, c] + b, atol=1e-4)
        assert correlation[c] / var[c].sqrt() == pytest.approx(a, abs=1e-3)  # unbiased variance
        assert mean[c] == pytest.approx(float(x[:, c].mean()), abs=1e-5)


def test_a_thinned_goal_gives_nearly_the_same():
    random = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(32, 2, 16, 16, generator=random) for _ in range(2))
    goal = 0.5 * x + noise
    whole = matching(x, goal, goal.mean((0, 2, 3)), 1e-5)[3]
    thin = matching(x, goal[:, :, ::3, ::3], goal.mean((0, 2, 3)), 1e-5)[3]
    assert torch.allclose(whole, thin, atol=0.06) and not torch.equal(whole, thin)


def chain():
    return traced(
        lambda m, x: m.l(F.relu(m.n(m.b(F.relu(m.k(m.a(x)))))).mean((2, 3))),
        a=conv(3, 12, bias=False),
        k=nn.BatchNorm2d(12),
        b=conv(12, 16),
        n=nn.BatchNorm2d(16),
        l=nn.Linear(16, 10),
    )


def errors(network, policy, data, how) -> list[float]:
    """Mean squared distance of every batch-norm's output from the original's, on the images it was corrected with."""
    student = compress(network, policy, calibrate(network, data))
    if how:
        Correction(network, data, how)(student, policy)
    alive, names = policy.alive(network), list(matched(network))
    found = outputs(replace(network, module=student), names, data[0][0])
    goals = outputs(network, names, data[0][0])
    return [
        float((found[n] - goals[n][:, torch.from_numpy(alive[matched(network)[n]])]).square().mean()) for n in names
    ]


def test_matched_outputs_come_closer_than_re_estimated_ones():
    network = chain()
    data = batches_of(network, 1, 64)
    policy = random_policy(network, 0, 0.3, (1, 2), (8,))
    none, statistics, squares = (errors(network, policy, data, how) for how in (None, "statistics", "least_squares"))
    assert all(c < b for b, c in zip(statistics, squares, strict=True)) and sum(squares) < sum(none)


def test_an_uncompressed_network_stays_what_it_is():
    network = chain()
    data = batches_of(network, 1, 256)
    policy = CompressionPolicy.homogeneous(network)
    student = compress(network, policy)
    recalibrate(student, data)  # the original's own statistics are those of other images
    original = replace(network, module=student)
    again = compress(network, policy)
    match(again, original, policy, data)
    x = data[0][0]
    assert torch.allclose(again(x), student(x), atol=1e-3)


def test_the_network_that_is_matched_to_is_not_touched():
    network = chain()
    before = {name: t.clone() for name, t in network.module.state_dict().items()}
    errors(network, random_policy(network, 1, 0.3, (2,), (8,)), batches_of(network, 2, 8), "least_squares")
    assert all(torch.equal(t, before[name]) for name, t in network.module.state_dict().items())
    assert not any(m._forward_hooks for m in network.module.modules())


@pytest.mark.parametrize("name", ("digits_cnn", "plain"))
@pytest.mark.parametrize("thin", (False, True))
def test_the_evaluator_corrects_as_the_reference_does(name, thin, monkeypatch):
    network = chain() if name == "plain" else network_of(name)
    data = batches_of(network, 2, 16)
    setting = Setting(
        network, calibrate(network, data), data, batches_of(network, 2, 50, seed=5), correction="least_squares"
    )
    if thin:
        monkeypatch.setattr(engine, "GOAL_BYTES", 20_000)
    for seed in range(3):
        policy = random_policy(network, seed, 0.3, (2, 4), (32,))  # no rounding of activations: no step to tip over
        ours, theirs = Local(setting, workers=1).measure(policy), Reference(setting).measure(policy)
        close = pytest.approx(theirs.divergence, rel=0.5 if thin else 5e-3)
        assert ours.divergence == close and (thin or ours.accuracy == pytest.approx(theirs.accuracy, abs=0.021))


def test_norms_that_run_twice_keep_their_gain():
    network = traced(
        lambda m, x: m.l(m.n(m.b(F.relu(m.n(m.a(x))))).mean((2, 3))),
        a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), l=nn.Linear(8, 10),
    )  # fmt: skip
    assert not matched(network)
    data, policy = batches_of(network, 1, 16), CompressionPolicy.homogeneous(network, 4, 8)
    student = compress(network, policy, calibrate(network, data))
    gain = student.get_submodule("n").weight.clone()
    match(student, network, policy, data)
    assert torch.equal(student.get_submodule("n").weight, gain)


def test_other_names_are_refused():
    network = chain()
    with pytest.raises(
        AjpqError, match="correction must be one of statistics, least_squares, reconstruction, but it is 'magic'"
    ):
        Correction(network, [], "magic")


def test_networks_without_batch_norms_are_told_what_helps():
    folded = traced(lambda m, x: m.l(m.a(x).mean((2, 3))), a=conv(3, 8), l=nn.Linear(8, 5))
    assert "correction=reconstruction" in advice(folded, "least_squares")
    assert advice(folded, "reconstruction") is None
    assert advice(network_of("digits_cnn"), "least_squares") is None
