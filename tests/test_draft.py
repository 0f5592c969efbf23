"""Whatever is answered, a draft ends in a valid policy within every budget; it offers all that the budgets leave."""

import re

import numpy as np
import pytest
import torch
from nets import conv, network_of, random_policy, traced
from torch import nn
from torch.nn import functional as F

from ajpq.budget import Budget
from ajpq.cost import BOPs, MACs, Size, UniqBOPs, total
from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.importance import bn_scale, magnitude, of_channels
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.space import Choices, SearchSpace

COSTS = {"size": Size(), "macs": MACs(), "bops": BOPs(), "uniq": UniqBOPs()}
DEFAULT = Choices()


def start(network: Network, limits: dict[str, float], choices: Choices = DEFAULT) -> Draft:
    space = SearchSpace(network, choices)
    return Draft(space, Budget(network, COSTS, limits, space.cheapest()))


def floors(network: Network, choices: Choices, names: tuple[str, ...]) -> dict[str, float]:
    """The smallest ratio that each cost can reach."""
    policy, original = SearchSpace(network, choices).cheapest(), CompressionPolicy.homogeneous(network)
    return {name: total(COSTS[name], network, policy) / total(COSTS[name], network, original) for name in names}


def answer(draft: Draft, random: np.random.Generator, greed: float | None) -> float:
    """greed 1 takes the dearest answer, 0 the cheapest, None any."""
    options = draft.decision.options
    if draft.decision.kind == "sparsity":
        return (
            float(random.uniform(*options)) if greed is None else options[0] + (1 - greed) * (options[-1] - options[0])
        )
    return int(random.choice(options)) if greed is None else options[round(greed * (len(options) - 1))]


def walk(draft: Draft, random: np.random.Generator, greed: float | None = None) -> CompressionPolicy:
    while draft.decision is not None:
        draft.take(answer(draft, random, greed))
    return draft.policy()


CHOICES = {
    "default": Choices(),
    "acts": Choices(act_bits=(2, 4, 8), first_last=None),
    "max": Choices(blocks="max", weight_bits=(0, 2, 8), max_sparsity=0.6),
    "prune": Choices(weight_bits=(0, 8)),
    "quantize": Choices(weight_bits=(1, 2, 4), act_bits=(4, 8), blocks=2),
}


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize(
    "name, seeds", (("digits_cnn", 12), ("resnet20", 3), ("mobilenet_v3_small", 1), ("shufflenet_v2_x0_5", 1))
)
def test_any_answers_end_in_a_valid_policy_within_every_budget(name, seeds, what):
    network, choices = network_of(name), CHOICES[what]
    if what == "max" and name not in ("digits_cnn", "resnet20"):
        choices = Choices(blocks=8, weight_bits=(0, 2, 8))
    names = ("size", "macs", "bops") if what != "quantize" else ("size", "bops")
    least = floors(network, choices, names)
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        limits = {n: least[n] + (1 - least[n]) * float(random.choice((0, 0.02, 0.1, 0.5))) for n in names}
        limits = {n: min(1.0, limit * (1 + 1e-12)) for n, limit in limits.items()}
        draft = start(network, limits, choices)
        policy = walk(draft, random, (None, 1.0, None, 0.0, 0.5)[seed % 5])
        policy.validate(network)
        assert draft.budget.admits(policy)
        for n, limit in limits.items():
            assert total(COSTS[n], network, policy) <= limit * draft.budget.original[n] * (1 + 1e-8)
        drafted = draft.costs.sum(axis=0)
        assert np.allclose(
            drafted, [total(COSTS[n], network, policy) for n in names]
        )  # what it kept count of is the truth
        for layer in network.layers:
            widths = (
                {0, 8}
                if layer.name in (network.layers[0].name, network.layers[-1].name) and choices.first_last
                else set(choices.weight_bits)
            )
            assert set(policy.weight_bits[layer.name].tolist()) <= widths


def test_greed_uses_the_budget_and_modesty_gives_the_cheapest():
    network, random = network_of("digits_cnn"), np.random.default_rng(0)
    greedy = start(network, {"size": 0.12, "macs": 0.7})
    walk(greedy, random, 1.0)
    assert 0 <= greedy.slack.min() < 0.02
    modest = start(network, {"size": 0.12, "macs": 0.7})
    policy = walk(modest, random, 0.0)
    assert policy.digest() == SearchSpace(network).cheapest().digest()


