"""The searches, on problems whose best policy is known."""

import copy
import itertools
import tempfile
from statistics import NormalDist

import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from nets import problem_of

from agents.evolution import NSGA2
from agents.genes import Genome
from agents.hierarchical import Hierarchical
from agents.hill_climbing import HillClimbing
from agents.linear_program import LinearProgram
from agents.random_search import RandomSearch
from agents.uniform import Uniform
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult
from ajpq.space import Choices
from envs.views import ChannelView, LayerView

FREE = Choices(weight_bits=(0, 2, 4, 8), first_last=None, blocks=2)


def widest(policy: CompressionPolicy) -> float:
    """1 where every kernel has 8 bits: the best policy is known."""
    return policy.mean_bits() / 8


def narrowest(policy: CompressionPolicy) -> float:
    """Highest where every kernel is pruned that may be, and all others have 2 bits."""
    return 1 - policy.mean_bits() / 8


def on(evaluator, limit: float = 0.5, choices: Choices = FREE) -> Problem:
    return problem_of(budget={"size": limit}, evaluator=evaluator, choices=choices)


def digests(result: SearchResult) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


def mean_reward(make, evaluator, seeds: int = 2) -> float:
    return float(np.mean([make(seed).search(on(evaluator)).score.reward for seed in range(seeds)]))


def test_a_search_leaves_nothing_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Hierarchical(4, 0, warmup=2).search(on(widest))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("evaluator", (widest, narrowest))
def test_hierarchical_learns_and_beats_random_at_equal_evaluations(evaluator):
    """The two optima are opposite corners: an actor that saturates whatever the reward says finds one at most."""
    best = evaluator(on(evaluator).space.homogeneous(8) if evaluator is widest else on(evaluator).space.cheapest())
    learned = mean_reward(lambda seed: Hierarchical(24, seed, warmup=10), evaluator)
    drawn = mean_reward(lambda seed: RandomSearch(24, seed), evaluator)
    assert learned > drawn + 0.03
    assert best - learned < 0.5 * (best - drawn)


class Spy(stable_baselines3.DDPG):
    """DDPG that remembers its instances."""

    made: list = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.made.append(self)


def test_every_decision_is_stored_with_the_normal_score_of_the_reward_of_its_episode():
    Spy.made, rewards = [], []
    Hierarchical(
        12, 0, algorithm=Spy, warmup=7, gradient_steps=1, on_episode=lambda number, reward, best: rewards.append(reward)
    ).search(on(widest))
    assert len(rewards) == 12 and len(set(rewards)) > 8
    below = [sum(other < r for other in rewards) + sum(other == r for other in rewards) / 2 for r in rewards]
    expected = [NormalDist().inv_cdf(rank / 12) for rank in below]
    assert len(Spy.made) == 2
    for model in Spy.made:
        stored = model.replay_buffer.rewards[: model.replay_buffer.pos, 0]
        assert len(stored) > 12 and (model.replay_buffer.dones[: len(stored)] == 1).all()
        assert np.allclose(np.unique(stored.round(4)), np.unique(np.round(expected, 4)), atol=2e-4)
        assert np.abs(model.replay_buffer.actions[: len(stored)]).max() <= 1


def test_a_replay_buffer_that_is_full_forgets_the_oldest():
    Spy.made = []
    Hierarchical(14, 0, algorithm=Spy, warmup=3, gradient_steps=1, buffer_size=50).search(on(widest))
    for model in Spy.made:
        assert model.replay_buffer.full and np.isfinite(model.replay_buffer.rewards).all()


def test_a_search_begins_with_the_evaluations_of_its_start():
    first = LinearProgram(8).search(on(widest, 0.3))
    result = Hierarchical(16, 0, start=LinearProgram(), share=0.5, warmup=6, gradient_steps=2).search(on(widest, 0.3))
    assert digests(result)[: first.evaluations] == digests(first) and result.evaluations == 16
    assert result.score.reward >= first.score.reward


