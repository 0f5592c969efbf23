"""Cost models: by hand, against published figures, monotone, differentiable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import RandomNet, conv, network_of, problem_of, random_policy, randomise, torchvision_net, traced
from torch import nn

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.cost import BOPs, MACs, Size, UniqBOPs, load_of, loads_of, total
from ajpq.errors import AjpqError
from ajpq.models import BasicBlock, ResidualNet
from ajpq.network import Network
from ajpq.packing import pack
from ajpq.policy import CompressionPolicy
from ajpq.shipping import to_bytes
from ajpq.tracing import trace

MODELS = (Size(), MACs(), BOPs(), UniqBOPs())
HEADER = 8 * 1024  # bits, once
HEADER_PER_LAYER = 8 * 48


def pair() -> Network:
    """A 3x3 convolution, 3 -> 4 channels at 8x8, bias and folded norm; a linear layer 4 -> 5 with bias."""
    return traced(
        lambda m, x: m.l(m.n(m.a(x)).mean((2, 3))), a=conv(3, 4, bias=False), n=nn.BatchNorm2d(4), l=nn.Linear(4, 5)
    )


def policy_of(conv_bits: list, linear_bits: list, acts: tuple[int, int]) -> CompressionPolicy:
    return CompressionPolicy(
        {"a": np.array(conv_bits, np.uint8), "l": np.array(linear_bits, np.uint8)}, dict(zip("al", acts, strict=True))
    )


def costs(model, network: Network, policy: CompressionPolicy) -> list[float]:
    return model(loads_of(network, policy)).tolist()


def test_the_uncompressed_network_by_hand():
    network = pair()
    policy = CompressionPolicy.homogeneous(network)
    assert costs(MACs(), network, policy) == [64 * 4 * 27, 20]
    assert costs(BOPs(), network, policy) == [64 * 4 * 27 * 1024, 20 * 1024]
    assert costs(Size(), network, policy) == [
        4 * (27 * 32 + 32 + 4) + HEADER_PER_LAYER + HEADER,
        5 * (4 * 32 + 32 + 4) + HEADER_PER_LAYER,
    ]


def test_a_compressed_network_by_hand():
    network = pair()
    policy = policy_of([0, 2, 8, 32], [1, 4, 4, 8, 8], (8, 4))
    assert costs(MACs(), network, policy) == [64 * 3 * 27, 15]
    assert costs(BOPs(), network, policy) == [64 * 27 * 8 * (2 + 8 + 32), 3 * 4 * (1 + 4 + 4 + 8 + 8)]
    assert costs(Size(), network, policy) == [
        27 * (2 + 8 + 32) + 2 * (16 + 16 + 4) + (32 + 4) + HEADER_PER_LAYER + HEADER,
        3 * (1 + 4 + 4 + 8 + 8) + 5 * (16 + 16 + 4) + HEADER_PER_LAYER,
    ]


def test_uniq_bops_by_hand():
    network = pair()
    policy = policy_of([0, 1, 2, 4], [8, 8, 8, 8, 8], (8, 4))
    n, adds = 27, 26
    convolution = 64 * (
        (0 + adds * 13)  # 1 bit: ceil(log2(27 * 255)) = 13
        + (n * 1 * 8 + adds * 13)
        + (n * 3 * 8 + adds * 16)
    )  # ceil(log2(27 * 255 * 7)) = 16
    linear = 5 * (3 * 7 * 4 + 2 * 13)  # ceil(log2(3 * 15 * 127)) = 13
    assert costs(UniqBOPs(), network, policy) == [convolution, linear]


def zur_resnet() -> Network:
    """The ResNet-20 of Zur et al. 2019: shortcuts are strided 1x1 convolutions."""

    def stage(c_in: int, c_out: int) -> nn.Sequential:
        down = (
            nn.Sequential()
            if c_in == c_out
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))
        )
        return nn.Sequential(
            BasicBlock(c_in, c_out, c_out // c_in, down),
            *(BasicBlock(c_out, c_out, 1, nn.Sequential()) for _ in range(2)),
        )

    return trace(ResidualNet(3, (stage(16, 16), stage(16, 32), stage(32, 64)), (16, 64), 10), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "bits, giga", (((2, 2), 0.487), ((2, 4), 0.688), ((3, 3), 0.774), ((4, 4), 1.100), ((8, 3), 1.600), ((8, 8), 3.254))
)
def test_uniq_bops_are_the_published_ones_of_resnet20(bits, giga):
    """(weight, activation) bits, 8-bit network input, the classifier not counted; the figures of the authors' code."""
    network = zur_resnet()
    policy = CompressionPolicy.homogeneous(network, *bits)
    policy = CompressionPolicy(policy.weight_bits, {**policy.act_bits, "conv1": 8})
    loads = loads_of(network, policy)[:-1]
    assert sum(load.layer.macs for load in loads) == 40_812_544
    assert float(UniqBOPs()(loads).sum()) / 1e9 == pytest.approx(giga, abs=0.0005)


