"""The controls: within budget, reproducible, and against answers that are known, enumerated or bounded."""

import itertools

import numpy as np
import optuna
import pytest
import torch
from nets import Net, RandomNet, batches_of, conv, network_of, problem_of, randomise
from scipy import sparse
from scipy.optimize import linprog
from torch import nn
from torch.nn import functional as F

from agents.evolution import NSGA2, _Evolution
from agents.filled_uniform import FilledUniform
from agents.genes import Account, Genome
from agents.given import Given
from agents.hill_climbing import HillClimbing
from agents.linear_program import LinearProgram, allocate
from agents.random_search import RandomSearch
from agents.sensitivity import measured_sensitivity, weight_sensitivity
from agents.uniform import Uniform, homogeneous_within
from ajpq import quantize
from ajpq.control import Beside, told
from ajpq.elimination import elimination
from ajpq.errors import AjpqError
from ajpq.importance import magnitude
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult
from ajpq.scoring.setting import each
from ajpq.space import Choices
from ajpq.step_sizes import fit_scale
from ajpq.tracing import trace

SEEDED = (HillClimbing, NSGA2, RandomSearch)
BACKENDS = (*SEEDED, Uniform, FilledUniform, LinearProgram)
SETTINGS = {
    "size": ("digits_cnn", {"size": 0.08}, Choices(weight_bits=(0, 2, 4, 8), first_last=None, blocks=2)),
    "inputs": ("small", {"size": 0.35, "bops": 0.01, "macs": 0.7}, Choices(act_bits=(2, 4, 8), first_last=None)),
    "kernels": ("small", {"size": 0.27}, Choices(blocks="max", first_last=None)),
    "pruning": ("digits_cnn", {"macs": 0.5}, Choices(weight_bits=(0, 8))),
    "widths": ("digits_cnn", {"size": 0.2, "bops": 0.04}, Choices(weight_bits=(2, 4, 8))),
}


def profile(policy: CompressionPolicy) -> float:
    """At most -1, where the mean width falls from 6 bits in the first layer to 2 in the last."""
    bits = list(policy.weight_bits.values())
    return -1 - float(np.mean([(b.mean() - (6 - 4 * i / (len(bits) - 1))) ** 2 for i, b in enumerate(bits)]))


def on(setting: str, evaluator=profile) -> Problem:
    name, budget, choices = SETTINGS[setting]
    return problem_with(small() if name == "small" else network_of(name), budget, choices, evaluator)


def problem_with(network: Network, budget, choices: Choices, evaluator=profile, **options) -> Problem:
    options |= {"choices": choices, "evaluator": each(evaluator)}
    return Problem(network, batches_of(network), batches_of(network, seed=1), budget, **options)


def small(seed: int = 0) -> Network:
    """Two convolutions and a linear layer, 8 channels each."""
    torch.manual_seed(seed)
    model = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))), a=conv(3, 8), b=conv(8, 8), c=nn.Linear(8, 10)
    )
    return trace(randomise(model, seed), torch.randn(2, 3, 8, 8))


def digests(result: SearchResult) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


def make(kind, evaluations: int, seed: int = 0):
    return kind(evaluations, seed) if kind in SEEDED else kind(evaluations)


# -- every control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_control_keeps_to_its_budgets_and_evaluations_and_repeats_itself(kind, setting):
    result, again = (make(kind, 9).search(on(setting)) for _ in range(2))
    assert digests(result) == digests(again)
    assert 1 <= result.evaluations <= 9 and len(set(digests(result))) == result.evaluations
    assert all(evaluation.score.within for evaluation in result.history)
    assert result.score.reward == max(evaluation.score.reward for evaluation in result.history)
    if kind in SEEDED:
        assert result.evaluations == 9
        assert digests(make(kind, 9, seed=1).search(on(setting))) != digests(result)


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_control_ends_when_there_is_nothing_new(kind):
    several = Choices(weight_bits=(4, 8), blocks=1, act_bits=(4, 8))  # one layer with a choice: four policies
    assert 1 <= make(kind, 15).search(problem_with(small(), {"size": 1.0}, several)).evaluations <= 4
    assert make(kind, 15).search(problem_with(small(), {"size": 1.0}, Choices(weight_bits=(8,)))).evaluations == 1


