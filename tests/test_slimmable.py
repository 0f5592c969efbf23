"""Slimmable widths: the distributions, the loss, and what the search finds."""

import itertools

import numpy as np
import pytest
import torch
from nets import network_of, problem_of
from scipy import stats

from agents.genes import Genome
from agents.score_function import score_gradient, softmax
from agents.slimmable import Frontier, Slimmable
from agents.uniform import Uniform
from agents.width_distributions import DISTRIBUTIONS, Binomial, Categorical, blocks_of
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.models import digits_cnn
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult
from ajpq.rewards import divergence_reward
from ajpq.space import Choices
from ajpq.testing import check_backend
from ajpq.training import fit

PRUNE = Choices(weight_bits=(0, 8))


def digests(result: SearchResult) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


def late(policy: CompressionPolicy) -> float:
    """Kernels count the more the later their layer is."""
    kept = [float((bits > 0).mean()) for bits in policy.weight_bits.values()]
    return float(np.average(kept, weights=np.arange(len(kept)) ** 2 + 1))


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("q", (0.2, 0.5, 0.9))
def test_a_start_is_binomial_and_draws_have_the_stated_mean(kind, q):
    distribution, rng = DISTRIBUTIONS[kind](4), np.random.default_rng(0)
    alphas = distribution.start(q)
    assert distribution.mean(alphas) == pytest.approx(3 * q)
    drawn = distribution.draw(alphas, 20_000, rng)
    assert drawn.mean() == pytest.approx(3 * q, abs=0.03) and set(drawn.tolist()) <= {0, 1, 2, 3}
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.allclose(shares, stats.binom.pmf(np.arange(4), 3, q), atol=0.015)
    assert np.allclose(distribution.statistic(drawn) / 20_000, distribution.expected(alphas, 1), atol=0.03)


def test_categorical_takes_any_shape():
    distribution = Categorical(3)
    alphas = np.log([0.5, 0.1, 0.4])
    drawn = distribution.draw(alphas, 20_000, np.random.default_rng(1))
    assert np.allclose(np.bincount(drawn) / 20_000, [0.5, 0.1, 0.4], atol=0.015)
    assert distribution.mean(alphas) == pytest.approx(0.9)


def judge(indices) -> float:
    return float((indices[0] - 2) ** 2 + 0.5 * indices[0] * indices[1] + 1)


@pytest.mark.parametrize("distribution", (Categorical(3), Binomial(3)))
def test_the_score_function_is_the_gradient_of_the_mean_loss_of_two_spaces(distribution):
    """Weighted by their chances, all pairs of indices give what autograd gives through the chances."""
    alphas = np.array([0.3, -0.4, 0.2]) if isinstance(distribution, Categorical) else np.array([0.4])
    alpha = torch.tensor(alphas, requires_grad=True)
    if isinstance(distribution, Categorical):
        chances = torch.softmax(alpha, 0)
    else:
        q = torch.sigmoid(alpha)
        chances = torch.cat([(1 - q) ** 2, 2 * q * (1 - q), q**2])
    pairs = list(itertools.product(range(3), repeat=2))
    weight = torch.stack([chances[a] * chances[b] for a, b in pairs])
    losses = np.array([judge(pair) for pair in pairs])
    (weight * torch.tensor(losses)).sum().backward()
    drawn = np.stack([distribution.statistic(np.array(pair)) for pair in pairs])
    weights = weight.detach().numpy() * len(pairs)
    found = score_gradient(drawn, distribution.expected(alphas, 2), losses * weights)
    assert np.allclose(found, alpha.grad.numpy(), atol=1e-12) and np.abs(found).max() > 0.05


def test_blocks_share_an_alpha_by_size_of_their_spaces():
    problem = problem_of("resnet20", {"macs": 0.5}, choices=PRUNE)
    genome = Genome(problem.space)
    sparsities = [i for i, gene in enumerate(genome.genes) if gene.kind == "sparsity"]
    blocks = blocks_of(genome, "block_binomial")
    sizes = [{problem.network.spaces[s].size for i in b for s in genome.genes[i].spaces} for b in blocks]
    assert sizes == [{16}, {32}, {64}] and sorted(np.concatenate(blocks).tolist()) == sparsities
    for kind in ("binomial", "categorical"):
        assert [block.tolist() for block in blocks_of(genome, kind)] == [[i] for i in sparsities]


# -- loss -------------------------------------------------------------------------------------------------------------


def test_the_gap_is_zero_on_the_curve_relative_above_and_a_tenth_below():
    frontier = Frontier(np.array([1.0, 3.0, 4.0]), np.array([2.0, 1.0, 0.5]))
    for cost, loss in ((1.0, 2.0), (2.0, 1.5), (3.0, 1.0), (3.5, 0.75), (4.0, 0.5), (0.5, 2.0), (9.0, 0.5)):
        assert frontier.gap(loss, cost) == pytest.approx(0.0, abs=1e-12)
        assert frontier.gap(1.3 * loss, cost) == pytest.approx(0.3)
        assert frontier.gap(0.7 * loss, cost) == pytest.approx(-0.03)


