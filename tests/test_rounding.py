"""Channels in multiples: whoever prunes, a space keeps a multiple of `round_to`, or all of its channels."""

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from nets import conv, network_of, traced
from torch import nn
from torch.nn import functional as F

from agents.genes import Genome
from ajpq.budget import Budget
from ajpq.cost import MACs, Size
from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.space import Choices, SearchSpace
from ajpq.testing import small_problem

SEARCHES = sorted(path.stem for path in (CONF / "search").glob("*.yaml") if path.stem != "policy")
COSTS = {"size": Size(), "macs": MACs()}


def kept(network: Network, policy: CompressionPolicy) -> list[tuple[int, int]]:
    """(kept, size) of every prunable space."""
    alive = policy.alive(network)
    return [(int(alive[space.channels].sum()), space.size) for space in network.spaces if space.prunable]


def in_multiples(network: Network, policy: CompressionPolicy, of: int) -> bool:
    return all(n == size or n > 0 and n % of == 0 for n, size in kept(network, policy))


def odd() -> Network:
    """Convolutions of 20, 3 and 8 kernels."""
    return traced(
        lambda m, x: m.l(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))).mean((2, 3))),
        a=conv(3, 20), b=conv(20, 3), c=conv(3, 8), l=nn.Linear(8, 5),
    )  # fmt: skip


def test_by_hand():
    space = SearchSpace(odd(), Choices(round_to=8, max_sparsity=0.8))
    wide, narrow, exact = (s for s, one in enumerate(space.network.spaces) if one.prunable)
    found = {sparsity: 20 - space.n_pruned(wide, sparsity) for sparsity in (0, 0.1, 0.2, 0.55, 0.6, 0.8)}
    assert found == {0: 20, 0.1: 20, 0.2: 16, 0.55: 16, 0.6: 8, 0.8: 8}
    assert [len(space.prune_order[s]) for s in (wide, narrow, exact)] == [12, 0, 0]
    assert kept(space.network, space.cheapest()) == [(8, 20), (3, 3), (8, 8)]
    assert kept(space.network, space.homogeneous(8, 0.3)) == [(16, 20), (3, 3), (8, 8)]


def test_what_goes_is_a_part_of_what_goes_without_rounding():
    network = network_of("resnet20")
    plain, rounded = (SearchSpace(network, Choices(round_to=n)) for n in (1, 8))
    for sparsity in np.linspace(0, 0.8, 17):
        fewer, more = rounded.alive_at(sparsity), plain.alive_at(sparsity)
        assert not (more & ~fewer).any()
        for space in network.spaces:
            assert 0 <= fewer[space.channels].sum() - more[space.channels].sum() < 8


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20", "mobilenet_v3_small", "shufflenet_v2_x0_5"))
def test_any_answers_keep_multiples_and_every_budget(name):
    network, choices = network_of(name), Choices(round_to=8)
    space = SearchSpace(network, choices)
    least = Budget(network, COSTS, {"size": 1.0}, space.cheapest()).ratios(space.cheapest())
    fewer = set()
    for seed, room in enumerate((0.0, 0.02, 0.3)):
        limits = {cost: ratio + room * (1 - ratio) for cost, ratio in least.items()}
        draft, random = Draft(space, Budget(network, COSTS, limits, space.cheapest())), np.random.default_rng(seed)
        while (decision := draft.decision) is not None:
            options = decision.options
            draft.take(random.uniform(*options) if decision.kind == "sparsity" else int(random.choice(options)))
        policy = draft.policy()
        policy.validate(network)
        assert draft.budget.admits(policy) and in_multiples(network, policy, 8)
        fewer |= {n < size for n, size in kept(network, policy)}
        for layer in network.layers:  # what it is for: kernels run in multiples
            if layer.c_out % 8 == 0 and len(np.unique(network.space_of[layer.writes])) == 1:
                assert np.count_nonzero(policy.weight_bits[layer.name]) % 8 == 0
    assert fewer == {True, False} or name == "digits_cnn"


def test_the_least_sparsity_on_offer_is_one_that_suffices():
    network = network_of("resnet20")
    space = SearchSpace(network, Choices(round_to=8))
    budget = Budget(network, COSTS, {"macs": 0.4}, space.cheapest())
    draft, raised = Draft(space, budget), 0
    while (decision := draft.decision) is not None:
        raised += decision.kind == "sparsity" and decision.options[0] > 0
        draft.take(decision.options[0] if decision.kind == "sparsity" else decision.options[-1])
    policy = draft.policy()
    assert raised and budget.admits(policy) and in_multiples(network, policy, 8)
    assert budget.ratios(policy)["macs"] > 0.3


def test_spaces_without_a_choice_are_not_asked_about():
    space = SearchSpace(odd(), Choices(round_to=8))
    draft, asked = Draft(space, Budget(space.network, COSTS, {"size": 1.0}, space.cheapest())), []
    while (decision := draft.decision) is not None:
        asked += [decision.layer.name] if decision.kind == "sparsity" else []
        draft.take(decision.options[-1])
    assert asked == ["a"]
    (gene,) = (gene for gene in Genome(space).genes if gene.kind == "sparsity")
    assert [space.n_pruned(gene.spaces[0], option) for option in gene.options] == [12, 4, 0]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_keeps_multiples(name):
    problem = small_problem(
        {"size": 0.17, "macs": 0.5}, choices=Choices(act_bits=(4, 8), first_last=None, blocks=3, round_to=4)
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        section = compose("config", [f"search={name}"]).search
    quick = {"evaluations": 8, "warmup": 4, "seed": 3, "epochs": 2}
    given = {key: value for key, value in quick.items() if key in section}
    result = instantiate(section, **given, _convert_="all").search(problem)
    policies = [evaluation.policy for evaluation in result.history] + [result.policy]
    assert all(in_multiples(problem.network, policy, 4) for policy in policies)
    assert all(evaluation.score.within for evaluation in result.history)
    assert {n % 4 for policy in policies for n, _ in kept(problem.network, policy)} == {0}
    assert any(n < size for policy in policies for n, size in kept(problem.network, policy))
    problem.close()


def test_a_budget_that_rounding_puts_out_of_reach_is_an_error_that_names_the_least():
    problem = small_problem({"macs": 0.1}, choices=Choices(first_last=None))
    problem.close()
    with pytest.raises(AjpqError, match=r"macs=0.1 \(smallest reachable"):
        small_problem({"macs": 0.1}, choices=Choices(first_last=None, round_to=8))


@pytest.mark.parametrize("value", (0, -4, 2.5, "8"))
def test_multiples_that_make_no_sense(value):
    with pytest.raises(AjpqError, match="round_to"):
        Choices(round_to=value)


@pytest.mark.parametrize("name", ("fixed", "mixed"))
def test_the_configuration_has_the_setting(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"choices={name}", "choices.round_to=8"])
    assert instantiate(cfg.choices, _convert_="all").round_to == 8
