"""Analytic models of time and energy: by hand, monotone, differentiable, and as budgets of a search."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from nets import conv, network_of, traced
from torch import nn

from ajpq.architecture import check_differentiable
from ajpq.cost import Load, loads_of
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.hardware import BitFusion, Energy, Roofline
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.preparing import limits_of
from ajpq.testing import check_cost_model, small_problem
from ajpq.testing.problems import small_network

ROOFLINE = Roofline({4: 1e9, 8: 5e8, 32: 1e8}, bandwidth=1e8)
BITFUSION = BitFusion(rows=2, columns=2, bricks=16, frequency=1e6, bandwidth=64)
ENERGY = Energy(multiply=1, add=1 / 32, buffer=2, dram=4, reuse=8)
DEFAULTS = {"roofline": Roofline(), "bitfusion": BitFusion(), "energy": Energy()}
MODELS = (ROOFLINE, BITFUSION, ENERGY, *DEFAULTS.values(), Roofline({32: 1e9}), BitFusion(3, 5, 4, 1e6, 1e9))


def three() -> Network:
    """A 3x3 convolution 3 -> 4 at 8x8, a depthwise one to 4x4, a linear layer 4 -> 5."""
    return traced(
        lambda m, x: m.l(m.d(m.a(x)).mean((2, 3))),
        a=conv(3, 4, bias=False), d=conv(4, 4, groups=4, stride=2, bias=False), l=nn.Linear(4, 5),
    )  # fmt: skip


def compressed() -> list[Load]:
    bits = {"a": [0, 2, 3, 8], "d": [0, 4, 4, 8], "l": [1, 4, 4, 8, 8]}
    policy = CompressionPolicy(
        {name: np.array(b, np.uint8) for name, b in bits.items()}, dict(zip("adl", (8, 4, 8), strict=True))
    )
    policy.validate(three())
    return list(loads_of(three(), policy))


# Bits of weights + (inputs + outputs) * their width, exact and in containers of 4 and 8 bits.
MOVED = (27 * (2 + 3 + 8) + (192 + 192) * 8, 9 * (4 + 4 + 8) + (192 + 48) * 4, 3 * (1 + 4 + 4 + 8 + 8) + (3 + 5) * 8)
HELD = (27 * (4 + 4 + 8) + 384 * 8, MOVED[1], 3 * (4 + 4 + 4 + 8 + 8) + 8 * 8)


def test_roofline_by_hand():
    compute = [2 * 64 * 27 * 3 / 5e8, 2 * 16 * 9 * (2 / 1e9 + 1 / 5e8), 2 * 3 * 5 / 5e8]  # all but two kernels run as 8
    memory = [bits / 8 / 1e8 for bits in HELD]
    assert compute[0] > memory[0] and compute[1] < memory[1] and compute[2] < memory[2]
    expected = [1e3 * max(pair) for pair in zip(compute, memory, strict=True)]
    assert ROOFLINE(compressed()).tolist() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx([0.020736, 0.00138, 0.000185], rel=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_what_is_skipped_costs_nothing(model):
    network = traced(
        lambda m, x: (lambda y: m.l((y + m.c(m.b(y).relu())).mean((2, 3))))(m.a(x).relu()),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), l=nn.Linear(8, 4),
    )  # fmt: skip
    whole = CompressionPolicy.homogeneous(network, 8, 8)
    gone = {name: bits * (name not in "bc") for name, bits in whole.weight_bits.items()}
    found = model(loads_of(network, CompressionPolicy(gone, whole.act_bits))).tolist()
    assert found[1:3] == [0, 0] and min(model(loads_of(network, whole)).tolist()) > 0


def test_roofline_of_the_uncompressed_network():
    network = three()
    loads = loads_of(network, CompressionPolicy.homogeneous(network))
    fast = replace(ROOFLINE, bandwidth=1e15)
    assert fast(loads).tolist() == pytest.approx([2e3 * layer.macs / 1e8 for layer in network.layers], rel=1e-12)
    floats = [27 * 4 + 192 + 256, 9 * 4 + 256 + 64, 20 + 9]
    slow = replace(ROOFLINE, bandwidth=1.0)
    assert slow(loads).tolist() == pytest.approx([1e3 * 4 * n for n in floats], rel=1e-12)


def test_roofline_prices_a_narrow_weight_as_the_input_that_it_meets():
    """Weights of 4 bits run no faster than 8 while their inputs have 8."""
    network, fast = three(), replace(ROOFLINE, bandwidth=1e15)
    cost = {p: float(fast(loads_of(network, CompressionPolicy.homogeneous(network, *p)))[0]) for p in
            ((4, 4), (4, 8), (8, 8), (4, 32), (5, 6))}  # fmt: skip
    assert cost[4, 8] == cost[8, 8] == cost[5, 6] == 2 * cost[4, 4] and cost[4, 32] == 5 * cost[8, 8]


def test_bitfusion_by_hand():
    # passes of 2 x 16 bricks: ceil(27 w 8 / 4 / 32) for w = 2, 4 (of 3 bits), 8; in tiles of two as their widest
    convolution = 64 * (14 + 4)  # 14, 7 | 4
    depthwise = 16 * (2 + 2 + 3)  # no tile is shared
    linear = 2 + 1 + 1  # 2, 2 | 1, 1 | 1
    cycles = [float(BITFUSION.compute_cycles(load)) for load in compressed()]
    assert cycles == [convolution, depthwise, linear] == [1152, 112, 4]
    assert BITFUSION(compressed()).tolist() == pytest.approx([1.152, 0.112, 0.004], rel=1e-12)
    slow = replace(BITFUSION, bandwidth=1.0)
    assert slow(compressed()).tolist() == pytest.approx([1e-3 * bits for bits in MOVED], rel=1e-12)


def test_bitfusion_takes_several_cycles_for_a_product_wider_than_a_unit():
    network = three()
    load = loads_of(network, CompressionPolicy.homogeneous(network))[-1]
    assert float(BITFUSION.compute_cycles(load)) == 3 * 2 * 16  # tiles of 5 kernels, 4 products in 2 rows, 16 cycles


def test_bitfusion_does_as_many_products_as_the_paper_says():
    """A unit does one product of 8 x 8 bits in a cycle, 2 of 4 x 8, 4 of 4 x 4, 16 of 2 x 2 (section II)."""
    network = traced(lambda m, x: m.b(m.a(x)), a=conv(3, 256), b=conv(256, 64, 1))
    for (w, a), products in {(8, 8): 1, (4, 8): 2, (8, 2): 4, (4, 4): 4, (3, 3): 4, (2, 2): 16, (1, 1): 16}.items():
        load = loads_of(network, CompressionPolicy.homogeneous(network, w, a))[1]
        assert float(BitFusion().compute_cycles(load)) == network["b"].macs / (512 * products)


def test_bitfusion_gives_every_group_its_own_tiles():
    network = traced(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 8, 1, groups=2))
    load = loads_of(network, CompressionPolicy.homogeneous(network, 8, 8))[1]
    assert float(BitFusion(1, 3).compute_cycles(load)) == 64 * 2 * 2 * 4  # groups, tiles of 4 kernels, inputs


def test_energy_by_hand():
    def of(macs: int, kernels: list[int], act: int) -> float:
        return sum(macs * (w * act + 1 + 2 * (w + act) / 8) for w in kernels)

    arithmetic = of(64 * 27, [2, 3, 8], 8), of(16 * 9, [4, 4, 8], 4), of(3, [1, 4, 4, 8, 8], 8)
    expected = [1e-6 * (mine + 4 * bits) for mine, bits in zip(arithmetic, MOVED, strict=True)]
    assert ENERGY(compressed()).tolist() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx([0.214572, 0.015072, 0.00121975], rel=1e-12)


def test_the_energy_of_a_product_is_horowitzs():
    network = three()
    only = Energy(add=1e-30, buffer=1e-30, dram=1e-30)
    for bits, picojoules in ((8, 0.2), (32, 3.1)):
        loads = loads_of(network, CompressionPolicy.homogeneous(network, bits, bits))
        assert float(only(loads).sum()) * 1e6 / network.macs == pytest.approx(picojoules, rel=0.04)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_model_keeps_the_rules_of_budgets(model):
    check_cost_model(model, policies=2)
    loads = loads_of(small_network(), CompressionPolicy.homogeneous(small_network(), 3, 5))
    check_differentiable("mine", model, loads)
    assert model([]).shape == (0,)


@pytest.mark.parametrize("name", ("mobilenet_v3_small", "resnet20"))
@pytest.mark.parametrize("model", DEFAULTS.values(), ids=DEFAULTS)
def test_real_networks_get_cheaper_with_every_width(model, name):
    network = network_of(name)
    ladder = [(32, 32), (8, 32), (8, 8), (4, 8), (4, 4), (2, 2)]
    totals = [float(model(loads_of(network, CompressionPolicy.homogeneous(network, *bits))).sum()) for bits in ladder]
    assert all(a > b > 0 for a, b in zip(totals, totals[1:-1], strict=False)) and totals[-1] <= totals[-2]


def test_gradients_are_those_of_lines_through_the_steps():
    def gradient(model, load: Load, name: str) -> list[float]:
        leaf = getattr(load, name).clone().requires_grad_(True)
        model([replace(load, **{name: leaf})]).sum().backward()
        return leaf.grad.reshape(-1).tolist()

    convolution, depthwise, _ = compressed()
    slope = 1e-3 * 64 * 27 * 8 / 4 / 32 / 2  # ms per bit of a kernel: half a tile, and 2 bits are the least
    assert gradient(BITFUSION, convolution, "weight_bits") == pytest.approx([0, 0, slope, slope])
    per_kernel = [1e-3 * 64 * passes / 2 for passes in (4, 4, 7, 14)]
    assert gradient(BITFUSION, convolution, "kept") == pytest.approx(per_kernel)
    memory = gradient(ROOFLINE, depthwise, "act_bits")  # 4 is the narrowest container
    assert memory == [0] and gradient(
        ROOFLINE, replace(depthwise, act_bits=torch.tensor(5.0).double()), "act_bits"
    ) == (pytest.approx([1e3 * 240 / 8 / 1e8]))
    assert gradient(ENERGY, convolution, "weight_bits")[2] == pytest.approx(1e-6 * (64 * 27 * (8 + 2 / 8) + 4 * 27))


def test_expected_widths_between_two_steps_cost_as_the_next_one():
    load = compressed()[0]
    for model in (ROOFLINE, BITFUSION):
        above = replace(load, weight_bits=torch.tensor([0, 2, 4, 8.0]).double())
        between = replace(load, weight_bits=torch.tensor([0, 1.5, 3.2, 7.9]).double())
        assert float(model([between])) == float(model([above]))


@pytest.mark.parametrize(
    "make, words",
    (
        (lambda: Roofline({4: 2.0, 8: 1.0}), "32 bits"),
        (lambda: Roofline({}), "32 bits"),
        (lambda: Roofline({8: 1.0, 32: 2.0}), "not grow with the width"),
        (lambda: Roofline({8: 1.0, 32: 0.0}), "above 0"),
        (lambda: Roofline(bandwidth=0.0), "bandwidth of Roofline"),
        (lambda: BitFusion(columns=0), "columns of BitFusion"),
        (lambda: Energy(dram=-1.0), "dram of Energy"),
        (lambda: Energy(reuse=float("inf")), "reuse of Energy"),
    ),
)
def test_devices_that_make_no_sense(make, words):
    with pytest.raises(AjpqError, match=words):
        make()


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_configuration_adds_a_cost_that_a_budget_can_name(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"costs=[standard,{name}]", f"+budget.{name}=0.5"])
        found = instantiate(cfg.costs, _convert_="all")
    assert list(found) == ["size", "macs", "bops", "uniq_bops", name] and found[name] == DEFAULTS[name]
    assert limits_of(cfg.budget)[name] == 0.5


def test_three_devices_bind_at_once():
    problem = small_problem({"roofline": 0.12, "bitfusion": 0.04, "energy": 0.1, "size": 0.2}, costs=DEFAULTS)
    random, spent = np.random.default_rng(0), set()
    for attempt in range(10):
        draft = problem.draft()
        while (decision := draft.decision) is not None:
            low, high = decision.options[0], decision.options[-1]
            draft.take((random.uniform(low, high) if attempt else low) if decision.kind == "sparsity" else high)
        assert problem.budget.admits(draft.policy()) and draft.slack.min() >= -1e-9
        spent.add(float(draft.slack.min()))
    assert min(spent) < 0.05 and len(spent) > 5
    problem.close()
