"""A pickled network is the same network: names, order, notes, outputs bit for bit, and what surgery makes of it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from nets import (
    NETWORKS,
    RandomNet,
    batches_of,
    conv,
    network_of,
    random_alive,
    random_policy,
    randomise,
    traced,
)
from torch import fx, nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.graph_pickle import pack, unpack
from ajpq.network import Network
from ajpq.surgery import shrink
from ajpq.tracing import trace


def rows(module: fx.GraphModule) -> list[tuple]:
    """Every node in writing, its arguments with the names of nodes."""
    return [
        (node.op, node.name, node.target, str(node.args), str(node.kwargs), node.type) for node in module.graph.nodes
    ]


def same_module(a: fx.GraphModule, b: fx.GraphModule, x: torch.Tensor) -> None:
    assert rows(a) == rows(b) and a.code == b.code
    assert type(a).__name__ == type(b).__name__
    assert [(name, type(m), m.training, m.extra_repr()) for name, m in a.named_modules() if name] == [
        (name, type(m), m.training, m.extra_repr()) for name, m in b.named_modules() if name
    ]
    tensors, others = a.state_dict(), b.state_dict()
    assert list(tensors) == list(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def same_facts(a: object, b: object) -> None:
    """Dataclasses of scalars, arrays, and tuples and mappings of these."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        same_facts(list(a.values()), list(b.values()))
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same_facts(one, other)
    elif hasattr(a, "__dataclass_fields__"):
        same_facts(vars(a), vars(b))
    else:
        assert a == b


def same(a: Network, b: Network) -> None:
    names = [name for name in Network.__dataclass_fields__ if name not in ("module", "example")]
    for name in names:
        same_facts(getattr(a, name), getattr(b, name))
    assert torch.equal(a.example, b.example)
    same_module(a.module, b.module, a.example)
    alive = random_alive(a, np.random.default_rng(0))
    same_module(shrink(a, alive), shrink(b, alive), a.example)


def copied(network: Network) -> Network:
    str(network)  # fills what is cached
    found = pickle.loads(pickle.dumps(network))
    assert set(vars(found)) == set(Network.__dataclass_fields__)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_of_every_traced_network(name):
    same(network_of(name), copied(network_of(name)))


@pytest.mark.parametrize("start", range(0, 50, 10))
def test_round_trip_of_random_networks(start):
    for seed in range(start, start + 10):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        network = trace(randomise(RandomNet(seed), seed), x)
        same(network, copied(network))


def test_functions_that_pickle_cannot_name_stay_the_same_function():
    network = traced(lambda m, x: m.l(F.max_pool2d(m.a(x), 8).flatten(1)), a=conv(3, 6), l=nn.Linear(6, 5))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(F.max_pool2d)
    found = copied(network)
    assert F.max_pool2d in [node.target for node in found.module.graph.nodes]
    same(network, found)


@torch.fx.wrap
def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def test_wrapped_functions_constants_and_names_of_builtins_survive():
    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.l(halved(m.a(x) * m.scale + torch.ones(1)).mean((2, 3)))

    parts = {"a": conv(3, 6), "l": nn.Linear(6, 5), "scale": nn.Parameter(torch.full((1, 6, 1, 1), 2.0))}
    network = traced(run, **parts)
    found = copied(network)
    assert halved in [node.target for node in found.module.graph.nodes]
    assert [node.meta.get("is_wrapped") for node in found.module.graph.nodes].count(True) == 1
    same(network, found)


def test_given_names_survive_and_the_original_is_left_alone():
    network = network_of("resnet20")
    small = shrink(network, random_alive(network, np.random.default_rng(1)))
    for node in list(small.graph.nodes)[5:9]:
        node._rename(f"another_{node.name}")
    small.recompile()
    before = rows(small)
    found = unpack(pickle.loads(pickle.dumps(pack(small))))
    same_module(small, found, network.example)
    with torch.no_grad():
        found.conv1.weight.zero_()
    assert rows(small) == before and small.conv1.weight.abs().sum() > 0


def test_a_deep_copy_is_the_same_network():
    network = traced(lambda m, x: m.l(m.a(x).mean((2, 3))), a=conv(3, 6), l=nn.Linear(6, 5))
    found = copy.deepcopy(network)
    same(network, found)
    assert found.module.a.weight.data_ptr() != network.module.a.weight.data_ptr()


def test_calibration_and_policy_round_trip():
    network = network_of("digits_cnn")
    ranges = calibrate(network, batches_of(network))
    policy = random_policy(network, 3, act_bits=(4, 8))
    found, again = pickle.loads(pickle.dumps((ranges, policy)))
    same_facts(ranges, found)
    same_facts(policy, again)
    assert policy.digest() == again.digest()
    assert [ranges[name].step(4) for name in ranges] == [found[name].step(4) for name in found]
