"""What is computed in floats between quantizers stays what it is in ONNX Runtime."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from nets import conv, traced
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.onnx_export import float_onnx, to_onnx
from ajpq.onnx_graph import integer_graph
from ajpq.policy import CompressionPolicy

NETS = {
    "an average over the edge": lambda m, x: m.b(F.avg_pool2d(F.relu(m.a(x)), 2, 2, ceil_mode=True)),
    "a transposed convolution": lambda m, x: m.b(F.relu(m.t(F.relu(m.a(x))))),
    "a fixed blur": lambda m, x: m.b(F.relu(F.conv2d(F.relu(m.a(x)), m.k, groups=8))),
    "a ReLU by keyword": lambda m, x: m.b(torch.relu(input=m.a(x))),
}


@pytest.mark.parametrize("name", NETS)
def test_runtimes_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 8, 2, 2)
    with torch.no_grad():
        up.weight *= torch.logspace(-2, 0, 8)[:, None, None]  # one step for all of them would be coarse
    blur = nn.Parameter(torch.rand(8, 1, 3, 3))
    network = traced(NETS[name], (3, 13, 13), a=conv(3, 8), b=conv(8, 6), t=up, k=blur)
    x = torch.randn(8, 3, 13, 13)
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    final = freeze(compress(network, policy, calibrate(network, [(x, None)])))
    session = onnxruntime.InferenceSession(to_onnx(final, x), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    with torch.no_grad():
        expected = integer_graph(final, x)(x)
    assert (found - expected).square().mean().sqrt() < 0.002 * expected.std()


def test_an_average_with_a_divisor_of_its_own_is_refused() -> None:
    for pool in (nn.AvgPool2d(2, divisor_override=3), lambda x: F.avg_pool2d(x, 2, divisor_override=3)):

        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.pool = conv(3, 4), pool  # noqa: B023

            def forward(self, x: Tensor) -> Tensor:
                return self.pool(self.conv(x))

        x = torch.randn(2, 3, 8, 8)
        with pytest.raises(AjpqError, match="divisor_override of 3"):
            float_onnx(torch.fx.symbolic_trace(Pooled()), x)
