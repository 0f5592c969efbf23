"""MobileNetV1 (Howard et al. 2017, arXiv 1704.04861, table 1), with batch-norm or with it folded into the biases."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.models.residual import check_positive

# Output channels and stride of the 13 pairs of a depthwise 3x3 and a pointwise 1x1 convolution.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """27 convolutions, each with its batch-norm and ReLU6, global average pool, 1x1 convolution: `mobilenet_v1`."""

    def __init__(self, classes: int, width: float, tf_same: bool, folded: bool, background: bool) -> None:
        super().__init__()
        self.background = background
        widths = [max(int(width * c), 8) for c in (32, *(c for c, _ in PAIRS))]
        convs = [_conv(3, widths[0], 3, 2, 1, tf_same, folded)]
        for c_in, c_out, (_, stride) in zip(widths, widths[1:], PAIRS, strict=False):
            convs.append(_conv(c_in, c_in, 3, stride, c_in, tf_same, folded))
            convs.append(_conv(c_in, c_out, 1, 1, 1, tf_same, folded))
        self.features = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.Identity() if folded else nn.BatchNorm2d(conv.out_channels) for conv in convs)
        self.classifier = nn.Conv2d(widths[-1], classes + background, 1)
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.features, self.norms, strict=True):
            if conv.stride == (2, 2) and conv.padding == (0, 0):
                x = F.pad(x, (0, 1, 0, 1))
            x = F.relu6(norm(conv(x)))
        x = self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)  # (N, classes + background)
        return x[:, 1:] if self.background else x


def mobilenet_v1(
    classes: int = 1000, width: float = 1.0, tf_same: bool = False, folded: bool = False, background: bool = False
) -> MobileNetV1:
    """(N, 3, H, W) -> logits (N, classes); 4.2 million parameters for 1,000 classes, 569 million MACs at 224x224.

    width: the paper's width multiplier; a layer keeps at least 8 channels, as in TensorFlow's. tf_same: strided
    convolutions pad the right and the bottom only, which is TensorFlow's SAME for even sizes (every size on the way is
    even where H and W are multiples of 32). folded: no batch-norms, but biases; a network to load, not to train from
    scratch. background: the classifier has one more output, the first, which is not given out. State-dict names:
    features.0 to features.26, norms.0 to norms.26 (unless folded), classifier.
    """
    check_positive(classes=classes, width=width)
    return MobileNetV1(classes, width, tf_same, folded, background)


def _conv(c_in: int, c_out: int, kernel: int, stride: int, groups: int, tf_same: bool, bias: bool) -> nn.Conv2d:
    padding = 0 if tf_same and stride == 2 else kernel // 2
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)