def test_published_multiply_accumulates():
    mobile = trace(randomise(torchvision_net("mobilenet_v2")), torch.zeros(1, 3, 224, 224))
    assert (mobile.macs + 1280 * (1000 - 10)) / 1e6 == pytest.approx(
        300.8, abs=0.05
    )  # the published one has 1000 classes
    assert total(MACs(), mobile, CompressionPolicy.homogeneous(mobile)) == mobile.macs
    assert network_of("resnet20").macs == 40_812_544 - 2 * 131_072 + 640  # identity shortcuts, and the classifier


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", ("digits_cnn", "shufflenet_v2_x0_5", "mobilenet_v3_small"))
def test_no_cost_falls_when_a_width_or_a_number_of_channels_grows(model, name):
    network = network_of(name)
    for seed in range(6):
        random = np.random.default_rng(seed)
        small = random_policy(network, seed, 0.5, act_bits=(1, 2, 4, 8))
        ladder = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 32])
        back = random.random(network.n_channels) < 0.3  # pruned channels that return

        def grown(layer, back=back, random=random, small=small, ladder=ladder):
            bits = small.weight_bits[layer.name]
            wider = ladder[np.minimum(np.searchsorted(ladder, bits) + random.integers(0, 3, len(bits)), 9)]
            return np.where(bits > 0, wider, np.where(back[layer.writes], random.choice(ladder[1:]), 0)).astype(
                np.uint8
            )

        large = CompressionPolicy(
            {layer.name: grown(layer) for layer in network.layers},
            {layer: {1: 2, 2: 4, 4: 8, 8: 32}[bits] for layer, bits in small.act_bits.items()},
        )
        large.validate(network)
        assert (model(loads_of(network, small)) <= model(loads_of(network, large))).all()
        assert total(model, network, small) < total(model, network, large)
        assert total(model, network, large) <= total(model, network, CompressionPolicy.homogeneous(network))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_every_single_step_up_costs_no_less(model):
    network = pair()
    for acts in ((1, 1), (8, 4), (32, 32)):
        steps = [total(model, network, policy_of([b, 4, 4, 4], [4] * 5, acts)) for b in (0, 1, 2, 3, 4, 5, 6, 7, 8, 32)]
        assert all(a <= b for a, b in zip(steps, steps[1:], strict=False)) and steps[0] < steps[-1]
    assert total(model, network, policy_of([4] * 4, [4] * 5, (4, 4))) <= total(
        model, network, policy_of([4] * 4, [4] * 5, (8, 8))
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_costs_have_gradients(model):
    network = pair()
    loads = []
    for load in loads_of(network, policy_of([2, 3, 4, 8], [4, 4, 4, 8, 8], (8, 4))):
        bits, kept, acts, inputs = (
            getattr(load, n).clone().requires_grad_() for n in ("weight_bits", "kept", "act_bits", "inputs")
        )
        loads.append(replace(load, weight_bits=bits, kept=kept, act_bits=acts, inputs=inputs))
    model(loads).sum().backward()
    for load in loads:
        for tensor in (
            load.kept,
            load.inputs,
            *([] if isinstance(model, MACs) else [load.weight_bits]),
            *([load.act_bits] if "BOPs" in type(model).__name__ else []),
        ):
            assert torch.isfinite(tensor.grad).all() and (tensor.grad > 0).all()


def test_the_gradients_of_bops_by_hand():
    network = pair()
    load = loads_of(network, policy_of([2, 3, 4, 8], [4] * 5, (8, 4)))[0]
    bits = load.weight_bits.clone().requires_grad_()
    BOPs()([replace(load, weight_bits=bits)]).sum().backward()
    assert bits.grad.tolist() == [64 * 27 * 8] * 4


def test_what_a_norm_costs_that_cannot_be_folded():
    network = traced(
        lambda m, x: m.l(m.n(torch.relu(m.a(x))).mean((2, 3))),
        a=conv(3, 4, bias=False),
        n=nn.BatchNorm2d(4),
        l=nn.Linear(4, 5),
    )
    whole, pruned = policy_of([4] * 4, [4] * 5, (8, 8)), policy_of([4, 0, 4, 0], [4] * 5, (8, 8))
    assert costs(Size(), network, whole) == [
        4 * (27 * 4 + 16 + 4) + HEADER_PER_LAYER + HEADER,
        5 * (4 * 4 + 36) + HEADER_PER_LAYER + 4 * 32,
    ]
    assert costs(Size(), network, pruned) == [
        2 * (27 * 4 + 16 + 4) + HEADER_PER_LAYER + HEADER,
        5 * (2 * 4 + 36) + HEADER_PER_LAYER + 2 * 32,
    ]


def test_other_parameters_are_counted_once():
    network = traced(
        lambda m, x: m.l((m.g(m.a(x)) * m.s).mean((2, 3))),
        a=conv(3, 4),
        g=nn.GroupNorm(2, 4),
        s=nn.Parameter(torch.ones(4, 1, 1)),
        l=nn.Linear(4, 5),
    )
    size = total(Size(), network, CompressionPolicy.homogeneous(network))
    assert size == 32 * (27 * 4 + 4 + 8 + 4 + 25) + 4 * 9 + HEADER + 2 * HEADER_PER_LAYER


@pytest.mark.parametrize(
    "values", (torch.randperm(4096, generator=torch.Generator().manual_seed(0)), torch.rand(4096).double())
)
def test_buffers_of_other_types_take_no_more_than_claimed(values):
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.l = conv(3, 4), nn.Linear(4, 5)
            self.register_buffer("p", values)

        def forward(self, x):
            return self.l(self.a(x).mean((2, 3))) + self.p[:5].float()

    network = trace(Ordered(), torch.randn(2, 3, 8, 8))
    policy = CompressionPolicy.homogeneous(network, 8, 32)
    assert len(to_bytes(pack(freeze(compress(network, policy))))) <= total(Size(), network, policy) / 8


def test_a_depthwise_kernel_and_a_layer_called_twice():
    network = traced(
        lambda m, x: m.l(m.d(m.d(m.a(x))).mean((2, 3))), a=conv(3, 4), d=conv(4, 4, groups=4), l=nn.Linear(4, 5)
    )
    policy = CompressionPolicy(
        {"a": np.array([0, 4, 4, 4], np.uint8), "d": np.array([0, 2, 2, 2], np.uint8), "l": np.full(5, 8, np.uint8)},
        {"a": 8, "d": 8, "l": 8},
    )
    assert costs(MACs(), network, policy) == [64 * 3 * 27, 2 * 64 * 3 * 9, 15]
    assert costs(BOPs(), network, policy)[1] == 2 * 64 * 3 * 9 * 16
    assert costs(Size(), network, policy)[1] == 3 * (9 * 2 + 16 + 16 + 4) + HEADER_PER_LAYER  # stored once


def test_totals_are_sums_and_units_are_told():
    network = network_of("digits_cnn")
    policy = random_policy(network, 0, act_bits=(4, 8))
    alive = policy.alive(network)
    for model in MODELS:
        single = [
            float(
                model([load_of(network, layer, policy.weight_bits[layer.name], policy.act_bits[layer.name], alive)])[0]
            )
            for layer in network.layers
        ]
        assert costs(model, network, policy) == single and total(model, network, policy) == pytest.approx(sum(single))
        assert len(model([])) == 0
    assert [model.unit for model in MODELS] == ["bit", "MAC", "BOP", "BOP"]


class Shuffles(nn.Module):
    """More channels picked by their numbers than the header of its layers has room for."""

    def __init__(self, channels, groups):
        super().__init__()
        self.stem, self.head, self.groups = nn.Conv2d(3, channels, 1), nn.Linear(channels, 2), groups
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(4))
        for i in range(4 if groups is None else 0):
            self.register_buffer(f"order{i}", torch.randperm(channels))

    def forward(self, x):
        x = self.stem(x)
        for i, mix in enumerate(self.convs):
            x = mix(x).relu()
            x = nn.functional.channel_shuffle(x, self.groups) if self.groups else x[:, getattr(self, f"order{i}")]
        return self.head(x.mean((2, 3)))