def test_without_pressure_everything_is_on_offer():
    draft = start(network_of("digits_cnn"), {"size": 1.0})
    while (decision := draft.decision) is not None:
        assert decision.options == decision.menu
        draft.take(decision.options[-1] if decision.kind == "width" else decision.options[0])
    assert {int(b) for bits in draft.policy().weight_bits.values() for b in bits} == {8}


@pytest.mark.parametrize("limits", ({"size": 0.06}, {"size": 0.12, "macs": 0.3}, {"bops": 0.01}))
def test_options_are_maximal(limits):
    """The next wider option or smaller sparsity would break a budget even with the rest at its cheapest."""
    network = network_of("digits_cnn")
    space = SearchSpace(network, Choices(act_bits=(4, 8)))
    budget = Budget(network, COSTS, limits, space.cheapest())
    draft, random, refused = Draft(space, budget), np.random.default_rng(3), 0

    def completed(weights: dict, acts: dict) -> CompressionPolicy:
        return CompressionPolicy(
            {layer.name: weights.get(layer.name, draft.weight_bits(layer.name)) for layer in network.layers},
            {layer.name: acts.get(layer.name, draft.act_bits(layer.name)) for layer in network.layers},
        )

    while (decision := draft.decision) is not None:
        name = decision.layer.name
        if decision.kind == "sparsity":
            low = decision.options[0]
            spaces = [
                s for s in dict.fromkeys(network.space_of[decision.layer.writes].tolist()) if network.spaces[s].prunable
            ]
            channels = max(network.spaces[s].size for s in spaces)
            if low > 0:
                alive = draft.alive.copy()
                for s in spaces:
                    alive[network.spaces[s].channels] = True
                    alive[space.prune_order[s][: space.n_pruned(s, low - 1 / channels)]] = False
                weights = {
                    layer.name: np.where(
                        alive[layer.writes],
                        np.where(
                            draft.weight_bits(layer.name) > 0, draft.weight_bits(layer.name), space.widths(layer)[0]
                        ),
                        0,
                    ).astype(np.uint8)
                    for layer in network.layers
                }
                assert not budget.admits(completed(weights, {}))
                refused += 1
        else:
            for option in decision.menu:
                if decision.kind == "act":
                    policy = completed({}, {name: option})
                else:
                    bits = draft.weight_bits(name).copy()
                    bits[decision.kernels] = option
                    policy = completed({name: bits}, {})
                assert budget.admits(policy) == (option in decision.options)
                refused += option not in decision.options
        draft.take(answer(draft, random, None))
    assert refused > 3


def test_answers_outside_the_options_are_refused():
    draft = start(network_of("digits_cnn"), {"size": 0.09})
    seen = set()
    while (decision := draft.decision) is not None:
        wrong = decision.options[-1] + 0.1 if decision.kind == "sparsity" else 7
        with pytest.raises(AjpqError, match=f"{decision.kind} of '{decision.layer.name}' must be .*but it is"):
            draft.take(wrong)
        if decision.kind == "sparsity" and decision.options[0] > 0:
            with pytest.raises(AjpqError, match="within"):
                draft.take(decision.options[0] - 0.01)
        assert draft.decision is decision
        seen.add(decision.kind)
        draft.take(decision.options[0])
    assert seen == {"sparsity", "width"}


def test_the_questions_come_layer_by_layer_and_each_space_is_asked_once():
    network = network_of("resnet20")
    draft, asked = start(network, {"size": 0.2}, Choices(act_bits=(4, 8), blocks=3)), []
    while (decision := draft.decision) is not None:
        asked.append((decision.kind, decision.layer.name, decision.block))
        draft.take(decision.options[0])
    order = [layer.name for layer in network.layers]
    assert [order.index(name) for _, name, _ in asked] == sorted(order.index(name) for _, name, _ in asked)
    sparse = [name for kind, name, _ in asked if kind == "sparsity"]
    assert len(sparse) == len(set(sparse)) and "conv1" in sparse and "layer1.0.conv2" not in sparse  # the stem's space
    assert [a for a in asked if a[1] == "layer1.0.conv1"] == [
        (k, "layer1.0.conv1", b) for k, b in (("sparsity", 0), ("act", 0), ("width", 0), ("width", 1), ("width", 2))
    ]
    assert not [a for a in asked if a[1] in ("conv1", "linear") and a[0] != "sparsity"]
    assert set(draft.sparsity) == {s for s, space in enumerate(network.spaces) if space.prunable}