def test_critics_choose_better_episodes_than_chance():
    learned = mean_reward(lambda seed: Hierarchical(24, seed, warmup=10), narrowest)
    blind = mean_reward(
        lambda seed: Hierarchical(24, seed, warmup=10, elite=1.0, candidates=1, gradient_steps=0), narrowest
    )
    assert learned > blind


@pytest.mark.parametrize(
    "algorithm", ("DDPG", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SAC", "TQC")))
)
def test_a_search_that_continues_from_its_state_ends_as_if_it_had_never_stopped(algorithm):
    def make() -> Hierarchical:
        return Hierarchical(18, 0, algorithm=algorithm, start=LinearProgram(), warmup=6, gradient_steps=5, elite=0.0)

    whole = make().search(on(widest, 0.3))
    kept = {}

    def keep(backend) -> None:
        if problem.evaluations == 9:
            kept.update(copy.deepcopy(backend.state_dict()))

    problem = on(widest, 0.3)
    problem.checkpoint = keep
    make().search(problem)
    again, backend = on(widest, 0.3), make()
    again.score_all([evaluation.policy for evaluation in problem.history[:9]])
    backend.load_state_dict(kept)
    np.random.seed(5), torch.manual_seed(5)
    assert digests(backend.search(again))[9:] == digests(whole)[9:]


def test_the_state_of_sac_holds_the_weight_of_its_entropy():
    backend = Hierarchical(14, 0, algorithm="SAC", warmup=6, gradient_steps=5)
    backend.search(on(widest, 0.3))
    state, other = backend.state_dict(), Hierarchical(14, 1, algorithm="SAC")
    other._prepare(on(widest, 0.3))
    other._continue(state)
    for who, controller in backend.controllers.items():
        weight = controller.model.log_ent_coef
        assert weight.item() != 0 and torch.equal(other.controllers[who].model.log_ent_coef, weight)


def test_rewards_that_are_not_finite_spoil_no_search():
    """Every fourth evaluation fails; what learned from the others still chooses by numbers."""
    for backend, bad in (
        (Hierarchical(20, 0, warmup=6, gradient_steps=2), float("nan")),
        (Hierarchical(30, 0, start=LinearProgram(), warmup=4, gradient_steps=2), -float("inf")),
        (LinearProgram(40), float("nan")),
        (HillClimbing(20), -float("inf")),
    ):
        count = itertools.count()
        result = backend.search(on(lambda policy: bad if next(count) % 4 == 1 else widest(policy)))  # noqa: B023
        assert np.isfinite(result.score.reward) and result.evaluations > 8
        for controller in getattr(backend, "controllers", {}).values():
            assert all(torch.isfinite(p).all() for p in controller.model.policy.parameters())


def test_a_search_keeps_its_own_state_and_not_that_of_its_start():
    class Saving(RandomSearch):
        def search(self, problem):
            problem.save(self)
            return super().search(problem)

    problem, kept = on(widest), []
    problem.checkpoint = kept.append
    backend = Hierarchical(14, 0, start=Saving(), warmup=3, gradient_steps=1)
    backend.search(problem)
    assert kept and all(one is backend for one in kept)


def test_a_start_that_fills_the_warmup_is_learned_from_as_much():
    Spy.made, trained = [], []

    class Counting(Spy):
        def train(self, gradient_steps, batch_size=100):
            trained.append(gradient_steps)
            super().train(gradient_steps, batch_size)

    Hierarchical(12, 0, algorithm=Counting, start=RandomSearch(), share=0.5, warmup=4, gradient_steps=2).search(
        on(widest)
    )
    assert trained[:2] == [20, 20] and set(trained[2:]) == {2}


def test_a_policy_that_skips_a_branch_has_values():
    genome = Genome(on(widest).space)
    network = genome.network
    policy = genome.policy(genome.levels - 1)
    weights = {name: bits * (name not in network.branches[0].layers) for name, bits in policy.weight_bits.items()}
    values = genome.values_of(CompressionPolicy(weights, dict(policy.act_bits)))
    assert values.shape == genome.levels.shape


def test_per_kernel_decisions():
    choices = Choices(weight_bits=(0, 2, 8), first_last=None, blocks="max")
    result = Hierarchical(10, 0, warmup=4, gradient_steps=2).search(on(widest, 0.3, choices))
    assert result.evaluations == 10 and result.score.within
    mixed = [len(set(bits[bits > 0].tolist())) > 1 for e in result.history for bits in e.policy.weight_bits.values()]
    assert sum(mixed) > 3


@pytest.mark.slow
def test_hierarchical_beats_random_where_the_best_width_depends_on_the_layer():
    def judge(policy: CompressionPolicy) -> float:
        bits = list(policy.weight_bits.values())
        return float(np.exp(-np.mean([(b.mean() - (2 + 4 * i / (len(bits) - 1))) ** 2 for i, b in enumerate(bits)])))

    def reward(make) -> float:
        choices = Choices(first_last=None)
        return float(np.mean([make(seed).search(on(judge, 0.2, choices)).score.reward for seed in range(4)]))

    assert reward(lambda seed: Hierarchical(100, seed, warmup=20)) > reward(lambda seed: RandomSearch(100, seed)) + 0.05


def test_hierarchical_is_reproducible():
    first, again = (Hierarchical(10, 3, warmup=5).search(on(widest)) for _ in range(2))
    other = Hierarchical(10, 4, warmup=5).search(on(widest))
    assert digests(first) == digests(again) != digests(other)
    assert first.evaluations == 10 == len(set(digests(first)))
    assert first.score.reward == max(e.score.reward for e in first.history)


@pytest.mark.parametrize("algorithm", ("DDPG", "TD3", "SAC", "TQC", stable_baselines3.TD3))
def test_hierarchical_works_with_every_algorithm_for_continuous_actions(algorithm):
    told = []
    result = Hierarchical(
        9, 0, algorithm=algorithm, warmup=5, gradient_steps=4, on_episode=lambda *row: told.append(row)
    ).search(on(widest, 0.06, Choices(act_bits=(4, 8))))
    assert result.evaluations == 9 and all(e.score.within for e in result.history)
    assert [row[0] for row in told] == list(range(1, len(told) + 1)) and told[-1][2] == max(row[1] for row in told)


@pytest.mark.parametrize(
    "algorithm", ("PPO", "A2C", "DQN", "CrossQ", "Genetic", "", stable_baselines3.PPO, stable_baselines3.DQN, None, 3)
)
def test_hierarchical_refuses_other_algorithms(algorithm):
    with pytest.raises(AjpqError, match="algorithm must be DDPG, TD3, SAC, TQC.*but it is"):
        Hierarchical(10, algorithm=algorithm)


@pytest.mark.parametrize(
    "choices", (Choices(weight_bits=(2, 4, 8)), Choices(weight_bits=(0, 8))), ids=("quantize", "prune")
)
def test_hierarchical_with_one_controller_idle(choices):
    result = Hierarchical(10, 0, warmup=4, gradient_steps=2).search(on(widest, 0.6, choices))
    assert result.evaluations >= 5 and result.score.within


def test_hierarchical_with_views_of_the_users_own():
    class Blind(ChannelView):
        def observe(self, draft):
            return super().observe(draft) * 0

    result = Hierarchical(
        8, 0, warmup=4, gradient_steps=2, views=lambda problem: {"layer": LayerView(problem), "channel": Blind(problem)}
    ).search(on(widest))
    assert result.evaluations == 8


def test_hierarchical_takes_no_view_that_decodes_actions():
    class Unit(ChannelView):
        def __init__(self, problem):
            super().__init__(problem)
            self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)

    class Twice(ChannelView):
        def apply(self, draft, action):
            super().apply(draft, 2 * action)

    for view in (Unit, Twice):
        with pytest.raises(AjpqError, match="derive it from ChannelView without `apply`, or use search=single"):
            Hierarchical(8, 0, warmup=4, views=lambda problem, view=view: {"channel": view(problem)}).search(on(widest))


