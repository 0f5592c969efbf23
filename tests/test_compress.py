"""From policy to finished network: what learns, what is frozen, and how close the two are."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import batches_of, conv, difference, images_of, network_of, random_policy, traced
from torch import nn
from torch.nn import functional as F

from ajpq import quantize
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.layers import ChannelAffine, FrozenLayer, QuantLayer
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.tracing import trace


@functools.cache
def calibration_of(name: str) -> dict:
    return calibrate(network_of(name), batches_of(network_of(name), 2))


def relative(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = b(x)
        return ((a(x) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "name", ("digits_cnn", "resnet20", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
)
@pytest.mark.parametrize("act_bits", (32, 8))
def test_student_and_finished_network_agree(name, act_bits):
    """They differ by float16 scales and biases and, with quantized activations, by roundings that these tip over."""
    network = network_of(name)
    policy = random_policy(network, 0, 0.3, widths=(2, 4, 8, 32), act_bits=(act_bits,))
    student = compress(network, policy, calibration_of(name))
    finished = freeze(student)
    x = images_of(name, n=8, seed=7)
    assert relative(finished, student, x) < (0.003 if act_bits == 32 else 0.1)
    with torch.no_grad():
        assert student(x).std() > 0.01
    kinds = {type(m) for m in finished.modules()}
    assert not kinds & {nn.Conv2d, nn.Linear, QuantLayer, nn.Dropout}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in finished.modules())
    assert not list(finished.parameters()) or not any(p.requires_grad for p in finished.parameters())
    unfolded = {norm.name for norm in network.norms if norm.folds_into is None}
    assert {n for n, m in finished.named_modules() if isinstance(m, ChannelAffine)} == unfolded


def test_frozen_codes_are_those_of_the_student():
    network = network_of("digits_cnn")
    student = compress(network, random_policy(network, 3, 0.3), calibration_of("digits_cnn"))
    finished, checked = freeze(student), 0
    for layer in network.layers:
        old, new = student.get_submodule(layer.name), finished.get_submodule(layer.name)
        assert isinstance(new, FrozenLayer)
        if isinstance(old, QuantLayer):
            assert torch.equal(new.codes, quantize.encode(old.weight, old.bits, old.scale)) and torch.equal(
                new.bits, old.bits
            )
            assert (new.codes[new.bits == 32] == 0).all() and (new.scale[new.bits == 32] == 0).all()
            assert new.scale.dtype == torch.float16 and new.codes.dtype == torch.int8
            checked += 1
    assert checked == len(network.layers)


def test_frozen_scales_and_biases_carry_the_norm():
    network = traced(
        lambda m, x: m.l(F.relu(m.n(m.a(x))).mean((2, 3))), a=conv(3, 4), n=nn.BatchNorm2d(4), l=nn.Linear(4, 5)
    )
    norm = network.module.get_submodule("n")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 2.0]))
    policy = CompressionPolicy(
        {"a": np.array([4, 2, 3, 32], np.uint8), "l": np.full(5, 32, np.uint8)}, {"a": 32, "l": 32}
    )
    student = compress(network, policy)
    finished = freeze(student)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    old, new = student.a, finished.a
    assert torch.equal(new.scale[:3], (old.scale * gain)[:3].half()) and new.scale[1] < 0 and new.scale[2] == 0
    assert torch.allclose(new.raw, old.weight[3:] * gain[3], rtol=1e-6)
    bias = (old.bias - norm.running_mean) * gain + norm.bias
    assert torch.equal(new.bias[:3], new.bias[:3].half().float()) and torch.allclose(
        new.bias, bias, rtol=1e-3, atol=1e-4
    )
    assert not hasattr(finished, "n") and relative(finished, student, network.example) < 1e-3


def test_layers_of_32_bits_are_untouched():
    network = network_of("digits_cnn")
    policy = CompressionPolicy.homogeneous(network)
    student = compress(network, policy)
    assert not any(isinstance(m, QuantLayer) for m in student.modules())
    assert difference(freeze(student), network.module, images_of("digits_cnn", n=8)) <= 1e-5
    mixed = CompressionPolicy({**policy.weight_bits, "conv1": np.full(16, 4, np.uint8)}, policy.act_bits)
    student = compress(network, mixed)
    assert [n for n, m in student.named_modules() if isinstance(m, QuantLayer)] == ["conv1"]
    assert type(student.linear) is nn.Linear


def test_a_norm_that_others_read_or_that_comes_first_is_not_folded():
    network = traced(
        lambda m, x: (lambda y: m.l((m.n(y) + m.k(F.relu(y))).mean((2, 3))))(m.a(m.first(x))),
        first=nn.BatchNorm2d(3),
        a=conv(3, 4),
        n=nn.BatchNorm2d(4),
        k=conv(4, 4),
        l=nn.Linear(4, 5),
    )
    student = compress(network, random_policy(network, 0, 0.2))
    finished = freeze(student)
    assert {n for n, m in finished.named_modules() if isinstance(m, ChannelAffine)} == {"first", "n"}
    assert relative(finished, student, network.example) < 2e-3


def test_a_saved_student_folds_its_norms_too(tmp_path: Path):
    network = network_of("resnet20")
    student = compress(network, random_policy(network, 0, 0.3), calibration_of("resnet20"))
    torch.save(student, tmp_path / "student.pt")
    finished, loaded = freeze(student), freeze(torch.load(tmp_path / "student.pt", weights_only=False))
    assert not any(isinstance(m, ChannelAffine) for m in loaded.modules())
    assert torch.equal(loaded(network.example), finished(network.example))


def test_a_norm_without_affine_and_dropout_of_every_kind():
    network = traced(
        lambda m, x: m.l(F.dropout(m.d(m.n(m.a(x))), 0.5, m.training).mean((2, 3))),
        a=conv(3, 4, bias=False),
        n=nn.BatchNorm2d(4, affine=False),
        d=nn.Dropout2d(),
        l=nn.Linear(4, 5),
    )
    student = compress(network, random_policy(network, 1, 0.2))
    finished = freeze(student)
    assert relative(finished, student, network.example) < 1e-3
    assert not any("dropout" in str(node.target).lower() for node in finished.graph.nodes)
    assert len(list(finished.graph.nodes)) == len(list(student.graph.nodes)) - 3


def test_a_norm_over_positions_is_not_folded_into_kernels():
    network = traced(
        lambda m, x: m.l(m.n(m.t(m.a(x).flatten(2))).mean(2)),
        a=conv(3, 6),
        t=nn.Linear(64, 6),
        n=nn.BatchNorm1d(6),
        l=nn.Linear(6, 5),
    )
    student = compress(network, CompressionPolicy.homogeneous(network))
    assert relative(freeze(student), student, network.example) < 2e-3


def test_a_missing_calibration_is_an_error_that_names_the_layer():
    network = network_of("digits_cnn")
    policy = random_policy(network, 0, act_bits=(8,))
    with pytest.raises(AjpqError, match="'conv1' has act_bits 8.*calibrate"):
        compress(network, policy)
    partial = {name: seen for name, seen in calibration_of("digits_cnn").items() if name != "linear"}
    with pytest.raises(AjpqError, match="'linear' has act_bits 8"):
        compress(network, policy, partial)


def test_an_invalid_policy_is_refused():
    network = network_of("digits_cnn")
    with pytest.raises(AjpqError, match="'linear'"):
        compress(
            network,
            CompressionPolicy(
                {**random_policy(network, 0).weight_bits, "linear": np.zeros(10, np.uint8)},
                random_policy(network, 0).act_bits,
            ),
        )


def test_gradients_reach_weights_scales_and_steps():
    network = network_of("digits_cnn")
    student = compress(
        network, random_policy(network, 2, 0.3, (1, 2, 3, 4, 8), (4, 8)), calibration_of("digits_cnn")
    ).train()
    x = images_of("digits_cnn", n=8)
    F.cross_entropy(student(x), torch.arange(8)).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    names = dict(student.named_parameters())
    assert {"conv1.weight", "conv1.scale", "conv1.act.scale", "linear.bias", "bn1.weight"} <= set(names)


def test_a_student_learns_and_the_network_does_not_change():
    network = network_of("digits_cnn")
    before = copy.deepcopy(network.module.state_dict())
    student = compress(network, random_policy(network, 0, 0.3, (2, 4), (8,)), calibration_of("digits_cnn")).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9)
    x, y = images_of("digits_cnn", n=16), torch.arange(16) % 10
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(student(x), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items())
    finished = freeze(student)
    assert student.training and relative(finished, copy.deepcopy(student).eval(), x) < 0.05


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_sees_exactly_what_every_layer_reads():
    network = network_of("digits_cnn")
    batches = batches_of(network, 2, 16)
    seen: dict[str, list] = {}
    model = copy.deepcopy(network.module)
    for layer in network.layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.setdefault(name, []).append(args[0])
        )
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    calibration = calibrate(network, batches)
    assert list(calibration) == [layer.name for layer in network.layers]
    for name, found in calibration.items():
        values = torch.cat([t.flatten() for t in seen[name]])
        assert found.low == pytest.approx(min(values.min().item(), 0)) and found.high == pytest.approx(
            values.max().item()
        )
        assert found.counts.sum() == len(values) and found.signed == (values.min() < 0)
    assert calibration["conv1"].signed and not calibration["linear"].signed
    assert len(network.module._forward_hooks) == 0


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_activation_steps_are_nearly_the_best_there_are(bits):
    network = traced(
        lambda m, x: m.l(F.relu(m.a(x)).mean((2, 3)) + m.b(x).mean((2, 3))),
        a=conv(3, 6),
        b=conv(3, 6),
        l=nn.Linear(6, 5),
    )
    batches = batches_of(network, 4, 64)
    found = calibrate(network, batches)["a"]
    x = torch.cat([x for x, _ in batches])

    def error(step: float) -> float:
        return (quantize.fake_quantize_act(x, torch.tensor(step), bits, True) - x).square().mean().item()

    steps = np.linspace(0.02, 2, 400) * x.abs().max().item() / 2 ** (bits - 1)
    assert error(found.step(bits)) <= 1.05 * min(error(float(s)) for s in steps)
    assert found.step(32) == 1


def test_one_pixel_that_is_no_number_is_noticed():
    network = network_of("digits_cnn")
    (x, y), *_ = batches_of(network)
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(AjpqError, match="must be finite"):
        calibrate(network, [(x, y)])


def test_calibration_errors():
    network = network_of("digits_cnn")
    with pytest.raises(AjpqError, match="at least one image"):
        calibrate(network, [])
    with pytest.raises(AjpqError, match="activations must be finite.*'conv1'"):
        calibrate(network, [(torch.full((2, 1, 8, 8), torch.inf), None)])


def test_a_layer_that_only_reads_zeros_is_no_accident():
    network = traced(lambda m, x: m.l(F.relu(-F.relu(m.a(x))).mean((2, 3))), a=conv(3, 6), l=nn.Linear(6, 5))
    calibration = calibrate(network, batches_of(network))
    student = compress(network, CompressionPolicy.homogeneous(network, 4, 8), calibration)
    assert torch.isfinite(student(network.example)).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_a_kernel_that_its_bias_drowns_is_no_reason_to_leave_integers(bits: int) -> None:
    """As in MobileNetV1 with folded batch-norms: a switched-off channel has weights of 1e-5 and a bias of -2."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        layer.weight[2] *= 1e-4
        layer.bias[2] = -4.0
    images = torch.rand(16, 3, 8, 8)
    network = trace(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval(), images)
    policy = CompressionPolicy.homogeneous(network, bits, 8)
    student = compress(network, policy, calibrate(network, [(images, None)]))
    final = freeze(student)
    found = final.get_submodule("0")
    assert found.whole_bias is not None and found.scale[2] == 0 and not found.codes[2].any()
    assert (found.scale[[0, 1, 3, 4, 5]] > 0).all()
    found.reader = ()  # its sums themselves, not on the grid of the next layer
    with torch.no_grad():
        theirs = student.get_submodule("0")(images)
        torch.testing.assert_close(found(images), theirs, rtol=1e-3, atol=1e-3)
        assert (found(images)[:, 2] == found.shift[2]).all() and found.shift[2] == pytest.approx(-4, rel=1e-3)


