"""Masked == shrunk: a network without its pruned channels computes what the original does with them at zero."""

import numpy as np
import pytest
import torch
from nets import (
    NETWORKS,
    WIDTHS,
    RandomNet,
    conv,
    difference,
    images_of,
    masked,
    model_of,
    network_of,
    random_alive,
    random_policy,
    randomise,
    traced,
)
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ajpq.compression import compress
from ajpq.cost import MACs, Size, total
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.surgery import shrink
from ajpq.tracing import trace

SEEDS = {"digits_cnn": 8, "resnet20": 4}  # the networks of torchvision: test_any_cnn.py


def agree(network: Network, policy: CompressionPolicy, x: torch.Tensor) -> None:
    reference, small = masked(network, policy), compress(network, policy)
    with torch.no_grad():
        expected, got = reference(x), small(x)
    assert expected.shape == got.shape
    assert (expected - got).abs().max() <= 1e-5
    assert not small.training


@pytest.mark.parametrize(
    "name, seed",
    [(name, seed) for name, seeds in SEEDS.items() for seed in range(seeds)],
)
def test_masked_equals_shrunk(name, seed):
    network, x = network_of(name), images_of(name, seed=seed)
    policy = random_policy(network, seed, (0.5, 0.2, 0.8)[seed % 3], widths=(32,))
    agree(network, policy, x)
    with torch.no_grad():
        before, after = network.module(x), masked(network, policy)(x)
    assert after.std() > 0.02 and (before - after).abs().max() > 0.02  # the comparison is about something


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_and_quantized_equals_compressed(name):
    """Every kernel's width and step come from the weights that survive, before as after surgery."""
    network = network_of(name)
    for seed in range(3 if name == "digits_cnn" else 1):
        agree(network, random_policy(network, 10 + seed, 0.4, WIDTHS), images_of(name, seed=seed))


def test_nothing_pruned_is_the_original_bit_for_bit():
    network, x = network_of("digits_cnn"), images_of("digits_cnn")
    assert difference(network.module, shrink(network, np.ones(network.n_channels, bool)), x) == 0
    assert difference(model_of("digits_cnn"), compress(network, CompressionPolicy.homogeneous(network)), x) == 0


@pytest.mark.parametrize("start", [0, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 30, 40))])
def test_random_networks_are_shrunk_faithfully(start):
    pruned = 0
    for seed in range(start, start + 10):
        network = trace(
            randomise(RandomNet(seed), seed), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        )
        policy = random_policy(network, seed, 0.5, widths=(32,))
        pruned += int((~policy.alive(network)).sum())
        agree(network, policy, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 1)))
        if seed % 2:
            agree(network, random_policy(network, seed + 1, 0.3, WIDTHS), network.example)
    assert pruned > 50


def test_the_reference_notices_a_norm_that_is_not_masked():
    """Zeroing a convolution is not pruning it: the norm behind still emits a constant."""
    network, x = network_of("digits_cnn"), images_of("digits_cnn")
    policy = random_policy(network, 0, widths=(32,))
    careless = masked(network, policy)
    for norm in network.norms:
        careless.get_submodule(norm.name).load_state_dict(network.module.get_submodule(norm.name).state_dict())
    assert difference(careless, compress(network, policy), x) > 0.1


def size_without_overhead(network: Network, policy: CompressionPolicy) -> float:
    """Size in bits less the file's header, the four bits per kernel that tell its width, and the places of channels."""
    alive = policy.alive(network)
    places = sum(
        n * alive[network.values[node]].sum() for nodes in network.gathers.values() for node, n in nodes.items()
    )
    kernels = sum(int((bits > 0).sum()) for bits in policy.weight_bits.values())
    return total(Size(), network, policy) - 8 * (1024 + 48 * len(network.layers) + int(places)) - 4 * kernels


