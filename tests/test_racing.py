"""Giving up early: never a better candidate with more than the risk allowed, and the hopeless ones soon."""

import numpy as np
import pytest
import torch
from nets import batches_of, network_of, random_policy

from ajpq.calibration import calibrate
from ajpq.problem import Problem
from ajpq.scoring.local import Local
from ajpq.scoring.racing import LOOKS, hopeless
from ajpq.scoring.setting import Measured, Setting


def gives_up(right: np.ndarray, best: int, risk: float) -> int:
    """Images seen before a candidate that gets these images right is given up; all of them if it is not."""
    for look in LOOKS:
        seen = round(look * len(right))
        if hopeless(int(right[:seen].sum()), seen, best, len(right), risk):
            return seen
    return len(right)


@pytest.mark.parametrize("risk", (0.05, 0.01))
@pytest.mark.parametrize("best", (300, 700, 990))
def test_the_best_candidate_is_lost_no_more_often_than_allowed(risk, best):
    random, right = np.random.default_rng(0), np.arange(1000) <= best  # one more right than the best
    lost = sum(gives_up(random.permutation(right), best, risk) < 1000 for _ in range(2000))
    assert lost <= 2000 * risk + 3 * (2000 * risk) ** 0.5


def test_bad_candidates_are_given_up_soon_and_equal_ones_late():
    random = np.random.default_rng(0)
    seen = {
        hits: np.mean([gives_up(random.permutation(np.arange(2000) < hits), 1700, 0.01) for _ in range(100)])
        for hits in (400, 1500, 1690)
    }
    assert seen[400] == 250 and seen[1500] < 600 and seen[1690] > 1500


def test_what_cannot_be_reached_any_more_needs_no_probability():
    assert hopeless(0, 501, 499, 1000, 0.0) and not hopeless(1, 500, 499, 1000, 0.0)
    assert not hopeless(500, 500, 999, 1000, 1e-9)


def test_the_evaluator_gives_up_on_a_sample_or_sees_every_image():
    network = network_of("digits_cnn")
    data, search = batches_of(network, 2, 16), batches_of(network, 40, 25, seed=3)
    setting, policy = Setting(network, calibrate(network, data), [], search), random_policy(network, 0, 0.2, (8,), (8,))
    evaluator, whole = Local(setting, risk=0.01), Local(setting).measure(policy)
    assert whole.whole and whole.images == 1000 and 0 < whole.accuracy < 0.3
    seen = evaluator.measure(policy)
    assert seen == evaluator.measure(policy, whole.accuracy - 0.05) and (seen.accuracy, seen.images) == (
        whole.accuracy,
        1000,
    )
    assert seen.whole and seen.divergence == pytest.approx(whole.divergence, abs=1e-6)
    early = evaluator.measure(policy, floor=0.9)
    assert not early.whole and early.images == 125 and abs(early.accuracy - whole.accuracy) < 0.15
    assert Local(setting).measure(policy, floor=0.9) == whole
    labels = torch.cat([y for _, y in evaluator.batches])
    assert torch.equal(labels.sort()[0], torch.cat([y for _, y in search]).sort()[0])
    assert not torch.equal(labels, torch.cat([y for _, y in search]))


def test_a_policy_that_was_given_up_is_never_the_result():
    network = network_of("digits_cnn")
    told = iter([Measured(0.5, 100), Measured(0.9, 10, whole=False), Measured(0.6, 100)])
    floors = []

    def evaluator(policies, floor=None):
        floors.append(floor)
        yield from ((i, next(told)) for i in range(len(policies)))

    problem = Problem(network, batches_of(network), [], {"size": 0.5}, evaluator=lambda setting: evaluator)
    policies = [problem.space.homogeneous(width) for width in (2, 3, 4)]
    scores = [problem.score(policy) for policy in policies]
    assert floors == [None, 0.5, 0.5] and [s.whole for s in scores] == [True, False, True]
    assert problem.result().policy is policies[2] and scores[1].images == 10
    other = Problem(
        network,
        batches_of(network),
        [],
        {"size": 0.5},
        reward=lambda m, r: -m.accuracy,
        evaluator=lambda setting: evaluator,
    )
    told = iter([Measured(0.5, 100)] * 2)
    other.score(policies[0]), other.score(policies[1])
    assert floors[3:] == [None, None]  # what a reward of the user's own needs cannot be known
