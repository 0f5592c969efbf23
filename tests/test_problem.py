"""The problem: scores are remembered and recorded in order; users bring their own costs and evaluators."""

import functools
import math

import numpy as np
import pytest
import torch
from nets import Net, batches_of, conv, images_of, model_of, network_of, problem_of, traced
from torch import nn

from ajpq.compression import compress
from ajpq.cost import MACs
from ajpq.errors import AjpqError
from ajpq.matching import match
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.rewards import divergence_reward
from ajpq.scoring.local import Local
from ajpq.space import Choices
from ajpq.training import accuracy, recalibrate


class Counter:
    """An evaluator that counts its calls; its answers are given."""

    def __init__(self, *answers: float) -> None:
        self.answers, self.seen = list(answers), []

    def __call__(self, policy: CompressionPolicy) -> float:
        self.seen.append(policy)
        return self.answers[len(self.seen) - 1] if self.answers else 0.5


def drawn(problem: Problem, seed: int) -> CompressionPolicy:
    random, draft = np.random.default_rng(seed), problem.draft()
    while (decision := draft.decision) is not None:
        draft.take(
            random.uniform(*decision.options) if decision.kind == "sparsity" else int(random.choice(decision.options))
        )
    return draft.policy()


def test_a_known_policy_is_not_evaluated_again():
    counter = Counter()
    problem = problem_of(evaluator=counter)
    policy = drawn(problem, 0)
    twin = CompressionPolicy.from_json(policy.to_json())
    assert problem.score(policy) is problem.score(twin) and len(counter.seen) == problem.evaluations == 1
    problem.score(drawn(problem, 1))
    assert len(counter.seen) == problem.evaluations == 2


def test_the_record_is_in_order_and_the_best_is_the_first_of_the_best():
    told = []
    problem = problem_of(evaluator=Counter(0.3, 0.7, 0.6, 0.7), on_evaluation=told.append)
    assert problem.best is None
    policies = [drawn(problem, seed) for seed in range(4)]
    scores = [problem.score(policy) for policy in policies]
    assert [e.number for e in problem.history] == [1, 2, 3, 4] and told == problem.history
    assert [e.policy for e in problem.history] == policies and [e.score for e in problem.history] == scores
    assert [e.score.accuracy for e in problem.history] == [0.3, 0.7, 0.6, 0.7]
    assert all(a.seconds <= b.seconds for a, b in zip(problem.history, problem.history[1:], strict=False))
    result = problem.result()
    assert (
        result.policy is policies[1]
        and result.score is scores[1]
        and result.evaluations == 4
        and result.history == tuple(problem.history)
    )


def test_policies_scored_together_are_recorded_once_and_those_that_begin_alike_together():
    counter = Counter()
    problem = problem_of(budget={"size": 0.5}, evaluator=counter)
    one, two = (problem.space.homogeneous(width) for width in (2, 3))
    last = [CompressionPolicy({**p.weight_bits, "linear": np.full(10, 4, np.uint8)}, p.act_bits) for p in (one, two)]
    scores = problem.score_all([one, two, *last, one])
    assert len(scores) == 5 and scores[0] is scores[4] and problem.evaluations == len(counter.seen) == 4
    order = [[one, two, *last].index(policy) for policy in counter.seen]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset((0, 2)), frozenset((1, 3))}
    bad = CompressionPolicy({**one.weight_bits, "linear": np.zeros(10, np.uint8)}, one.act_bits)
    with pytest.raises(AjpqError, match="'linear'"):
        problem.score_all([problem.space.homogeneous(1), bad])
    assert problem.evaluations == 4


def test_the_best_is_within_budget():
    problem = problem_of(evaluator=Counter(1.0, 0.2))
    outside = problem.score(CompressionPolicy.homogeneous(problem.network))
    assert not outside.within and outside.ratios["size"] == 1 and problem.best is None
    with pytest.raises(AjpqError, match="none of 1 was"):
        problem.result()
    within = problem.score(drawn(problem, 0))
    assert within.within and within.ratios["size"] <= 0.1 and problem.result().score is within


