"""Residual networks to compress: a small one for the digits, and the CIFAR ResNets of He et al. (arXiv 1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.errors import AjpqError


class PadShortcut(nn.Module):
    """Option A: every second pixel, zeros for the new channels. (N, C, H, W) -> (N, C + 2 * extra, H/2, W/2)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), both 3x3. (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """Stem, three residual stages, global average pool, linear classifier. (N, c_in, H, W) -> logits (N, classes)."""

    def __init__(
        self,
        c_in: int,
        stages: tuple[nn.Sequential, nn.Sequential, nn.Sequential],
        widths: tuple[int, int],
        classes: int,
    ) -> None:
        super().__init__()
        first, last = widths
        self.conv1 = nn.Conv2d(c_in, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (N, first, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, last, h, w)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))  # (N, classes)


def digits_cnn(classes: int = 10, width: int = 16) -> ResidualNet:
    """A small residual network for images (N, 1, 8, 8); 39 thousand parameters at width 16.

    Stages of `width` channels at 8x8 (identity shortcut), 2 * `width` at 4x4 (strided 1x1 convolution) and 2 * `width`
    again (identity).
    """
    check_positive(classes=classes, width=width)
    wide = 2 * width
    down = nn.Sequential(nn.Conv2d(width, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
    stages = (
        nn.Sequential(BasicBlock(width, width, 1, nn.Sequential())),
        nn.Sequential(BasicBlock(width, wide, 2, down)),
        nn.Sequential(BasicBlock(wide, wide, 1, nn.Sequential())),
    )
    return ResidualNet(1, stages, (width, wide), classes)


def cifar_resnet(depth: int = 20, classes: int = 10, shortcut: str = "A") -> ResidualNet:
    """The CIFAR ResNet of He et al. 2016, section 4.2, for images (N, 3, 32, 32).

    shortcut: where a block halves the image, "A" takes every second pixel and adds channels of zeros (the paper's own
    choice here, no parameters), "B" is a strided 1x1 convolution and a batch-norm.
    State-dict names: conv1, bn1, layer1.0.conv1, ..., linear; for B also layer2.0.shortcut.0 and .1. Raises AjpqError
    unless depth = 6n + 2.
    """
    check_positive(classes=classes)
    if depth < 8 or depth % 6 != 2:
        raise AjpqError(f"`depth = 6n + 2` must hold for a CIFAR ResNet, but {depth=}: take 8, 20, 32, 44, 56 or 110.")
    if shortcut not in ("A", "B"):
        raise AjpqError(f"`shortcut` of a CIFAR ResNet must be A or B, but it is {shortcut!r}: take one of the two.")

    def down(c_in: int, c_out: int) -> nn.Module:
        if shortcut == "A":
            return PadShortcut(c_out // 4)
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))

    def stage(c_in: int, c_out: int) -> nn.Sequential:
        first = (
            BasicBlock(c_in, c_out, 1, nn.Sequential())
            if c_in == c_out
            else BasicBlock(c_in, c_out, 2, down(c_in, c_out))
        )
        return nn.Sequential(
            first, *(BasicBlock(c_out, c_out, 1, nn.Sequential()) for _ in range((depth - 2) // 6 - 1))
        )

    return ResidualNet(3, (stage(16, 16), stage(16, 32), stage(32, 64)), (16, 64), classes)


def resnet20(classes: int = 10, shortcut: str = "A") -> ResidualNet:
    """`cifar_resnet(20)`: 269,722 parameters with ten classes and shortcut A, 40.6 million multiply-accumulates."""
    return cifar_resnet(20, classes, shortcut)


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise AjpqError(f"`{name} > 0` must hold, but {name}={value}: give a positive number.")
