"""Zeros around activations become the pads of the convolutions behind them, and nothing else changes."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq import models
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.onnx_export import float_onnx, to_onnx
from ajpq.onnx_graph import integer_graph
from ajpq.policy import CompressionPolicy
from ajpq.tracing import trace


class Padded(nn.Module):
    """A convolution behind `F.pad`, whose padded input something else may read."""

    def __init__(self, pads: list[int], value: float = 0.0, mode: str = "constant", twice: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.more = nn.Conv2d(3, 4, 3, padding=(0, 2))
        self.pads, self.value, self.mode, self.twice = pads, value, mode, twice

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.pads, self.mode, self.value) if self.mode == "constant" else F.pad(x, self.pads, self.mode)
        y = self.conv(x).flatten(1)
        if self.twice == "conv":
            return torch.cat([y, self.more(x).flatten(1)], 1)
        return torch.cat([y, x.flatten(1)], 1) if self.twice == "value" else y


def run(model: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def kinds(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def test_zeros_before_max_pooling_stay_zeros() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            nn.init.constant_(self.conv.bias, -9.0)  # all that is pooled is negative

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(F.pad(self.conv(x), (1, 1, 1, 1)), 3, 2)

    x = torch.randn(2, 3, 8, 8)
    net = Pooled().eval()
    network = trace(net, x)
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    finished = freeze(compress(network, policy, calibrate(network, [(x, None)])))
    for model in (float_onnx(net, x), to_onnx(finished, x)):
        found = run(model, x)
        assert (found[:, :, 0].abs() < 1e-20).all() and (found[:, :, 1:, 1:] < 0).all()
        assert torch.allclose(found, net(x), atol=0.2)


@pytest.mark.parametrize(
    ("net", "folded"),
    [
        (Padded([0, 1, 0, 1]), True),
        (Padded([3, 1, 2, 5], twice="conv"), True),
        (Padded([0, 1, 0, 1], twice="value"), False),
        (Padded([0, 1, 0, 1], value=0.5), False),
        (Padded([0, 1, 0, 1], mode="reflect"), False),
        (Padded([0, 1, -1, 1]), False),
        (Padded([0, 1, 0, 1, 0, 0]), True),
    ],
)
def test_only_zeros_in_front_of_convolutions_are_folded(net: Padded, folded: bool) -> None:
    x = torch.randn(3, 3, 9, 8)
    model = float_onnx(net.eval(), x)
    assert ("Pad" not in kinds(model)) == folded
    graph = onnx.load_from_string(model).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_padding_of_tensorflow_is_no_node_of_an_int8_file(bits: int) -> None:
    net = models.mobilenet_v1(classes=10, width=0.25, tf_same=True).eval()
    images = torch.randn(8, 3, 64, 64)
    network = trace(net, images)
    policy = CompressionPolicy.homogeneous(network, 8, bits)
    final = freeze(compress(network, policy, calibrate(network, [(images, None)])))
    model = to_onnx(final, images)
    graph = onnx.load_from_string(model).graph
    known = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    assert [known[node.input[1]] for node in graph.node if node.op_type == "Pad"] == [[0] * 5 + [1, 0, 0]], "a channel"
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    with torch.no_grad():
        ours = final(images)
    assert (run(model, images) - ours).abs().max() <= 0.05 * ours.abs().max()


def test_what_is_put_out_keeps_its_shape() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu6(F.pad(x, [0, 1, 0, 1]))
            return self.conv(x), x

    model, x = float_onnx(Seen().eval(), torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    assert "Pad" in kinds(model)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": x.numpy()})[1].shape == (2, 3, 9, 9)


def test_a_padding_keeps_quantizers_of_different_steps_apart() -> None:
    """Side by side, ONNX Runtime would make one of them, and round otherwise."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 3), nn.Conv2d(6, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(F.relu(self.a(x)), [1, 0, 0, 2])
            return self.b(y).flatten(1) + self.c(y).flatten(1)

    torch.manual_seed(0)
    net, images = Apart().eval(), torch.randn(8, 3, 10, 10)
    network = trace(net, images)
    ranges = calibrate(network, [(images, None)])
    final = freeze(compress(network, CompressionPolicy.homogeneous(network, 8, 8), ranges))
    with torch.no_grad():
        told = integer_graph(final, images)(images)
    found = run(to_onnx(final, images), images)
    assert (found - told).abs().max() <= 1e-5 * told.abs().max()


def test_a_channel_padded_too_is_no_padding_of_pixels() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, [0, 0, 0, 0, 1, 1]))

    net, x = Wider().eval(), torch.randn(2, 3, 4, 4)
    model = float_onnx(net, x)
    assert "Pad" in kinds(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x), net(x), rtol=1e-4, atol=1e-5)
