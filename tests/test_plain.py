"""Weights that are computed anew in every forward pass become parameters of a copy."""

import pytest
import torch
from nets import conv, randomise
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from ajpq.plain import plain_copy
from ajpq.tracing import trace

WAYS = {
    "plain": lambda layer: layer,
    "masks": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_can_be_traced_and_pruned(way: str) -> None:
    torch.manual_seed(0)
    net = randomise(nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 5)))
    WAYS[way](net[0])
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        expected = net.train()(x)
    expected = net.eval()(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network = trace(net, x)
    assert torch.allclose(network.module(x), expected, atol=1e-5)
    assert sum(len(space.channels) for space in network.spaces if space.prunable) == 16
    assert network.other_parameters == 0
    assert net.state_dict().keys() == before.keys(), "the model itself is not modified"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), expected)


def test_tied_weights_stay_tied() -> None:
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    twin = plain_copy(net)
    assert twin[0].weight is twin[1].weight and twin[0].weight is not net[0].weight


def test_norms_of_several_gpus_are_norms_of_one():
    """SyncBatchNorm trains on GPUs alone, but its channels are pruned and folded like any other's."""
    net = randomise(nn.Sequential(conv(3, 16), nn.SyncBatchNorm(16), nn.ReLU(), conv(16, 5)))
    x = torch.randn(4, 3, 8, 8)
    network = trace(net, x)
    assert type(net[1]) is nn.SyncBatchNorm and type(network.module.get_submodule("1")) is nn.BatchNorm2d
    assert torch.equal(network.module(x), net(x)) and network.spaces[1].prunable
    assert torch.isfinite(network.module.train()(x)).all()