SMALL = {
    "one layer": lambda: traced(lambda m, x: m.a(x), a=conv(3, 4)),
    "two layers": lambda: traced(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6), b=conv(6, 6)),
    "three layers": lambda: traced(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 6), c=conv(6, 4)
    ),
    "norm behind": lambda: traced(
        lambda m, x: m.l(m.n(torch.relu(m.a(x))).mean((2, 3))), a=conv(3, 4), n=nn.BatchNorm2d(4), l=nn.Linear(4, 5)
    ),
    "parameters": lambda: traced(
        lambda m, x: m.l((m.g(m.a(x)) * m.s).mean((2, 3))),
        a=conv(3, 4), g=nn.GroupNorm(2, 4), s=nn.Parameter(torch.ones(4, 1, 1)), l=nn.Linear(4, 5),
    ),
    **{
        f"{channels} channels shuffled in {groups}": lambda channels=channels, groups=groups: trace(
            randomise(Shuffles(channels, groups)), torch.randn(2, 3, 4, 4)
        )
        for channels, groups in ((256, 2), (256, None), (600, 2), (1024, None), (1024, 16))
    },
    **{
        f"random {seed}": lambda seed=seed: trace(randomise(RandomNet(seed)), torch.randn(2, 3, 8, 8))
        for seed in (1, 16, 17, 21)  # of the first 25 those whose headers hold most beside layers
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_no_file_is_larger_than_claimed(name):
    torch.manual_seed(0)
    network = SMALL[name]()
    calibration = calibrate(network, [(network.example, None)])
    for act_bits in ((32,), (8,), (2, 4, 8, 32)):
        for widths in ((4,), (4, 8, 32)):
            for sparsity in (0.0, 0.5):
                policy = random_policy(network, 0, sparsity, widths, act_bits)
                file = to_bytes(pack(freeze(compress(network, policy, calibration))))
                assert len(file) <= total(Size(), network, policy) / 8


# -- models of users ---------------------------------------------------------------------------------------------------


class Own:
    """Kernels that survive, told in some way."""

    unit = "kernel"

    def __init__(self, tell):
        self.tell = tell

    def __call__(self, loads):
        return self.tell(torch.stack([load.kept.sum() for load in loads]))


@pytest.mark.parametrize(
    "tell, words",
    (
        (lambda x: x.sum(), r"for 9 layers 'own' gives a tensor of shape \(\); mend Own"),
        (lambda x: x[:, None], r"gives a tensor of shape \(9, 1\)"),
        (lambda x: x.sum().item(), r"for 9 layers 'own' gives \d+\.0"),
        (lambda x: x.tolist(), r"'own' gives \["),
        (lambda x: x / 0, "costs must be finite, but 'own' is not for"),
        (lambda x: x * len(x), "must depend on its own load alone, but 'own' gives"),
    ),
)
def test_a_model_that_breaks_the_rules_is_named(tell, words):
    with pytest.raises(AjpqError, match=words):
        problem_of(budget={"own": 0.5}, costs={"own": Own(tell)})


def test_a_model_without_a_unit_is_named():
    with pytest.raises(AjpqError, match="have a `unit`, but 'own' is function"):
        problem_of(budget={"own": 0.5}, costs={"own": lambda loads: torch.ones(len(loads))})


def test_a_model_of_a_user_limits_like_ours():
    budget = problem_of(budget={"own": 0.5}, costs={"own": Own(lambda x: x)}).budget
    assert budget.original["own"] == sum(layer.c_out for layer in budget.network.layers)
