"""Convolutions of integers get a multiple of four inputs, and put out the very same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx_pairs import outputs, without_and_with
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq import models
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.onnx_export import OPSET, to_onnx
from ajpq.onnx_fours import fill_fours
from ajpq.policy import CompressionPolicy
from ajpq.tracing import trace


def finished(net: nn.Module, images: Tensor, bits: int = 8) -> nn.Module:
    network = trace(net.eval(), images)
    policy = CompressionPolicy.homogeneous(network, bits, 8)
    return freeze(compress(network, policy, calibrate(network, [(images, None)])))


def inputs_of_convolutions(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """Inputs of a kernel and groups, in order."""
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in (node for node in model.graph.node if node.op_type == "Conv"):
        weight = node.input[1] if node.input[1] in sizes else made[node.input[1]].input[0]
        found.append((sizes[weight][1], next(a.i for a in node.attribute if a.name == "group")))
    return found


def few_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten())


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("net", [few_layers, pytest.param(models.resnet20, marks=pytest.mark.slow)])
def test_images_of_three_colours(net: Callable[[], nn.Module], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(6, 3, 32, 32)
    final = finished(net(), images, bits)
    plain, ours = without_and_with("fill_fours", final, images, monkeypatch)
    assert inputs_of_convolutions(plain)[0] == (3, 1) and inputs_of_convolutions(ours)[0] == (4, 1)
    assert inputs_of_convolutions(plain)[1:] == inputs_of_convolutions(ours)[1:]
    onnx.checker.check_model(ours, full_check=True)
    assert np.array_equal(outputs(plain, images), outputs(ours, images))


def test_narrow_depthwise_layer_makes_the_fourth_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ajpq.onnx_export.fold_stems", lambda model: None)  # which makes 32 of four
    images = torch.randn(4, 3, 32, 64)
    final = finished(models.skynet(), images)
    plain, ours = without_and_with("fill_fours", final, images, monkeypatch)
    assert inputs_of_convolutions(plain)[:2] == [(1, 3), (3, 1)] and inputs_of_convolutions(ours)[:2] == [
        (3, 1),
        (4, 1),
    ]
    assert "Pad" not in {node.op_type for node in ours.graph.node}
    onnx.checker.check_model(ours, full_check=True)
    np.testing.assert_allclose(outputs(plain, images), outputs(ours, images), rtol=1e-3, atol=1e-3)


class Shared(nn.Module):
    """Two convolutions of six inputs that read the same."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3)
        self.alike = alike

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return (self.b(x) + self.c(x if self.alike else x * 2)).flatten(1)


@pytest.mark.parametrize("alike", [True, False])
def test_several_readers(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 4, 9, 9)
    final = finished(Shared(alike), images)
    plain, ours = without_and_with("fill_fours", final, images, monkeypatch)
    onnx.checker.check_model(ours, full_check=True)
    assert np.array_equal(outputs(plain, images), outputs(ours, images))


class Twice(nn.Module):
    """A convolution of six inputs that runs twice: its weights grow for both or for none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.b(F.relu(self.a(x))))).flatten(1)


class Seen(nn.Module):
    """What a narrow depthwise layer gives is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), y


@pytest.mark.parametrize("net", [Twice(), Seen()])
def test_what_others_read_stays(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, 10, 10)
    final = finished(net, images)
    plain, ours = without_and_with("fill_fours", final, images, monkeypatch)
    onnx.checker.check_model(ours, full_check=True)
    assert np.array_equal(outputs(plain, images), outputs(ours, images))


def test_a_wide_float_depthwise_layer_stays_depthwise(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 4, 10, 10)
    net = nn.Sequential(nn.Conv2d(4, 30, 1), nn.Conv2d(30, 30, 3, groups=30), nn.Conv2d(30, 8, 1), nn.Flatten())
    network = trace(net.eval(), images)
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    widths = {name: np.full_like(bits, 32) if name == "1" else bits for name, bits in policy.weight_bits.items()}
    policy = CompressionPolicy(widths, policy.act_bits)
    final = freeze(compress(network, policy, calibrate(network, [(images, None)])))
    plain, ours = without_and_with("fill_fours", final, images, monkeypatch)
    assert inputs_of_convolutions(ours) == [(4, 1), (1, 30), (32, 1)]
    assert np.array_equal(outputs(plain, images), outputs(ours, images))


def test_float_networks_and_layers_with_groups_stay() -> None:
    images = torch.randn(4, 6, 8, 8)
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten())
    model = onnx.load_from_string(to_onnx(finished(net, images), images))
    assert inputs_of_convolutions(model) == [(3, 2), (1, 6)]
    before = model.SerializeToString()
    fill_fours(model)
    assert len(model.graph.node) == len(onnx.load_from_string(before).graph.node)
    assert model.opset_import[0].version == OPSET
