"""SkyNet (Zhang et al. 2020, arXiv 1909.09709, model C with ReLU6): the detector of the DAC-SDC contest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ajpq.models.residual import check_positive


class SkyNet(nn.Module):
    """Six pairs of a depthwise 3x3 and a pointwise 1x1 convolution, a bypass, and the head: `skynet`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.model_p1 = nn.Sequential(_pair(3, 48), nn.MaxPool2d(2), _pair(48, 96), nn.MaxPool2d(2), _pair(96, 192))
        self.model_p2 = nn.Sequential(nn.MaxPool2d(2), _pair(192, 384), _pair(384, 512))
        self.model_p3 = nn.Sequential(_pair(4 * 192 + 512, 96), nn.Conv2d(96, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        bypass = self.model_p1(x)  # (N, 192, H/4, W/4)
        deep = self.model_p2(bypass)  # (N, 512, H/8, W/8)
        # Space to depth by slices, so that tracing sees where every channel goes: c_out = (2 dy + dx) * 192 + c.
        corners = [bypass[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
        return self.model_p3(torch.cat([*corners, deep], 1))


def skynet(anchors: int = 2) -> SkyNet:
    """(N, 3, H, W), H and W multiples of 8 -> (N, 5 * anchors, H/8, W/8), see `ajpq.detection.Detection`.

    442,049 parameters with the batch-norms' and two anchors, 463.7 million MACs at 160x320. State-dict names: in a
    pair, .0 is the depthwise convolution, .1 its batch-norm, .3 the pointwise one, .4 its batch-norm; the pairs are
    model_p1.0, .2, .4, model_p2.1, .2 and model_p3.0; the head is model_p3.1.
    """
    check_positive(anchors=anchors)
    return SkyNet(5 * anchors)


def _pair(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, 1, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU6(),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU6(),
    )
