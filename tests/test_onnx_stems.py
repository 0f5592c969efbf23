"""The first layers for blocks of pixels: the same numbers from fewer, wider pixels, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_pairs import outputs, without_and_with
from torch import Tensor, nn

from ajpq import models
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.policy import CompressionPolicy
from ajpq.tracing import trace


class Stem(nn.Module):
    """first, then 1x1 convolutions, a pooling and a layer behind it; `seen`: another reader of what is pooled."""

    def __init__(self, first: nn.Module, made: int, pool: nn.Module, seen: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(first, nn.BatchNorm2d(first.out_channels), nn.ReLU6())
        self.points = nn.Sequential(nn.Conv2d(first.out_channels, made, 1), nn.ReLU())
        self.pool, self.last, self.seen = pool, nn.Conv2d(made, 5, 3), seen

    def forward(self, x: Tensor) -> Tensor:
        x = self.points(self.first(x))
        y = self.last(self.pool(x)).mean((2, 3))
        return y + x.mean((2, 3))[:, :5] if self.seen else y


def depthwise() -> nn.Module:
    return nn.Conv2d(3, 3, 3, padding=1, groups=3)


def written(net: nn.Module, images: Tensor, monkeypatch, bits: int = 8) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Without and with blocks."""
    torch.manual_seed(0)
    for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    network = trace(net.eval(), images)
    policy = CompressionPolicy.homogeneous(network, bits, 8)
    final = freeze(compress(network, policy, calibrate(network, [(images, None)])))
    return without_and_with("fold_stems", final, images, monkeypatch)


def kernels(model: onnx.ModelProto) -> list[tuple[list[int], list[int]]]:
    """Kernel and stride of every convolution, in order."""
    told = [{a.name: list(a.ints) for a in node.attribute} for node in model.graph.node if node.op_type == "Conv"]
    return [(one["kernel_shape"], one["strides"]) for one in told]


@pytest.mark.parametrize("bits", [8, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("first", "size", "kernel"),
    [
        (depthwise, (16, 24), [4, 6]),  # float: a depthwise layer of three channels
        (depthwise, (16, 22), [4, 4]),  # 22 columns are no fours
        (lambda: nn.Conv2d(3, 4, 3, padding=1), (16, 24), [4, 6]),  # int8
        (lambda: nn.Conv2d(3, 4, 5, padding=(1, 3)), (18, 22), [6, 8]),  # 16 x 24 behind its padding
    ],
)
def test_the_first_layers_compute_blocks_and_put_out_the_same(first, size, kernel, bits, monkeypatch) -> None:
    images = torch.randn(5, 3, *size)
    plain, ours = written(Stem(first(), 16, nn.MaxPool2d(2)), images, monkeypatch, bits)
    onnx.checker.check_model(ours, full_check=True)
    assert kernels(plain)[0][1] == [1, 1] and kernels(ours)[0] == (kernel, [2, kernel[1] - kernels(plain)[0][0][1] + 1])
    assert kernels(ours)[1:] == kernels(plain)[1:]
    for batch in (images, images[:1]):
        assert np.array_equal(outputs(plain, batch), outputs(ours, batch))
    assert len({tensor.name for tensor in ours.graph.initializer}) == len(ours.graph.initializer)


def test_skynet_computes_blocks(monkeypatch) -> None:
    images = torch.randn(4, 3, 32, 64)
    plain, ours = written(models.skynet(), images, monkeypatch)
    assert kernels(ours)[0] == ([4, 6], [2, 4]) and kernels(ours)[1:] == kernels(plain)[1:]
    assert np.array_equal(outputs(plain, images), outputs(ours, images))


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (lambda: Stem(depthwise(), 16, nn.MaxPool2d(2)), (16, 23)),  # odd
        (lambda: Stem(depthwise(), 16, nn.MaxPool2d(3, 2)), (16, 24)),  # another pooling
        (lambda: Stem(depthwise(), 16, nn.MaxPool2d(2, padding=1)), (16, 24)),
        (lambda: Stem(depthwise(), 16, nn.AvgPool2d(2)), (16, 24)),
        (lambda: Stem(depthwise(), 16, nn.MaxPool2d(2), seen=True), (16, 24)),  # somebody needs the pixels
        (lambda: Stem(nn.Conv2d(3, 4, 3, stride=2), 16, nn.MaxPool2d(2)), (32, 32)),
        (lambda: Stem(nn.Conv2d(3, 4, 3, dilation=2), 16, nn.MaxPool2d(2)), (16, 24)),
        (lambda: Stem(nn.Conv2d(3, 8, 3, padding=1), 16, nn.MaxPool2d(2)), (16, 24)),  # many channels already
        (lambda: Stem(depthwise(), 160, nn.MaxPool2d(2)), (16, 24)),  # many kernels: their work counts
        pytest.param(models.resnet20, (32, 32), marks=pytest.mark.slow),
    ],
)
def test_other_beginnings_are_left_alone(net, size, monkeypatch) -> None:
    plain, ours = written(net(), torch.randn(3, 3, *size), monkeypatch)
    assert plain == ours
