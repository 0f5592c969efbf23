"""Filter-level search: the gradient against closed forms, the partitions, and what it finds."""

import itertools

import numpy as np
import pytest
import torch
from nets import network_of, problem_of

from agents.filter_nas import FilterNAS
from agents.genes import Account, Genome
from agents.partitions import Partitions
from agents.random_search import RandomSearch
from agents.score_function import Descent, Freezer, advantages, rounded, score_gradient, softmax
from agents.uniform import Uniform
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.models import digits_cnn
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult
from ajpq.rewards import divergence_reward
from ajpq.space import Choices
from ajpq.testing import check_backend
from ajpq.training import fit

FREE = Choices(weight_bits=(0, 2, 4, 8), first_last=None, blocks="max")


def profile(policy: CompressionPolicy) -> float:
    """At most -1, where the mean width falls from 6 bits in the first layer to 2 in the last."""
    bits = list(policy.weight_bits.values())
    return -1 - float(np.mean([(b.mean() - (6 - 4 * i / (len(bits) - 1))) ** 2 for i, b in enumerate(bits)]))


def digests(result: SearchResult) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


# -- the score function -----------------------------------------------------------------------------------------------


def enumerated(n: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Options with the chances 1/2, 1/4, 1/4: counts of every equally likely partition of n filters, (4^n, 3), their
    losses, and alphas."""
    sequences = itertools.product((0, 0, 1, 2), repeat=n)
    counts = np.array([np.bincount(sequence, minlength=3) for sequence in sequences])
    return counts, loss_of(counts), np.log([2.0, 1.0, 1.0])


def loss_of(counts):
    return counts[..., 0] * counts[..., 2] + 0.3 * counts[..., 1] ** 2 + 2.0


def exact_gradient(alphas: np.ndarray, n: int = 3) -> np.ndarray:
    """Of E[L], through the probabilities of all sequences, by autograd."""
    alpha = torch.tensor(alphas, requires_grad=True)
    p, expected = torch.softmax(alpha, 0), 0.0
    for sequence in itertools.product(range(3), repeat=n):
        expected = expected + torch.stack([p[i] for i in sequence]).prod() * float(
            loss_of(np.bincount(sequence, minlength=3))
        )
    expected.backward()
    return alpha.grad.numpy()


def test_score_gradient_over_all_partitions_is_the_gradient_of_the_mean_loss():
    counts, losses, alphas = enumerated()
    p = softmax(alphas)
    found = score_gradient(counts, 3 * p, losses)
    assert np.allclose(found, exact_gradient(alphas), atol=1e-12) and np.abs(found).max() > 0.1
    paper = (counts * losses[:, None]).mean(0) - losses.mean() * 3 * p  # E[n_i L] - E[L] n softmax_i
    assert np.allclose(found, paper, atol=1e-12)


def test_advantages_leave_the_direction_and_take_the_level():
    counts, losses, alphas = enumerated()
    expected, n = 3 * softmax(alphas), len(losses)
    exact = exact_gradient(alphas)
    found = score_gradient(counts, expected, advantages(losses))
    assert np.allclose(found, exact / losses.std() * n / (n - 1), atol=1e-12)
    assert np.allclose(advantages(losses + 1000), advantages(losses))
    assert not advantages(np.ones(5)).any() and not advantages(np.array([3.0])).any()
    others = [losses[i] - np.delete(losses, i).mean() for i in range(n)]  # each against the mean of the others
    assert np.allclose(advantages(losses), others / losses.std())


def test_advantages_reduce_the_variance_of_the_gradient():
    _, _, alphas = enumerated()
    rng, p = np.random.default_rng(0), softmax(alphas)
    plain, centred = [], []
    for _ in range(400):
        counts = rng.multinomial(3, p, 8)
        losses = loss_of(counts)
        plain.append(score_gradient(counts, 3 * p, losses))
        centred.append(score_gradient(counts, 3 * p, advantages(losses) * losses.std()))
    assert np.var(centred, axis=0).sum() < 0.5 * np.var(plain, axis=0).sum()
    assert np.allclose(np.mean(plain, axis=0), exact_gradient(alphas), atol=0.25)
    assert np.allclose(np.mean(centred, axis=0), exact_gradient(alphas), atol=0.1)


def test_descent_is_sgd_with_momentum_clipping_and_decay():
    start, gradients = np.array([1.0, -2.0, 0.5]), [np.array([3.0, 4.0, 0.0]), np.array([0.1, 0.0, -0.2])]
    ours = [start.copy()]
    descent = Descent(ours, 0.1, 0.9, 0.5, 2.0)
    theirs = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for gradient in gradients:
        descent.step(ours, [gradient], [False])
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    assert np.allclose(ours[0], theirs.detach().numpy(), atol=1e-6)


def test_a_layer_rests_after_ten_steps_in_a_row():
    freezer = Freezer(2, 0.8, 10)
    for step in range(19):
        assert not freezer.frozen.any()
        freezer.look([0.8, 0.9 if step != 9 else 0.7] if step != 4 else [0.79, 0.9])
        if step == 14:  # ten since step 4
            break
    assert freezer.frozen.tolist() == [True, False]
    for _ in range(5):
        freezer.look([0.1, 0.9])
    assert freezer.frozen.tolist() == [True, True]  # a layer that rests goes on resting
    alphas = [np.zeros(2), np.zeros(2)]
    Descent(alphas, 1.0, 0.0, 1.0, 10.0).step(alphas, [np.ones(2), np.ones(2)], [True, False])
    assert not alphas[0].any() and (alphas[1] == -1).all()


def test_rounding_keeps_the_total_and_is_nearest():
    assert rounded(np.array([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert rounded(np.array([0.4, 0.35, 0.25]), 4).tolist() == [2, 1, 1]
    assert rounded(np.full(7, 1 / 7), 4).sum() == 4
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = rng.dirichlet(np.ones(5))
        counts = rounded(shares, 9)
        assert counts.sum() == 9 and np.abs(counts - 9 * shares).max() < 1


# -- partitions -------------------------------------------------------------------------------------------------------


def partitions_of(prune: bool, choices: Choices = FREE, budget=None) -> tuple[Problem, Partitions]:
    problem = problem_of(budget=budget or {"size": 0.2}, choices=choices)
    genome = Genome(problem.space)
    return problem, Partitions(genome, genome.homogeneous(4, 0.25), prune)


@pytest.mark.parametrize("prune", (False, True))
def test_counts_sum_to_the_filters_and_are_the_policys_own(prune):
    problem, partitions = partitions_of(prune)
    rng, alphas = np.random.default_rng(0), partitions.initial(0.0)
    for counts in [*(partitions.draw(alphas, rng) for _ in range(5)), partitions.deterministic(alphas)]:
        policy = partitions.genome.policy(partitions.values(counts))
        policy.validate(problem.network)
        for choice, n in zip(partitions.choices, counts, strict=True):
            layer = problem.network.layers[choice.layer]
            assert n.sum() == choice.parts == layer.c_out
            bits = policy.weight_bits[layer.name]
            order = np.argsort(-problem.space.scores[layer.name][bits > 0], kind="stable")
            assert (np.diff(bits[bits > 0][order].astype(int)) <= 0).all()  # the most important get the most
            if (choice.sparsity is not None or prune) and n[0] == 0 and (bits > 0).all():
                assert [int((bits == b).sum()) for b in choice.options] == n.tolist()
            if choice.sparsity is not None:
                pruned = int((bits == 0).sum())
                assert pruned <= n[0] and (pruned == n[0] or n[0] > 0.8 * layer.c_out or n[0] == layer.c_out)
                if pruned == n[0]:
                    assert [int((bits == b).sum()) for b in choice.options] == n.tolist()


def test_without_pruning_the_spaces_stay_as_they_are_at_home():
    problem, partitions = partitions_of(prune=False)
    rng, alphas = np.random.default_rng(1), partitions.initial(0.5)
    home = partitions.genome.policy(partitions.home).alive(problem.network)
    assert not home.all()
    for _ in range(5):
        policy = partitions.genome.policy(partitions.values(partitions.draw(alphas, rng)))
        assert (policy.alive(problem.network) == home).all()
        assert all(min(choice.options) > 0 for choice in partitions.choices)


def test_first_probabilities_are_the_papers():
    _, partitions = partitions_of(prune=False, choices=Choices(weight_bits=(2, 3, 4, 8), act_bits=(4, 8)))
    for choice, alpha in zip(partitions.choices, partitions.initial(0.0), strict=True):
        p, k = softmax(alpha), len(choice.options)
        expected = [2 / 7, 2 / 7, 2 / 7, 1 / 7] if choice.kind == "width" else [0.5, 0.5]
        assert np.allclose(p, expected, atol=1e-9)
        assert choice.kind == "act" or p[-1] == pytest.approx(1 / (2 * k - 1))
    for choice, alpha in zip(partitions.choices, partitions.initial(1.0), strict=True):
        assert softmax(alpha)[choice.options.index(4 if choice.kind == "width" else 8)] == pytest.approx(1, abs=1e-9)


def test_home_is_what_full_trust_makes():
    for prune in (False, True):
        _, partitions = partitions_of(prune)
        counts = partitions.deterministic(partitions.initial(1.0))
        ours = partitions.genome.policy(partitions.values(counts))
        assert ours.digest() == partitions.genome.policy(partitions.home).digest()


@pytest.mark.parametrize("prune", (False, True))
def test_expected_costs_are_the_mean_of_drawn_ones(prune):
    problem, partitions = partitions_of(prune, budget={"size": 0.3, "bops": 0.2})
    rng, alphas = np.random.default_rng(0), partitions.initial(0.3)
    values = [partitions.values(partitions.draw(alphas, rng)) for _ in range(60)]
    drawn = [Account(partitions.genome, problem.budget, value).total for value in values]
    assert np.allclose(partitions.expected_costs(alphas, problem), np.mean(drawn, axis=0), rtol=0.08 if prune else 0.02)


def test_tilting_meets_the_budget_and_no_more_and_leaves_resting_layers():
    problem, partitions = partitions_of(False, budget={"size": 0.07})
    alphas = partitions.initial(0.0)
    still = alphas[2].copy()
    frozen = np.arange(len(alphas)) == 2
    assert not problem.budget.fits(partitions.expected_costs(alphas, problem))
    partitions.meet(alphas, problem, frozen)
    used = partitions.expected_costs(alphas, problem) / problem.budget.caps
    assert 0.98 < used[0] <= 1 + 1e-9 and (alphas[2] == still).all()
    before = [alpha.copy() for alpha in alphas]
    partitions.meet(alphas, problem, frozen)
    assert all((a == b).all() for a, b in zip(alphas, before, strict=True))


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "evaluations"), [({"trust": 0.0, "prune": True}, 12), pytest.param({}, 30, marks=pytest.mark.slow)]
)
def test_it_keeps_the_rules_of_backends(options, evaluations):  # as it is: among all of the configuration, test_testing
    check_backend(lambda evaluations, seed: FilterNAS(evaluations, seed, **options), evaluations=evaluations)


def test_it_learns_a_profile_of_widths_within_budget():
    def reward(make) -> float:
        choices = Choices(weight_bits=(2, 4, 6, 8), first_last=None)
        problem = problem_of(budget={"size": 0.14}, evaluator=profile, choices=choices)
        return make.search(problem).score.reward

    def mean(**options) -> float:
        return float(np.mean([reward(FilterNAS(100, seed, objective="reward", **options)) for seed in range(2)]))

    learned = mean()
    assert learned > mean(lr=0.0) + 0.05
    assert learned > np.mean([reward(RandomSearch(100, seed)) for seed in range(2)])


def test_seeds_repeat_and_the_problem_is_left_alone():
    network = network_of("digits_cnn")
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    first, again, other = (
        FilterNAS(20, seed, objective="reward").search(problem_of(evaluator=profile)) for seed in (0, 0, 1)
    )
    assert digests(first) == digests(again) != digests(other)
    assert first.evaluations == 20 and all(evaluation.score.within for evaluation in first.history)
    assert all(torch.equal(t, before[name]) for name, t in network.module.state_dict().items())


def test_it_beats_uniform_at_the_same_size_on_a_trained_network():
    torch.manual_seed(0)
    model, data = digits_cnn(), digits(seed=0)
    fit(model, data.train, epochs=3, lr=0.1, seed=0)
    problem = Problem(model.eval(), data.calibration, data.search, {"size": 0.055}, reward=divergence_reward)
    found = FilterNAS(30, seed=0).search(problem.again())
    uniform = Uniform(30).search(problem.again())
    assert found.score.within and found.score.reward > uniform.score.reward + 0.1


def test_the_penalty_makes_partitions_cheaper():
    def last_half(penalty: float) -> float:
        problem = problem_of(budget={"size": 0.9, "bops": 0.9}, evaluator=lambda policy: 0.5 + 0 * policy.mean_bits())
        FilterNAS(
            100, 0, penalty=penalty, cost="size", objective="reward", trust=0.0, fill=0.0, lr=0.5, samples=19
        ).search(problem)
        return float(np.mean([e.score.ratios["size"] for e in problem.history[-19:]]))

    assert last_half(1.0) < last_half(0.0) - 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"cost": "joule"}, "cost must be one of size, macs, bops or null, but it is 'joule'"),
        ({"objective": "accuracy"}, "objective must be 'loss' or 'reward', but it is 'accuracy'"),
        ({"samples": 1}, "`samples >= 2` must hold"),
        ({}, "needs the loss, but the evaluator measures accuracy only; use search.objective=reward"),
    ),
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(AjpqError, match=message):
        FilterNAS(4, **options).search(problem_of())