def test_hierarchical_stops_when_there_is_nothing_new():
    """Two policies in all: it must not look for a third for ever."""
    result = Hierarchical(30, 0, warmup=3, gradient_steps=1).search(
        on(widest, 1.0, Choices(weight_bits=(0, 8), act_bits=(8,), max_sparsity=0.0))
    )
    assert result.evaluations <= 2


def test_hierarchical_without_warm_up():
    assert Hierarchical(4, 0, warmup=0, gradient_steps=1).search(on(widest)).evaluations == 4


def test_random_search_is_reproducible_and_varied():
    first, again, other = (RandomSearch(20, seed).search(on(widest)) for seed in (0, 0, 1))
    assert digests(first) == digests(again) != digests(other)
    assert len(set(digests(first))) == first.evaluations == 20
    assert all(evaluation.score.within for evaluation in first.history)
    assert first.score.reward == max(evaluation.score.reward for evaluation in first.history)


def test_random_search_stops_when_there_is_nothing_new():
    result = RandomSearch(30, 0).search(on(widest, 1.0, Choices(weight_bits=(8,))))
    assert result.evaluations == 1


def every_homogeneous(problem: Problem) -> list[CompressionPolicy]:
    choices = problem.space.choices
    grid = np.linspace(0, choices.max_sparsity if 0 in choices.weight_bits else 0, 81)
    return [
        p
        for act in choices.act_bits
        for width in choices.weight_bits
        if width
        for sparsity in grid
        if problem.budget.admits(p := problem.space.homogeneous(width, float(sparsity), act))
    ]


