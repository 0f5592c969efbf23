"""Weights solved for layer by layer, and rounding that compensates."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import batches_of, conv, network_of, random_policy, traced
from torch import nn
from torch.nn import functional as F

from ajpq import goals as goaling
from ajpq import quantize, reconstruction
from ajpq.calibration import calibrate
from ajpq.compensation import round_compensated
from ajpq.compression import compress, freeze
from ajpq.correction import Correction
from ajpq.errors import AjpqError
from ajpq.goals import Goals
from ajpq.layers import Geometry
from ajpq.matching import match
from ajpq.policy import CompressionPolicy
from ajpq.reconstruction import patches, reconstruct, solve
from ajpq.scoring.local import Local
from ajpq.scoring.setting import Setting
from ajpq.step_sizes import fit_scale


def moments(groups, n, seed=0, samples=600):
    """Second moments of inputs that hang together."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, samples, 2, generator=random) @ torch.randn(groups, 2, n, generator=random)
    x = x + 0.3 * torch.randn(groups, samples, n, generator=random)
    return (x.mT @ x / samples).double()


def nearest(weight, bits, scale):
    flat = weight.reshape(-1, weight.shape[-1])
    return quantize.decode(quantize.encode(flat, bits, scale), bits, scale).reshape(weight.shape)


def loss(rounded, weight, gram):
    error = (rounded - weight).double()
    return float((error @ gram * error).sum())


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("groups, n", ((1, 300), (5, 9)))
def test_compensated_rounding_lies_on_the_grid_and_beats_the_nearest(bits, groups, n):
    weight = torch.randn(groups, 4, n, generator=torch.Generator().manual_seed(1))
    widths = torch.full((groups * 4,), bits, dtype=torch.uint8)
    scale = fit_scale(weight.reshape(-1, n), widths)
    gram = moments(groups, n)
    rounded = round_compensated(weight, gram, widths, scale)
    assert torch.allclose(nearest(rounded, widths, scale), rounded, atol=1e-6)
    assert loss(rounded, weight, gram) < 0.8 * loss(nearest(weight, widths, scale), weight, gram)


def test_inputs_that_do_not_hang_together_are_rounded_to_the_nearest():
    weight = torch.randn(1, 6, 40)
    widths = torch.tensor([1, 2, 3, 4, 6, 8], dtype=torch.uint8)
    scale = fit_scale(weight[0], widths)
    gram = torch.diag(torch.rand(40) + 0.1).double()[None]
    assert torch.allclose(round_compensated(weight, gram, widths, scale), nearest(weight, widths, scale))


def test_every_kernel_has_its_own_width_and_float_ones_stay():
    weight, gram = torch.randn(1, 3, 30), moments(1, 30)
    widths = torch.tensor([2, 32, 8], dtype=torch.uint8)
    scale = fit_scale(weight[0], widths)
    rounded = round_compensated(weight, gram, widths, scale)
    assert torch.equal(rounded[0, 1], weight[0, 1]) and len(rounded[0, 0].unique()) <= 4
    alone = round_compensated(weight[:, :1], gram, widths[:1], scale[:1])
    assert torch.equal(alone[0, 0], rounded[0, 0])