def test_policies_within_budget_without_a_reward_are_told_from_policies_outside():
    problem = problem_of(reward=lambda measured, ratios: math.nan)
    problem.score(drawn(problem, 0))
    with pytest.raises(AjpqError, match=r"none of 1 was that and had a finite reward \(1 within\); mend the reward"):
        problem.result()


def test_scores_tell_costs_in_units_and_ratios():
    problem = problem_of(budget={"size": 0.2, "macs": 0.9})
    policy = drawn(problem, 0)
    score = problem.score(policy)
    assert set(score.costs) == set(score.ratios) == {"size", "macs", "bops"}
    assert score.costs == problem.budget.values(policy)
    assert score.ratios["macs"] == score.costs["macs"] / problem.network.macs
    assert score.accuracy == score.reward == policy.mean_bits() / 32


def test_a_policy_that_does_not_fit_is_refused_and_not_recorded():
    problem = problem_of(evaluator=Counter())
    good = drawn(problem, 0)
    bad = CompressionPolicy({**good.weight_bits, "linear": np.zeros(10, np.uint8)}, good.act_bits)
    for _ in range(2):
        with pytest.raises(AjpqError, match="'linear'"):
            problem.score(bad)
    assert problem.evaluations == 0


class KernelCount:
    """A cost model of a user: surviving kernels."""

    unit = "kernel"

    def __call__(self, loads):
        return torch.stack([load.kept.sum() for load in loads])


def test_a_cost_model_of_the_users_own_binds_and_is_reported():
    problem = problem_of(budget={"kernels": 0.6, "size": 0.5}, costs={"kernels": KernelCount()})
    original = sum(layer.c_out for layer in problem.network.layers)
    for seed in range(5):
        policy = drawn(problem, seed)
        score = problem.score(policy)
        kernels = sum(int((bits > 0).sum()) for bits in policy.weight_bits.values())
        assert score.costs["kernels"] == kernels <= 0.6 * original and score.within
    instead = problem_of(budget={"size": 0.9}, costs={"size": MACs()}, choices=Choices(first_last=None))
    assert instead.budget.original["size"] == instead.network.macs


def test_a_reward_and_an_importance_of_the_users_own():
    network = network_of("digits_cnn")

    def backwards(network, batches, task):
        return {layer.name: -np.arange(layer.c_out, dtype=float) + layer.c_out for layer in network.layers}

    problem = problem_of(
        budget={"size": 0.3},
        reward=lambda measured, ratios: measured.accuracy - ratios["size"],
        evaluator=Counter(0.9),
        importance=backwards,
    )
    policy = drawn(problem, 0)
    score = problem.score(policy)
    assert score.reward == pytest.approx(0.9 - score.ratios["size"])
    alive = policy.weight_bits["layer1.0.conv1"] > 0
    assert alive.sum() < len(alive) and alive[: alive.sum()].all()  # the first kernels are the most important
    bits = policy.weight_bits["layer1.0.conv1"]
    assert len(set(bits[alive].tolist())) <= 4 and network is problem.network


def test_the_default_evaluator_runs_the_compressed_network_with_fresh_norms():
    network = network_of("digits_cnn")
    calibration, search = batches_of(network, 3, 16), batches_of(network, 2, 32, seed=5)
    problem = Problem(
        model_of("digits_cnn"), calibration, search, {"size": 0.2}, norm_images=32, correction="statistics"
    )
    policy = drawn(problem, 3)
    student = compress(network, policy, problem.calibration)
    stale = accuracy(student, search)
    recalibrate(student, calibration[:2])
    fresh = accuracy(student, search)
    assert problem.score(policy).accuracy == fresh
    matched = compress(network, policy, problem.calibration)
    match(matched, network, policy, calibration[:2])
    default = Problem(network, calibration, search, {"size": 0.2}, norm_images=32)
    assert default.score(policy).accuracy == accuracy(matched, search)
    folded = Problem(network, calibration, search, {"size": 0.2}, norm_images=0)
    assert folded.score(policy).accuracy == stale
    with torch.no_grad():
        x = images_of("digits_cnn")
        assert torch.equal(problem.network.module(x), model_of("digits_cnn")(x))  # scoring leaves the network as it is