@pytest.mark.parametrize("kind", (HillClimbing, NSGA2))
def test_searches_beat_random_at_equal_evaluations_and_what_they_start_from(kind):
    def mean(kind) -> float:
        return float(np.mean([make(kind, 50, seed).search(on("size")).score.reward for seed in range(2)]))

    assert mean(kind) > max(mean(RandomSearch), Uniform().search(on("size")).score.reward) + 0.3


# -- genes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", (1, 3, "max"))
@pytest.mark.parametrize("seed", range(3))
def test_genes_are_the_decisions_of_a_draft(seed, blocks):
    network = trace(randomise(RandomNet(seed)), torch.randn(2, 3, 8, 8))
    choices = Choices(blocks=blocks, act_bits=(4, 8), first_last=None if seed % 2 else 8)
    problem = problem_with(network, {"size": 0.2, "bops": 0.02}, choices)
    genome, random = Genome(problem.space), np.random.default_rng(seed)
    for _ in range(3):
        account = Account(genome, problem.budget, random.integers(0, genome.levels))
        policy = genome.policy(account.values)
        policy.validate(network)
        assert problem.budget.admits(policy) == account.fits
        account.trim(random)
        account.fill(random.permutation(len(genome)))
        policy, fresh = genome.policy(account.values), Account(genome, problem.budget, account.values)
        assert np.allclose(account.costs, fresh.costs, rtol=1e-12) and (account.alive == fresh.alive).all()
        assert problem.budget.admits(policy)
        assert genome.follow(problem.draft(), account.values).digest() == policy.digest()
        assert genome.policy(genome.values_of(policy)).digest() == policy.digest()


def test_homogeneous_genes_are_the_homogeneous_policy():
    problem = on("inputs")
    genome = Genome(problem.space)
    for width, sparsity, act in itertools.product((1, 4, 8), (0.0, 0.1, 0.33, 0.5, 0.79, 0.8), (2, 8)):
        values = genome.homogeneous(width, sparsity, act)
        assert genome.policy(values).digest() == problem.space.homogeneous(width, sparsity, act).digest()
    assert genome.policy(genome.cheapest()).digest() == problem.space.cheapest().digest()


def test_no_cost_falls_when_a_gene_grows():
    problem = on("kernels")
    genome, random = Genome(problem.space), np.random.default_rng(0)
    for _ in range(3):
        account = Account(genome, problem.budget, random.integers(0, genome.levels))
        for i in random.choice(len(genome), 20):
            if account.values[i] + 1 < genome.levels[i]:
                assert (account.look(i, account.values[i] + 1)[0] >= 0).all()


def test_trimming_spares_what_it_can():
    problem = on("size")
    genome = Genome(problem.space)
    account = Account(genome, problem.budget, genome.levels - 1)
    assert not account.fits
    account.trim(np.random.default_rng(0), spare=[0, 5])
    assert account.fits and (account.values[[0, 5]] == genome.levels[[0, 5]] - 1).all()


# -- uniform and filled uniform ---------------------------------------------------------------------------------------


def test_uniform_spreads_few_evaluations():
    widths = [p.width for p in homogeneous_within(on("inputs")) if p.act_bits == 8]
    assert widths == [8, 6, 4, 3, 2, 1]
    few = {round(e.policy.mean_bits(), 2) for e in Uniform(3).search(on("inputs")).history}
    all_ = sorted(round(p.policy(on("inputs")).mean_bits(), 2) for p in homogeneous_within(on("inputs")))
    assert len(few) == 3 and {all_[0], all_[-1]} & few


def can_rise(account: Account, i: int) -> bool:
    """Whether gene i is a width, of kernels that are there, and not the largest."""
    higher = int(account.values[i]) + 1
    if account.genome.genes[i].kind == "sparsity" or higher == account.genome.levels[i]:
        return False
    return bool(account.look(i, higher)[0].any())