def test_blocks_follow_the_importance():
    network = network_of("digits_cnn")
    space = SearchSpace(network, Choices(blocks=3))
    layer = network["layer1.0.conv1"]
    alive = random_policy(network, 0).alive(network)
    blocks = space.blocks(layer, alive)
    kernels = np.concatenate(blocks)
    assert sorted(kernels) == np.flatnonzero(alive[layer.writes]).tolist() and len(blocks) == 3
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert (np.diff(space.scores[layer.name][kernels]) <= 0).all()
    assert all(len(block) == 1 for block in SearchSpace(network, Choices(blocks="max")).blocks(layer, alive))
    assert len(SearchSpace(network, Choices(blocks=1000)).blocks(layer, alive)) == len(kernels)


def test_a_norm_charged_to_a_layer_of_another_branch_is_kept_count_of():
    network = traced(
        lambda m, x: m.l(gap(torch.cat([m.n(F.relu(m.a(x))), m.b(x)], 1))),
        a=conv(3, 12, bias=False),
        n=nn.BatchNorm2d(12),
        b=conv(3, 12),
        l=nn.Linear(24, 5),
    )
    assert network.norms[0].charged_to == "b"
    least = floors(network, DEFAULT, ("size",))["size"]
    for seed in range(5):
        draft, random = start(network, {"size": 1.2 * least}), np.random.default_rng(seed)
        while draft.decision is not None:
            draft.take(answer(draft, random, (None, 1.0)[seed % 2]))
            state = CompressionPolicy(
                {layer.name: draft.weight_bits(layer.name) for layer in network.layers},
                {layer.name: draft.act_bits(layer.name) for layer in network.layers},
            )
            assert draft.costs.sum() == pytest.approx(total(Size(), network, state))
        assert draft.budget.admits(draft.policy())


@pytest.mark.parametrize("sizes", ((8, 5), (5, 8), (9, 5)))
def test_a_layer_that_writes_several_spaces_can_reach_the_floor(sizes):
    p, q = sizes
    network = traced(
        lambda m, x: (lambda y: m.l(gap(F.relu(y[:, :p] + m.b(x)))) + m.k(gap(F.relu(y[:, p:] + m.c(x)))))(m.a(x)),
        a=conv(3, p + q),
        b=conv(3, p),
        c=conv(3, q),
        l=nn.Linear(p, 5),
        k=nn.Linear(q, 5),
    )
    least = floors(network, Choices(), ("macs",))["macs"]
    draft = start(network, {"macs": least * (1 + 1e-12)})
    policy = walk(draft, np.random.default_rng(0), 1.0)
    assert draft.budget.admits(policy)


def gap(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("digits_cnn", "mobilenet_v3_small"))
@pytest.mark.parametrize("cost", COSTS)
def test_an_unreachable_budget_names_the_smallest_reachable_one_and_that_is_accepted(name, cost):
    network = network_of(name)
    space = SearchSpace(network)
    with pytest.raises(AjpqError, match=rf"{cost}=1e-05 \(smallest reachable 0\.\d+\)") as caught:
        Budget(network, COSTS, {cost: 1e-5}, space.cheapest())
    least = float(re.search(r"reachable (0\.\d+)", str(caught.value))[1])
    budget = Budget(network, COSTS, {cost: least}, space.cheapest())
    policy = walk(Draft(space, budget), np.random.default_rng(0))
    assert budget.ratios(policy)[cost] <= least * (1 + 1e-9)
    with pytest.raises(AjpqError, match="reachable"):
        Budget(network, COSTS, {cost: least - 1e-4}, space.cheapest())


def test_every_unreachable_cost_is_named_at_once():
    network = network_of("digits_cnn")
    with pytest.raises(AjpqError, match=r"size=0.001 \(smallest .*\), macs=0.002 \(smallest"):
        Budget(network, COSTS, {"size": 0.001, "macs": 0.002, "bops": 0.5}, SearchSpace(network).cheapest())