@pytest.mark.parametrize(
    "options",
    (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 1), "padding": (1, 0), "stride": (2, 1)},
        {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2, "groups": 2},
        {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": 1, "padding": "valid"},
    ),
)
def test_patches_times_weights_is_the_convolution(options):
    layer, x = nn.Conv2d(4, 6, bias=False, **options), torch.randn(3, 4, 9, 7)
    y = layer(x).flatten(2).mT  # (3, positions, 6)
    at = torch.randperm(y.shape[1])[:11]
    seen = patches(x, Geometry.of(layer), layer.weight.shape[2:], at).reshape(3, 11, layer.groups, -1)
    weight = layer.weight.reshape(layer.groups, 6 // layer.groups, -1)
    assert torch.allclose(torch.einsum("npgi,gki->npgk", seen, weight).reshape(3, 11, 6), y[:, at], atol=1e-5)


@torch.no_grad()
def distance(one, other, x):
    return float((one(x) - other(x)).square().mean())


def chain(bias=False):
    return traced(
        lambda m, x: m.l(F.relu(m.n(m.b(F.relu(m.d(F.relu(m.k(m.a(x)))))))).mean((2, 3))),
        a=conv(3, 12, bias=False),
        k=nn.BatchNorm2d(12),
        d=conv(12, 12, groups=12, bias=True),
        b=conv(12, 16, bias=bias),
        n=nn.BatchNorm2d(16),
        l=nn.Linear(16, 10),
    )


def test_an_uncompressed_network_stays_what_it_is():
    network = chain()
    data, policy = batches_of(network, 4, 64), CompressionPolicy.homogeneous(network)
    student = compress(network, policy)
    reconstruct(student, network, policy, data)
    assert torch.allclose(student(data[0][0]), network.module(data[0][0]), atol=1e-3)


@pytest.mark.parametrize("reader", ("conv", "grouped", "linear"))
def test_a_channel_that_another_one_tells_is_not_missed(reader):
    """Channel 1 is twice channel 0, channel 3 is channel 2 turned round: readers can do without 1 and 3."""
    last = {
        "conv": conv(4, 6, 3, bias=False),
        "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=True),
        "linear": nn.Linear(4 * 36, 6),
    }[reader]
    run = {"linear": lambda m, x: m.b(m.a(x).flatten(1))}.get(reader, lambda m, x: m.b(m.a(x)).mean((2, 3)))
    network = traced(run, (3, 6, 6), a=conv(3, 4, 3, bias=True), b=last)
    with torch.no_grad():
        a = network.module.get_submodule("a")
        a.weight[1], a.bias[1], a.weight[3], a.bias[3] = 2 * a.weight[0], 2 * a.bias[0], -a.weight[2], -a.bias[2]
    widths = {layer.name: np.full(layer.c_out, 32, np.uint8) for layer in network.layers}
    widths["a"][[1, 3]] = 0
    policy = CompressionPolicy(widths, dict.fromkeys(widths, 32))
    data = batches_of(network, 4, 200)
    student = compress(network, policy)
    x = batches_of(network, 1, 50, seed=9)[0][0]
    before = distance(student, network.module, x)
    reconstruct(student, network, policy, data)
    after = distance(student, network.module, x)
    assert after < 0.02 * before  # the ridge keeps a little of the old weights
    assert {name: m.weight.shape for name, m in student.named_modules() if hasattr(m, "weight")}["a"] == (2, 3, 3, 3)


@pytest.mark.parametrize(
    "name",
    (
        "chain",
        "digits_cnn",
        "resnet20",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v3_small", "shufflenet_v2_x0_5")),
    ),
)
def test_outputs_come_closer_than_with_matched_norms(name):
    network = chain(bias=True) if name == "chain" else network_of(name)
    data = batches_of(network, 4, 32)
    x = batches_of(network, 1, 64, seed=7)[0][0]
    for seed, sparsity in ((0, 0.3), (1, 0.0)):
        policy = random_policy(network, seed, sparsity, (2, 3, 4, 8, 32), (8,))
        students = [compress(network, policy, calibrate(network, data)) for _ in range(2)]
        match(students[0], network, policy, data)
        reconstruct(students[1], network, policy, data)
        matched, solved = (distance(student, network.module, x) for student in students)
        assert solved < matched, (seed, solved, matched)
        assert torch.isfinite(freeze(students[1])(x)).all()


def test_steps_fit_the_new_weights_and_weights_lie_on_their_grids():
    network = chain()
    data, policy = batches_of(network, 4, 32), random_policy(chain(), 3, 0.3, (2, 4, 8), (8,))
    student = compress(network, policy, calibrate(network, data))
    before = student.get_submodule("b").scale.detach().clone()
    reconstruct(student, network, policy, data)
    layer = student.get_submodule("b")
    on_grid = quantize.fake_quantize(layer.weight, layer.bits, layer.scale)
    assert torch.allclose(layer.weight, on_grid, atol=1e-5) and not torch.equal(layer.scale, before)


def test_neither_the_original_nor_the_images_are_touched_and_it_repeats():
    network = chain()
    data, policy = batches_of(network, 2, 16), random_policy(chain(), 1, 0.3, (2,), (8,))
    before = copy.deepcopy(network.module.state_dict())
    images = [x.clone() for x, _ in data]
    goals, found = Goals(network, data), []
    for given in (None, goals, goals):
        student = compress(network, policy, calibrate(network, data)).train()
        solve(student, network, policy, given) if given else reconstruct(student, network, policy, data)
        assert not any(module.training for module in student.modules())
        found.append(student.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in network.module.state_dict().items())
    assert all(torch.equal(x, y) for x, (y, _) in zip(images, data, strict=True))
    assert not any(m._forward_hooks for m in network.module.modules())
    assert all(torch.equal(t, other[name]) for other in found[1:] for name, t in found[0].items())


def test_modules_that_run_twice_and_enormous_kernels_stay(monkeypatch):
    network = traced(
        lambda m, x: m.l(m.n(m.b(F.relu(m.n(m.b(F.relu(m.a(x))))))).flatten(1)),
        (3, 6, 6), a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), l=nn.Linear(8 * 36, 10),
    )  # fmt: skip
    monkeypatch.setattr(reconstruction, "LARGEST", 200)
    data, policy = batches_of(network, 2, 16), random_policy(network, 0, 0.3, (2,), (8,))
    student = compress(network, policy, calibrate(network, data))
    before = copy.deepcopy(student.state_dict())
    reconstruct(student, network, policy, data)
    changed = {name.split(".")[0] for name, t in student.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"a"}