def test_the_gap_of_negative_losses_has_the_right_sign():
    frontier = Frontier(np.array([1.0]), np.array([-0.5]))
    assert frontier.gap(-0.4, 1.0) == pytest.approx(0.2) and frontier.gap(-0.6, 1.0) == pytest.approx(-0.02)


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_it_keeps_the_rules_of_backends(distribution):
    check_backend(lambda evaluations, seed: Slimmable(evaluations, seed, distribution), evaluations=14)


@pytest.mark.parametrize("budget", ({"macs": 0.4}, {"size": 0.06, "macs": 0.6}, {"size": 0.03}))
def test_it_keeps_hard_budgets_and_repeats_itself(budget):
    def search(seed: int) -> SearchResult:
        problem = problem_of(budget=budget, evaluator=late, choices=Choices())
        return Slimmable(16, seed, objective="reward").search(problem)

    first, again, other = search(0), search(0), search(1)
    assert digests(first) == digests(again) != digests(other)
    assert first.evaluations == 16 and all(evaluation.score.within for evaluation in first.history)


def test_drawn_networks_have_the_widths_that_were_asked_for():
    problem = problem_of(budget={"macs": 1.0}, evaluator=late, choices=PRUNE)
    result = Slimmable(20, 0, fill=0.0, widths=(0.25, 0.5, 1.0), objective="reward").search(problem)
    for evaluation in result.history:
        alive = evaluation.policy.alive(problem.network)
        for space, order in zip(problem.network.spaces, problem.space.prune_order, strict=True):
            if len(order):
                assert alive[space.channels].mean() in (0.25, 0.5, 1.0)
    means = [np.mean(list(map(np.mean, e.policy.weight_bits.values()))) for e in result.history]
    assert len(set(np.round(means, 6))) > 5


def test_the_frontier_is_measured_first_and_within_budget():
    problem = problem_of(budget={"macs": 0.6}, evaluator=late, choices=PRUNE)
    result = Slimmable(20, 0, objective="reward").search(problem)
    homogeneous = {problem.space.homogeneous(8, sparsity, 8).digest() for sparsity in (0.25, 0.5, 0.75)}
    fitting = {d for d in homogeneous if d in digests(result)[:4]}
    assert len(fitting) == 3 and Uniform().search(problem.again()).policy.digest() == digests(result)[0]


def test_it_learns_which_spaces_matter():
    def mean(**options) -> float:
        problem = problem_of(budget={"macs": 0.5}, evaluator=late, choices=PRUNE)
        found = [Slimmable(60, seed, objective="reward", **options).search(problem.again()) for seed in range(2)]
        return float(np.mean([result.score.reward for result in found]))

    problem = problem_of(budget={"macs": 0.5}, evaluator=late, choices=PRUNE)
    assert mean() > max(mean(lr=0.0), Uniform().search(problem).score.reward) + 0.01


def test_it_beats_uniform_at_the_same_size_on_a_trained_network():
    torch.manual_seed(0)
    model, data = digits_cnn(), digits(seed=0)
    fit(model, data.train, epochs=3, lr=0.1, seed=0)
    problem = Problem(
        model.eval(), data.calibration, data.search, {"size": 0.12}, choices=PRUNE, reward=divergence_reward
    )
    before = {name: tensor.clone() for name, tensor in problem.network.module.state_dict().items()}
    found = Slimmable(30, seed=0).search(problem.again())
    uniform = Uniform(30).search(problem.again())
    assert found.score.within and found.score.reward > uniform.score.reward + 0.1
    assert all(torch.equal(t, before[name]) for name, t in problem.network.module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "choices", "message"),
    (
        ({"distribution": "poisson"}, PRUNE, "one of categorical, binomial, block_binomial, but it is 'poisson'"),
        ({"widths": (0.5,)}, PRUNE, "at least two fractions in"),
        ({"widths": (0.0, 1.0)}, PRUNE, "at least two fractions in"),
        ({"cost": "joule"}, PRUNE, "cost must be one of size, macs, bops, but it is 'joule'"),
        ({"objective": "best"}, PRUNE, "objective must be 'loss' or 'reward'"),
        ({"samples": 1}, PRUNE, "`samples >= 2` must hold"),
        ({}, Choices(weight_bits=(4, 8)), "no space with a choice; put 0 into the weight_bits"),
        ({}, PRUNE, "needs the loss, but the evaluator measures accuracy only"),
    ),
)
def test_bad_settings_are_told(options, choices, message):
    with pytest.raises(AjpqError, match=message):
        Slimmable(4, **options).search(problem_of(budget={"size": 0.2}, choices=choices))


def test_softmax_of_large_alphas_is_finite():
    assert np.allclose(softmax(np.array([1000.0, 0.0])), [1, 0])


def test_a_network_in_which_little_may_be_pruned_is_slimmed_as_far_as_it_goes():
    problem = problem_of(
        "resnet20", {"macs": 0.95}, evaluator=late, choices=Choices(weight_bits=(0, 8), max_sparsity=0.3)
    )
    result = Slimmable(8, 0, objective="reward").search(problem)
    assert result.evaluations == 8 and network_of("resnet20").n_channels == problem.network.n_channels