@pytest.mark.parametrize("limits", ({"size": 0.5}, {"size": 0.1}, {"size": 0.06, "macs": 0.5}))
def test_uniform_finds_the_best_homogeneous_policy(limits):
    def judge(policy: CompressionPolicy) -> float:  # prefers kernels to bits, and bits to none
        bits = np.concatenate(list(policy.weight_bits.values()))
        return float((np.sqrt(bits)).mean() / 3)

    problem = problem_of(budget=limits, evaluator=judge, choices=Choices(act_bits=(4, 8)))
    result = Uniform(step=0.01).search(problem)
    best = max(judge(policy) for policy in every_homogeneous(problem))
    assert result.score.accuracy == pytest.approx(best, abs=1e-9)
    assert result.score.within and len(set(digests(result))) == result.evaluations


def test_uniform_policies_are_the_same_everywhere():
    result = Uniform().search(on(widest, 0.1, Choices(weight_bits=(0, 2, 4, 8))))
    for evaluation in result.history:
        inner = [bits for name, bits in evaluation.policy.weight_bits.items() if name not in ("conv1", "linear")]
        assert len({int(b) for bits in inner for b in bits if b}) == 1
    widths = [
        max(int(bits.max()) for name, bits in e.policy.weight_bits.items() if name not in ("conv1", "linear"))
        for e in result.history
    ]
    assert widths == sorted(widths, reverse=True) == [8, 4, 2]
    pruned = [float((e.policy.weight_bits["layer3.0.conv1"] == 0).mean()) for e in result.history]
    assert pruned[0] > pruned[1] > pruned[2]


def test_uniform_respects_its_number_of_evaluations_and_tells_when_there_is_none():
    assert Uniform(evaluations=2).search(on(widest, 0.5)).evaluations == 2
    least = on(widest, 0.5, Choices(weight_bits=(2, 4, 8))).space.cheapest()
    with pytest.raises(AjpqError, match="smallest reachable"):
        on(widest, 0.01, Choices(weight_bits=(2, 4, 8)))
    assert set(least.weight_bits["layer1.0.conv1"].tolist()) == {2}


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Hierarchical(batch=0), "batch >= 1"),
        (lambda: Hierarchical(few=0.5), "few >= 1"),
        (lambda: HillClimbing(batch=-1), "batch >= 1"),
        (lambda: HillClimbing(changes=0.5), "changes >= 1"),
        (lambda: NSGA2(population=1), "population >= 2"),
    ],
)
def test_numbers_that_no_search_can_have_are_refused(make, rule):
    with pytest.raises(AjpqError, match=rule):
        make()