def test_no_images_are_refused():
    network = chain()
    policy = CompressionPolicy.homogeneous(network)
    with pytest.raises(AjpqError, match="Reconstruction needs at least one image, but there is none"):
        reconstruct(compress(network, policy), network, policy, [])


def test_a_score_may_be_that_of_the_reconstructed_network():
    network = network_of("digits_cnn")
    data, search = batches_of(network, 2, 32), batches_of(network, 2, 50, seed=5)
    setting = Setting(network, calibrate(network, data), data, search, correction="reconstruction")
    policy = random_policy(network, 0, 0.3, (2, 4), (8,))
    student = compress(network, policy, setting.calibration)
    Correction(network, data, "reconstruction")(student, policy)
    x = torch.cat([x for x, _ in search])
    with torch.no_grad():
        p, q = (F.log_softmax(net(x).double(), 1) for net in (network.module, student))
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    local = Local(setting, workers=1)
    assert local.measure(policy).divergence == pytest.approx(divergence, rel=1e-4)
    plain = Local(replace(setting, correction="least_squares"), workers=1).measure(policy)
    assert local.measure(policy).divergence < plain.divergence


def test_a_loader_that_draws_others_next_time_is_read_once():
    class Drawn:
        def __iter__(self):
            while True:
                yield torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)

    network = chain()
    policy = CompressionPolicy.homogeneous(network)
    student = compress(network, policy)
    reconstruct(student, network, policy, Drawn(), images=60)
    x = torch.randn(20, 3, 8, 8)
    assert distance(student, network.module, x) < 1e-3 * float(network.module(x).var())


def test_no_more_images_than_fit_into_the_memory(monkeypatch):
    network = chain()
    data = batches_of(network, 3, 16)
    assert [len(x) for x in Goals(network, data, 40).images] == [16, 16, 8]
    assert [len(x) for x in Goals(network, data, None).images] == [16, 16, 16]
    monkeypatch.setattr(goaling, "MEMORY", 20 * 4 * 8 * 8 * 16)  # 20 images of the largest value
    assert sum(len(x) for x in Goals(network, data).images) == 20
    monkeypatch.setattr(goaling, "MEMORY", 1)
    assert sum(len(x) for x in Goals(network, data).images) == 1


def test_a_layer_that_reads_no_numbers_stays():
    network, policy = chain(), CompressionPolicy.homogeneous(chain(), 4, 8)
    data = [(torch.full((8, 3, 8, 8), torch.nan), torch.zeros(8, dtype=torch.long))]
    student = compress(network, policy, calibrate(network, batches_of(network, 1, 16)))
    before = student.get_submodule("b").weight.detach().clone()
    reconstruct(student, network, policy, data)
    assert torch.equal(student.get_submodule("b").weight, before)