@pytest.mark.parametrize(
    "name",
    ("digits_cnn", "resnet20", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet"),
)
def test_costs_are_those_of_the_smaller_module(name):
    network = network_of(name)
    policy = random_policy(network, 3, 0.5, widths=(32,))
    small = shrink(network, policy.alive(network))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        small(images_of(name, n=1))
    assert total(MACs(), network, policy) == counter.get_total_flops() / 2
    layers = [m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(network.norms) and len(layers) == len(network.layers)
    foldable = {norm.folds_into for norm in network.norms}
    words = sum(m.weight.numel() for m in layers)
    words += sum(
        small.get_submodule(spec.name).out_features
        if spec.kind == "linear"
        else small.get_submodule(spec.name).out_channels
        for spec in network.layers
        if small.get_submodule(spec.name).bias is not None or spec.name in foldable
    )
    words += sum(small.get_submodule(norm.name).num_features for norm in network.norms if norm.folds_into is None)
    assert size_without_overhead(network, policy) == 32 * words


def test_parameters_of_a_network_without_norms_are_counted_exactly():
    network = network_of("squeezenet1_1")
    policy = random_policy(network, 1, widths=(32,))
    small = shrink(network, policy.alive(network))
    assert size_without_overhead(network, policy) == 32 * sum(p.numel() for p in small.parameters())
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(
        p.numel() for p in model_of("squeezenet1_1").parameters()
    )


def test_the_smaller_module_is_ordinary():
    network = network_of("digits_cnn")
    policy = random_policy(network, 0, widths=(32,))
    small = shrink(network, policy.alive(network))
    assert isinstance(small, fx.GraphModule) and not small.training
    assert set(small.state_dict()) == set(model_of("digits_cnn").state_dict())
    for layer in network.layers:
        part = small.get_submodule(layer.name)
        assert type(part) in (nn.Conv2d, nn.Linear) and len(part.weight) == int(
            (policy.weight_bits[layer.name] > 0).sum()
        )
        assert part.weight.requires_grad and part.weight.is_contiguous()
    small.train()(images_of("digits_cnn", n=4)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    again = fx.symbolic_trace(small.eval())
    assert difference(small, again, images_of("digits_cnn")) == 0


def test_surviving_kernels_are_the_originals_in_order():
    network = network_of("resnet20")
    policy = random_policy(network, 2, widths=(32,))
    small, alive = shrink(network, policy.alive(network)), policy.alive(network)
    for layer in network.layers:
        old = network.module.get_submodule(layer.name).weight
        assert torch.equal(
            small.get_submodule(layer.name).weight, old[alive[layer.writes]][:, alive[layer.inputs_of_a_kernel]]
        )


def test_geometry_survives_surgery():
    network = traced(
        lambda m, x: m.l(m.b(m.a(x)).mean((2, 3))),
        l=nn.Linear(6, 5),
        a=nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode="reflect"),
        b=nn.Conv2d(6, 6, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
    )
    for seed in range(3):
        agree(network, random_policy(network, seed), network.example)


def test_gathers_that_keep_order_are_narrow_or_nothing():
    """A slice must not cost a copy by index where the survivors lie side by side."""
    network = traced(
        lambda m, x: (lambda y: m.l(torch.cat([F.relu(y[:, :3]), y[:, 3:]], 1).mean((2, 3))))(m.a(x)),
        a=conv(3, 6),
        l=nn.Linear(6, 5),
    )
    alive = np.ones(network.n_channels, bool)
    alive[network["a"].writes[[1, 5]]] = False
    targets = [node.target for node in shrink(network, alive).graph.nodes if node.op == "call_function"]
    assert torch.narrow in targets and torch.index_select not in targets


def test_a_whole_slice_can_go():
    network = traced(
        lambda m, x: (lambda y: m.l(torch.cat([F.relu(y[:, :2]), y[:, 2:]], 1).mean((2, 3))))(m.a(x)),
        a=conv(3, 6),
        l=nn.Linear(6, 5),
    )
    alive = np.ones(network.n_channels, bool)
    alive[network["a"].writes[:2]] = False
    small = shrink(network, alive)
    assert small(network.example).shape == (2, 5) and small.a.out_channels == 4


def test_random_alive_reaches_the_extremes():
    network = network_of("digits_cnn")
    few = random_alive(network, np.random.default_rng(0), 1.0)
    assert all(few[layer.writes].sum() >= 1 and few[layer.reads].sum() >= 1 for layer in network.layers)
    assert few[network["conv1"].writes].sum() <= 2