@pytest.mark.parametrize(
    "limits, text",
    (
        ({"size": 0}, "0 < budget <= 1 .*size has 0"),
        ({"size": -0.1}, "size has -0.1"),
        ({"size": 1.5}, "size has 1.5"),
        ({"size": 10}, "0.1 for 10 %"),
        ({"size": float("nan")}, "size has nan"),
        ({"sise": 0.1}, "'sise' is none of size, macs, bops, uniq"),
        ({}, "empty"),
    ),
)
def test_budgets_that_make_no_sense(limits, text):
    network = network_of("digits_cnn")
    with pytest.raises(AjpqError, match=text):
        Budget(network, COSTS, limits, SearchSpace(network).cheapest())


def test_the_uncompressed_network_is_the_measure_of_all():
    network = network_of("digits_cnn")
    budget = Budget(network, COSTS, {"size": 1, "macs": 0.5}, SearchSpace(network).cheapest())
    original = CompressionPolicy.homogeneous(network)
    assert budget.ratios(original) == {"size": 1, "macs": 1, "bops": 1, "uniq": 1} and not budget.admits(original)
    assert budget.names == ("size", "macs") and budget.caps.tolist() == [
        budget.original["size"],
        budget.original["macs"] / 2,
    ]


# -- choices and importance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    (
        {"weight_bits": (0,)},
        {"weight_bits": (4, 12)},
        {"act_bits": (0, 8)},
        {"act_bits": ()},
        {"blocks": 0},
        {"blocks": "all"},
        {"max_sparsity": 1.0},
        {"max_sparsity": -0.1},
        {"first_last": 0},
        {"first_last": 9},
    ),
)
def test_choices_that_make_no_sense(options):
    with pytest.raises(AjpqError, match=next(iter(options))):
        Choices(**options)


def test_choices_are_sorted_and_made_unique():
    assert Choices(weight_bits=[8, 0, 4, 4]).weight_bits == (0, 4, 8)


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20", "shufflenet_v2_x0_5", "regnet_y_400mf"))
def test_the_cheapest_policy_is_valid_even_at_the_largest_sparsity(name):
    network = network_of(name)
    space = SearchSpace(network, Choices(max_sparsity=0.999))
    space.cheapest().validate(network)
    assert space.cheapest().alive(network).mean() < 0.25
    exact = SearchSpace(network, Choices(max_sparsity=0.5)).cheapest().alive(network)
    for s in network.spaces:
        if s.prunable:
            assert s.size - exact[s.channels].sum() <= s.size // 2


def test_the_least_important_channels_go_first():
    network = network_of("digits_cnn")
    space = SearchSpace(network)
    for s, order in zip(network.spaces, space.prune_order, strict=True):
        assert set(order) <= set(s.channels) and (np.diff(space.channel_scores[order]) >= 0).all()
        if len(order):
            left = set(s.channels) - set(order)
            assert left and max(space.channel_scores[list(left)]) >= space.channel_scores[order].max()
        assert s.prunable or not len(order)


def test_importance_by_hand():
    network = traced(
        lambda m, x: m.l(gap(F.relu(m.n(m.a(x)))) + gap(m.b(x))),
        a=conv(3, 4, bias=False),
        n=nn.BatchNorm2d(4),
        b=conv(3, 4),
        l=nn.Linear(4, 5),
    )
    a, norm = network.module.get_submodule("a"), network.module.get_submodule("n")
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().double().numpy()
    scores = magnitude(network)
    assert np.allclose(scores["a"], a.weight.double().abs().sum((1, 2, 3)).numpy() * gain, rtol=1e-5)
    assert np.allclose(
        scores["b"], network.module.get_submodule("b").weight.double().abs().sum((1, 2, 3)).numpy(), rtol=1e-6
    )
    assert np.allclose(bn_scale(network)["a"], norm.weight.abs().double().numpy()) and np.array_equal(
        bn_scale(network)["b"], scores["b"]
    )
    mean = (scores["a"] / scores["a"].mean() + scores["b"] / scores["b"].mean()) / 2
    assert np.allclose(of_channels(network, scores)[network["a"].writes], mean)


def test_a_float32_of_an_end_is_taken_as_the_end_and_no_more():
    draft = start(network_of("digits_cnn"), {"macs": 1.0})
    top = draft.decision.options[-1]
    assert float(np.float32(top)) > top
    with pytest.raises(AjpqError, match="sparsity of 'conv1' must be within"):
        draft.take(top + 1e-3)
    space = int(draft.space.network.space_of[draft.decision.layer.writes[0]])
    draft.take(float(np.float32(top)))
    assert draft.sparsity[space] == top