def test_bad_input():
    network = network_of("digits_cnn")
    good = batches_of(network)
    with pytest.raises(AjpqError, match="must hold images"):
        Problem(model_of("digits_cnn"), [], good, {"size": 0.5})
    with pytest.raises(AjpqError, match="smallest reachable"):
        Problem(model_of("digits_cnn"), good, good, {"size": 0.001})
    with pytest.raises(AjpqError, match="input of shape"):
        Problem(model_of("digits_cnn"), [(torch.zeros(4, 3, 8, 8), torch.zeros(4))], good, {"size": 0.5})


@pytest.mark.parametrize(
    "run, told",
    (
        (lambda m, x: {"out": m.l(x.flatten(1)), "aux": x}, "returns a dict of out, aux; wrap it"),
        (lambda m, x: (m.l(x.flatten(1)), x), "returns a tuple; wrap it"),
        (lambda m, x: m.l(x.flatten(1))[:1], "Classification cannot judge outputs of"),
    ),
)
def test_outputs_that_the_task_cannot_judge_are_told_at_once(run, told):
    x = torch.randn(8, 3, 8, 8)
    data = [(x, torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(AjpqError, match=told):
        Problem(Net(lambda m, x: run(m, m.a(x)), a=conv(3, 4), l=nn.Linear(256, 5)), data, data, {"size": 0.9})


def test_a_reward_that_is_no_number_is_never_the_best():
    rewards = iter([float("nan"), 2.0, float("nan"), 3.0])
    problem = problem_of(budget={"size": 0.5}, reward=lambda *_: next(rewards))
    for width in (2, 3, 4, 6):
        problem.score(problem.space.homogeneous(width))
    assert problem.best.score.reward == 3.0


def test_weights_that_float16_has_no_steps_for_are_told_at_once():
    torch.manual_seed(0)
    x = 65535 * torch.rand(16, 3, 8, 8)
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    for _ in range(60):
        net(x)
    batches = [(x, torch.zeros(16, dtype=torch.int64))]
    with pytest.raises(AjpqError, match=r"largest of '0' at 8 bits.*divide the network's inputs"):
        Problem(net.eval(), batches, batches, {"size": 0.5})
    with torch.no_grad():  # a layer that is switched off may have steps as small as it likes
        net[0].weight *= 1e-9
        net[1].running_var.fill_(1.0)
    Problem(net, batches, batches, {"size": 0.5})


def test_giving_up_early_needs_the_accuracy_as_reward():
    network = network_of("digits_cnn")
    data = batches_of(network), batches_of(network, seed=1)
    evaluator = functools.partial(Local, risk=0.1)
    assert Problem(network, *data, {"size": 0.5}, evaluator=evaluator).evaluator.risk == 0.1
    with pytest.raises(AjpqError, match="evaluator.risk is 0.1"):
        Problem(network, *data, {"size": 0.5}, evaluator=evaluator, reward=divergence_reward)


def test_a_norm_that_float16_does_not_hold_is_told_at_once():
    norm = nn.BatchNorm2d(3)
    network = traced(lambda m, x: m.l(m.a(m.n(x)).relu().mean((2, 3))), n=norm, a=conv(3, 4), l=nn.Linear(4, 2))
    found = network.module.get_submodule("n")
    found.running_mean[1], found.running_var[1], found.weight[1] = 255.0, 0.0, 1.0
    data = [(network.example, torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(AjpqError, match="n: a batch-norm that no layer absorbs is stored as float16"):
        Problem(network, data, data, {"size": 0.9})