@pytest.mark.parametrize(("small", "bias"), [(3e-4, 12.0), (1e-3, 24.0), (1e-2, 200.0)])
def test_a_bias_that_is_taken_away_again_drowns_no_kernel(small: float, bias: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        layer.weight[:4] *= small
        layer.bias[:4] = bias
    images = torch.rand(16, 3, 8, 8)
    net = nn.Sequential(layer, nn.InstanceNorm2d(8, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)).eval()
    network = trace(net, images)
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    student = compress(network, policy, calibrate(network, [(images, None)]))
    final = freeze(student)
    assert (final.get_submodule("0").scale > 0).all()
    assert relative(final, student, images) < 0.1


def test_a_layer_of_drowned_kernels_only_stays_in_integers() -> None:
    layer = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        layer.weight *= 1e-4
        layer.bias.fill_(-4.0)
    images = torch.rand(8, 3, 8, 8)
    network = trace(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 4)).eval(), images)
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    final = freeze(compress(network, policy, calibrate(network, [(images, None)])))
    found = final.get_submodule("0")
    assert found.whole_bias is not None and not found.codes.any()
    torch.testing.assert_close(found(images), torch.full((8, 4, 8, 8), -4.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("what", ("biases", "steps of weights"))
def test_what_float16_cannot_hold_is_refused_and_not_clipped(what):
    """A network that tells prices in cents: its last bias is 250,000."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[3].bias.fill_(250_000.0) if what == "biases" else model[3].weight.mul_(1e9)
    with pytest.raises(AjpqError, match=f"{what} must be at most 65,504 for float16, but the largest of '3' is"):
        Problem(model, [(x, x)], [(x, x)], {"size": 0.9})
    network = trace(model, x)
    student = compress(network, CompressionPolicy.homogeneous(network, 8, 8), calibrate(network, [(x, x)]))
    with pytest.raises(AjpqError, match=f"{what} must be at most 65,504 for float16, but the largest of '3' is"):
        freeze(student)