@pytest.mark.parametrize("setting", ("size", "inputs", "kernels", "widths"))
def test_filled_uniform_is_homogeneous_but_for_one_width_higher_wherever_that_fits(setting):
    problem = on(setting)
    result, genome = FilledUniform(1000).search(problem), Genome(problem.space)
    bases = [point.values(genome) for point in homogeneous_within(problem)]
    filled = []
    for evaluation in result.history:
        same = [base for base in bases if (genome.alive(base) == evaluation.policy.alive(problem.network)).all()]
        rests = [
            gene.kind == "width"
            and gene.block >= len(genome.blocks(gene.layer, evaluation.policy.alive(problem.network)))
            for gene in genome.genes
        ]
        steps = [(base, np.where(rests, 0, genome.values_of(evaluation.policy) - base)) for base in same]
        fits = []
        for base, step in steps:
            if step.min() >= 0 and step.max() <= 1:
                account = Account(genome, problem.budget, base + step)
                assert genome.policy(account.values).digest() == evaluation.policy.digest()
                still = [i for i in np.flatnonzero(step == 0) if can_rise(account, i)]
                fits.append(not any(account.raised(i) for i in still))
        assert any(fits)
        filled.append(max(step.sum() for _, step in steps))
    assert np.mean(np.array(filled) > 0) > 0.6 and len(filled) > 2


def test_filled_uniform_spends_what_uniform_leaves():
    def roots(policy: CompressionPolicy) -> float:
        return float(np.sqrt(np.concatenate(list(policy.weight_bits.values()))).mean())

    problem = problem_of("resnet20", {"size": 0.0625}, evaluator=roots)
    uniform, filled = Uniform().search(problem), FilledUniform().search(problem.again())
    assert filled.score.reward > uniform.score.reward
    assert uniform.score.ratios["size"] < filled.score.ratios["size"] <= 0.0625
    assert filled.score.ratios["size"] > 0.0623


def test_no_homogeneous_policy_within_budget_is_told_or_passed_over():
    """One width, no pruning but at the ends: only a mixture of widths fits."""
    choices, network = Choices(weight_bits=(8,), act_bits=(2, 8)), network_of("digits_cnn")
    floor = Problem(network, batches_of(network), [], {"size": 1.0}, choices=choices, evaluator=each(profile))
    limit = floor.budget.ratios(floor.space.cheapest())["bops"]
    for kind in (Uniform, FilledUniform):
        assert kind().search(problem_with(network, {"bops": limit * 1.0001}, choices)).evaluations >= 1


