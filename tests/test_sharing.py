"""Weights that were trained under sampled policies."""

import numpy as np
import pytest
import torch
from nets import batches_of, conv, network_of, traced
from torch import nn

from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.cost import Size
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.sharing import _hand_over, sampler, share
from ajpq.space import Choices, SearchSpace


def setting(limit: float = 0.15):
    network = network_of("digits_cnn")
    space = SearchSpace(network, Choices(first_last=None, act_bits=(4, 8)))
    return network, space, Budget(network, {"size": Size()}, {"size": limit}, space.cheapest())


def test_samples_are_within_budget_varied_and_repeatable():
    _, space, budget = setting()
    draw = sampler(space, budget)
    policies = [draw(np.random.default_rng(seed)) for seed in range(30)]
    assert all(budget.admits(policy) for policy in policies)
    assert len({policy.digest() for policy in policies}) == 30
    assert draw(np.random.default_rng(3)).digest() == policies[3].digest()
    spreads = [np.std([b[b > 0].mean() for b in policy.weight_bits.values()]) for policy in policies]
    assert min(spreads) < 0.5 < max(spreads)  # nearly homogeneous ones and others


def test_a_gradient_arrives_at_the_weights_that_it_belongs_to():
    network, space, budget = setting()
    policy = sampler(space, budget)(np.random.default_rng(1))
    data = batches_of(network, 1, 8)
    student = compress(network, policy, calibrate(network, data)).train()
    student(data[0][0]).square().sum().backward()
    weights = {name: p.detach().clone() for name, p in network.module.named_parameters()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    _hand_over(student, network, policy, weights)
    alive = policy.alive(network)
    layer = next(x for x in network.layers if 0 < alive[x.writes].mean() < 1)
    ours, theirs = weights[f"{layer.name}.weight"].grad, student.get_submodule(layer.name).weight.grad
    kept = torch.from_numpy(alive[layer.writes])
    assert not ours[~kept].any() and ours[kept].any()
    inputs = torch.from_numpy(alive[layer.reads])
    assert torch.equal(ours[kept][:, inputs], theirs) and not ours[:, ~inputs].any()


def test_training_under_policies_makes_them_better_and_leaves_the_network_alone():
    network, space, budget = setting()
    before = {name: t.clone() for name, t in network.module.state_dict().items()}
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    data = [(x, network.module(x).argmax(1))]
    losses = []
    shared = share(
        network, sampler(space, budget), data, data, steps=60, lr=0.05, on_step=lambda step, loss: losses.append(loss)
    )
    assert len(losses) == 60 and np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])
    assert all(torch.equal(t, before[name]) for name, t in network.module.state_dict().items())
    assert shared.layers is network.layers and not any(p.requires_grad for p in shared.module.parameters())
    again = share(network, sampler(space, budget), data, data, steps=3, lr=0.05)
    twice = share(network, sampler(space, budget), data, data, steps=3, lr=0.05)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), twice.module.parameters(), strict=True))
    assert compress(shared, CompressionPolicy.homogeneous(network, 2, 8), calibrate(shared, data))(x).isfinite().all()


def test_parameters_of_no_layer_are_trained_too():
    network = traced(
        lambda m, x: m.l(m.p(m.a(x)).mul(m.gain).mean((2, 3))),
        a=conv(3, 6), p=nn.PReLU(), gain=nn.Parameter(torch.ones(6, 1, 1)), l=nn.Linear(6, 10),
    )  # fmt: skip
    data, policy = batches_of(network), CompressionPolicy.homogeneous(network, 4, 8)
    shared = share(network, lambda rng: policy, data, data, steps=2, weight_decay=0.0)
    before, after = (dict(n.module.named_parameters()) for n in (network, shared))
    assert all((after[name] != before[name]).all() for name in ("p.weight", "gain"))
    assert (before["gain"] == 1).all() and not any(p.requires_grad for p in (*after.values(), *before.values()))


@pytest.mark.parametrize("wrong", ({"lr": 0.0}, {"steps": -1}, {"precision": "float8"}))
def test_bad_settings_are_refused(wrong):
    network, space, budget = setting()
    with pytest.raises(AjpqError, match="shared weights"):
        share(network, sampler(space, budget), [], [], **{"steps": 1, **wrong})


def test_no_images_and_a_loss_that_explodes_are_told():
    network, space, budget = setting()
    data = batches_of(network, 1, 8)
    with pytest.raises(AjpqError, match="need training images"):
        share(network, sampler(space, budget), data, [], steps=1)
    with pytest.raises(AjpqError, match="must stay finite"):
        share(network, sampler(space, budget), data, [(data[0][0] * float("nan"), data[0][1])], steps=1)