# -- NSGA-II ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ("size", "inputs"))
def test_nsga2_tells_optuna_of_policies_outside_the_budgets_without_scoring_them(setting):
    problem = on(setting)
    evolution, before = _Evolution(NSGA2(60), problem), optuna.logging.get_verbosity()
    evolution.run()
    trials = [t for t in evolution.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    values = [np.array([t.params[str(i)] for i in range(len(evolution.genome))]) for t in trials]
    policies = [evolution.genome.policy(v) for v in values]
    outside = [not problem.budget.admits(policy) for policy in policies]
    assert 0.1 < np.mean(outside) < 0.6
    assert {e.policy.digest() for e in problem.history} == {
        p.digest() for p, out in zip(policies, outside, strict=True) if not out
    }
    for trial, policy, out in zip(trials, policies, outside, strict=True):
        assert (max(trial.constraints.values()) > 0) == out
        assert out or trial.value == problem.score(policy).reward
    generations = {t.system_attrs["NSGAIISampler:generation"] for t in trials}
    assert generations == set(range(max(generations) + 1)) and max(generations) >= 6
    assert optuna.logging.get_verbosity() == before


# -- linear program ---------------------------------------------------------------------------------------------------


def test_weight_sensitivity_is_noise_over_signal_of_the_folded_layer():
    network = network_of("digits_cnn")
    choices = Choices(act_bits=(2, 4, 8), first_last=None)
    found = weight_sensitivity(problem_with(network, {"size": 0.2}, choices, importance=magnitude))
    norms = {norm.folds_into: network.module.get_submodule(norm.name) for norm in network.norms}
    for layer in network.layers:
        weight, norm = network.module.get_submodule(layer.name).weight.detach(), norms.get(layer.name)
        gain = 1.0 if norm is None else (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        folded = weight.flatten(1) * torch.as_tensor(gain).reshape(-1, 1)
        for b in (1, 3, 8):
            bits = torch.full((layer.c_out,), b)
            rounded = quantize.fake_quantize(weight, bits, fit_scale(weight, bits)).flatten(1)
            noise = (folded - rounded * torch.as_tensor(gain).reshape(-1, 1)).square().sum(1)
            assert np.allclose(found.weights[layer.name][b], noise.detach() / folded.square().sum(), rtol=1e-4)
        assert found.weights[layer.name][0].sum() == pytest.approx(1.0)
        acts = found.acts[layer.name]
        assert acts[2] > 4 * acts[4] > 16 * acts[8] > 0


def test_by_elimination_pruning_costs_what_the_readers_lose():
    network = network_of("digits_cnn")
    problem = problem_with(network, {"size": 0.2}, Choices(), importance=lambda *given: elimination(*given))
    other = weight_sensitivity(problem_with(network, {"size": 0.2}, Choices(), importance=magnitude))
    found, of_channels = weight_sensitivity(problem), np.zeros(network.n_channels)
    for layer in network.layers:
        np.add.at(of_channels, layer.writes, found.weights[layer.name][0])
        widths = problem.space.widths(layer)
        assert all(np.array_equal(found.weights[layer.name][b], other.weights[layer.name][b]) for b in widths)
    for space in network.spaces:
        if space.prunable:  # several layers write some: their shares are what one channel costs
            lost = of_channels[space.channels]
            assert np.allclose(
                lost, problem.space.scores[space.writers[0]][np.argsort(network[space.writers[0]].writes)]
            )
    assert np.array_equal(found.weights["linear"][0], other.weights["linear"][0])  # its classes are never pruned


@pytest.mark.parametrize("budget", ({"size": 0.35}, {"bops": 0.02}, {"size": 0.35, "bops": 0.05}), ids=str)
@pytest.mark.parametrize(
    "choices",
    (
        Choices(weight_bits=(0, 2, 4, 8), blocks=1, first_last=None),
        Choices(weight_bits=(0, 1, 6), blocks=2, first_last=None),
    ),
    ids=("layers", "blocks"),
)
@pytest.mark.parametrize(("importance", "gap"), ((magnitude, 1e-9), (elimination, 0.15)))
def test_lp_finds_the_best_of_all_policies_of_a_small_problem(choices, budget, importance, gap):
    """By elimination, whose errors are far from linear in a sparsity, nearly."""
    problem = problem_with(small(), budget, choices, importance=importance)
    genome, table = Genome(problem.space), weight_sensitivity(problem).pruning_counts(2.0)
    best = np.inf
    for values in itertools.product(*map(range, genome.levels)):
        policy = genome.policy(np.array(values))
        loss = table.of(problem.network, policy)
        best = loss if loss < best and problem.budget.admits(policy) else best
    assert table.of(problem.network, allocate(problem)) == pytest.approx(best, rel=gap)


@pytest.mark.parametrize(("blocks", "gap"), ((4, 0.04), ("max", 0.005)))
def test_lp_comes_close_to_the_bound_of_the_relaxation(blocks, gap):
    """Widths only: the costs are linear, so the relaxation, written down here anew, is a lower bound."""
    budget = {"size": 0.1, "bops": 0.025}
    problem = problem_of(
        "resnet20" if blocks == 4 else "digits_cnn", budget, choices=Choices(weight_bits=(2, 4, 8), blocks=blocks)
    )
    table, alive = weight_sensitivity(problem), np.ones(problem.network.n_channels, bool)
    parts = [(layer, k) for layer in problem.network.layers for k in problem.space.blocks(layer, alive)]
    columns = [(i, layer, k, b) for i, (layer, k) in enumerate(parts) for b in problem.space.widths(layer)]
    loss = [table.weights[layer.name][b][k].sum() for _, layer, k, b in columns]
    bits = np.array([len(k) * layer.weights_per_kernel * b for _, layer, k, b in columns]) / 1e5
    costs = np.stack([bits, bits * [8 * layer.positions for _, layer, _, _ in columns]])
    least = problem.space.homogeneous(2)  # what does not depend on widths is paid in every policy alike
    fixed = [problem.budget.values(least)[name] / 1e5 for name in budget] - np.stack(
        [sum(c[j] for j, (_, layer, _, b) in enumerate(columns) if b == problem.space.widths(layer)[0]) for c in costs]
    )
    once = sparse.csr_array((np.ones(len(columns)), ([i for i, *_ in columns], range(len(columns)))))
    bound = linprog(loss, costs, problem.budget.caps / 1e5 - fixed, once, np.ones(len(parts))).fun
    got = table.of(problem.network, allocate(problem))
    assert bound * (1 - 1e-6) <= got <= bound * (1 + gap)


@pytest.mark.parametrize("setting", SETTINGS)
def test_lp_uses_up_the_tightest_budget_and_loses_less_than_a_homogeneous_policy(setting):
    problem = on(setting)
    table = weight_sensitivity(problem)
    policy = allocate(problem, table)
    policy.validate(problem.network)
    used = [problem.budget.ratios(policy)[name] / limit for name, limit in problem.budget.limits.items()]
    assert 0.97 < max(used) <= 1 + 1e-9
    table = table.pruning_counts(2.0)
    homogeneous = [table.of(problem.network, point.policy(problem)) for point in homogeneous_within(problem)]
    assert table.of(problem.network, policy) < min(homogeneous)
    assert problem.evaluations == 0


def test_lp_mixes_widths_and_pruning_at_a_sixteenth_of_the_size():
    problem = problem_of("resnet20", {"size": 0.0625})
    policy = allocate(problem)
    bits = np.concatenate([policy.weight_bits[layer.name] for layer in problem.network.layers[1:-1]])
    shares = np.bincount(bits, minlength=9) / len(bits)
    assert 0.0624 < problem.budget.ratios(policy)["size"] <= 0.0625
    assert shares[0] > 0.01 and shares[2] > 0.1 and shares[3] > 0.1 and shares[6:].sum() < 0.2
    narrow = {layer.name: policy.weight_bits[layer.name].mean() for layer in problem.network.layers}
    assert narrow["layer3.2.conv1"] < narrow["layer1.0.conv1"]  # 64 channels against 16: cheap kernels get more bits


def test_pruning_factor_of_lp_trades_pruning_for_width():
    problem = on("size")
    pruned = [
        sum((bits == 0).sum() for bits in allocate(problem, pruning=factor).weight_bits.values())
        for factor in (0.1, 1.0, 100.0)
    ]
    assert pruned[0] > pruned[1] >= pruned[2]


# -- measured sensitivity ---------------------------------------------------------------------------------------------

PENALTY = {1: 0.5, 2: 0.3, 3: 0.2, 4: 0.15, 6: 0.02, 8: 0.0}  # of a width, as a part of what its layer counts


def additive(network: Network, counts: dict[str, float]):
    """An accuracy that every layer lowers by itself, kernel by kernel, a pruned kernel by 1 / c_out."""

    def judge(policy: CompressionPolicy) -> float:
        lost = 0.0
        for layer in network.layers:
            bits = policy.weight_bits[layer.name]
            kernels = np.array([1.0 if b == 0 else PENALTY[int(b)] for b in bits])
            lost += counts.get(layer.name, 0.0) * (kernels.mean() + 0.1 * (8 - policy.act_bits[layer.name]))
        return -lost

    return judge


def test_measured_sensitivity_is_the_drop_of_the_reward_shared_out():
    network = small()
    counts = {"a": 1.0, "b": 5.0, "c": 0.2}
    choices = Choices(act_bits=(4, 8), first_last=None, blocks=2)
    problem = problem_with(network, {"size": 0.3}, choices, additive(network, counts))
    table, errors = measured_sensitivity(problem, 1000, prior=0.0), weight_sensitivity(problem)
    assert problem.evaluations == 1 + 3 * 5 + 2 * 4 + 3  # the reference, widths, sparsities of two spaces, inputs
    for layer in network.layers:
        for width in (1, 2, 3, 4, 6):
            measured, error = table.weights[layer.name][width], errors.weights[layer.name][width]
            assert measured.sum() == pytest.approx(counts[layer.name] * PENALTY[width])
            assert np.allclose(measured / measured.sum(), error / error.sum())
        assert table.acts[layer.name][4] == pytest.approx(0.4 * counts[layer.name])
    for name in ("a", "b"):
        pruned = problem.space.homogeneous(8, 0.8).weight_bits[name] == 0
        assert table.weights[name][0][pruned].sum() == pytest.approx(counts[name] * pruned.mean())


def test_measured_sensitivity_scores_what_it_is_allowed_and_fills_the_gaps():
    network, counts = small(), {"a": 1.0, "b": 5.0, "c": 0.2}
    for n in (1, 2, 9):
        problem = problem_with(network, {"size": 0.3}, Choices(blocks=2, first_last=None), additive(network, counts))
        table = measured_sensitivity(problem, n)
        assert problem.evaluations == n
        assert all((errors > 0).all() for by_width in table.weights.values() for errors in by_width.values())
        assert problem.budget.admits(allocate(problem, table))


def test_lp_follows_what_was_measured():
    """A reward that knows of one layer only: this layer stays wide, whatever its weights say."""
    network = network_of("digits_cnn")
    for name in ("layer2.0.conv2", "layer3.0.conv2"):
        problem = problem_with(network, {"size": 0.1}, Choices(blocks=2), additive(network, {name: 1.0}))
        result = LinearProgram(200, pruning=(1.0,)).search(problem)
        widest = [layer.name for layer in network.layers[1:-1] if result.policy.weight_bits[layer.name].min() >= 6]
        assert name in widest and len(widest) < 5
        assert result.score.reward > LinearProgram(200, "weights", (1.0,)).search(problem.again()).score.reward
        assert result.score.within and result.evaluations < 200


def test_lp_refuses_an_unknown_sensitivity():
    with pytest.raises(AjpqError, match="'weights' or 'measured', but it is 'hessian'"):
        LinearProgram(sensitivity="hessian")


# -- beside a search --------------------------------------------------------------------------------------------------


def better(policy: CompressionPolicy) -> float:
    """Uniform policies are the best there are: minus the spread of the widths of surviving kernels."""
    bits = np.concatenate([b[b > 0] for b in policy.weight_bits.values()])
    return 1 / (1 + float(bits.std()))


def test_a_search_that_its_control_beats_returns_the_control():
    problem = on("size", evaluator=better)
    result, found = Beside(problem, RandomSearch(evaluations=5, seed=0), Uniform(evaluations=3)).search()
    assert found.lost and found.policies == 3 and found.control == "Uniform"
    assert found.own == max((e.score for e in problem.history[:5]), key=lambda score: score.reward)
    assert found.other.reward == result.score.reward > found.own.reward
    assert result.evaluations == 8 and result.policy.digest() in {e.policy.digest() for e in problem.history[5:]}
    assert "the control's policy was taken" in told(found.to_json())


def test_a_search_that_beats_its_control_returns_its_own():
    problem = on("size")
    result, found = Beside(problem, HillClimbing(evaluations=60, seed=0), Uniform(evaluations=3)).search()
    alone = HillClimbing(evaluations=60, seed=0).search(on("size"))
    assert not found.lost and result.policy.digest() == alone.policy.digest() and found.own == alone.score
    assert found.other.reward < found.own.reward and "taken" not in told(found.to_json())


def test_given_policies_and_jobs_without_a_control_are_not_compared(tmp_path):
    problem = on("size", evaluator=better)
    policy = RandomSearch(evaluations=1, seed=0).search(problem).policy
    (tmp_path / "policy.json").write_text(policy.to_json())
    for backend, control in ((Given(tmp_path / "policy.json"), Uniform()), (RandomSearch(1, seed=0), None)):
        again = on("size", evaluator=better)
        result, found = Beside(again, backend, control).search()
        assert found is None and again.evaluations == 1 and result.policy.digest() == policy.digest()


def test_a_control_without_a_policy_within_budget_is_said():
    class Nothing:
        def policies(self, problem):
            return []

    result, found = Beside(on("size"), RandomSearch(evaluations=2, seed=0), Nothing()).search()
    assert found.other is None and not found.lost and result.score == found.own
    assert told(found.to_json()).endswith("its control, Nothing, has no policy within budget")
