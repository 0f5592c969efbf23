"""Forwards as graphs: subclasses of torch's layers, wrapped models, further arguments, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Net, conv, random_policy, randomise
from torch import nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.shipping import load, ship
from ajpq.symbolic import inherited
from ajpq.tracing import trace


class Conv3(nn.Conv2d):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1, bias=False)

    def norm_of_weights(self) -> float:
        return self.weight.norm().item()


class StillNorm(nn.BatchNorm2d):
    """As detectors have it: its statistics stay."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Own(nn.Conv2d):
    def _conv_forward(self, *args) -> torch.Tensor:
        return super()._conv_forward(*args) * 2


class Blocks(nn.Sequential):
    pass


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def stack(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_a_subclass_with_the_forward_of_a_layer_is_that_layer(tmp_path: Path) -> None:
    model = randomise(stack(Conv3(3, 8), StillNorm(8), nn.ReLU(), Conv3(8, 8), nn.ReLU())).eval()
    network = trace(model, images())
    assert [layer.name for layer in network.layers] == ["0", "3", "7"]
    assert network.norms[0].folds_into == "0" and network.prunable.sum() == 16 and network.other_parameters == 0
    assert torch.equal(network.module(images()), model(images()))
    assert type(model[0]) is Conv3 and type(network.module.get_submodule("0")) is nn.Conv2d
    final = freeze(compress(network, random_policy(network, 0), calibrate(network, [(images(16), None)])))
    assert torch.equal(load(ship(final, tmp_path))(images()), final(images()))


def test_a_subclass_that_computes_otherwise_is_traced_through() -> None:
    assert [inherited(c) for c in (nn.Conv2d, Standardised, Own, Blocks, Net)] == [None] * 5
    model = randomise(stack(Conv3(3, 8), Standardised(8, 8, 3))).eval()
    network = trace(model, images())
    assert [layer.name for layer in network.layers] == ["0", "4"] and not network.unused
    assert torch.equal(network.module(images()), model(images()))
    with pytest.raises(AjpqError, match="a subclass with a forward of its own"):
        trace(nn.Sequential(Standardised(3, 8, 3)), images())


@pytest.mark.parametrize("option", ("stride", "padding", "dilation", "groups"))
def test_numbers_of_numpy_are_numbers(option: str, tmp_path: Path) -> None:
    value = {"groups": np.int64(4)}.get(option, np.int64(2))
    model = stack(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, **{option: value}), nn.MaxPool2d(np.int64(2), padding=1))
    network = trace(randomise(model).eval(), images())
    final = freeze(compress(network, random_policy(network, 0), calibrate(network, [(images(16), None)])))
    assert torch.equal(load(ship(final, tmp_path))(images()), final(images()))


def plain() -> nn.Module:
    return randomise(stack(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8))).eval()


@pytest.mark.filterwarnings("ignore")  # of torch.compile, before it compiles anything
@pytest.mark.parametrize("wrap", (torch.compile, nn.DataParallel), ids=("compile", "data_parallel"))
def test_wrapped_models_are_bare(wrap) -> None:
    whole, part = (
        trace(wrap(plain()), images()),
        trace(Net(lambda m, x: m.l(m.a(x)), a=wrap(plain()), l=nn.Linear(5, 5)), images()),
    )
    assert [layer.name for layer in whole.layers] == ["0", "3", "6"]
    assert [layer.name for layer in part.layers] == ["a.0", "a.3", "a.6", "l"]
    assert torch.equal(whole.module(images()), plain()(images()))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), nn.Linear(8, 5)

    def forward(self, picture, mask=None, *, scale: float = 2.0, **others):
        y = self.a(picture).mean((2, 3))
        return self.b(y if mask is None else y * mask) * scale


class Demanding(Masked):
    def forward(self, picture, mask):
        return super().forward(picture, mask)


def test_further_arguments_have_their_defaults() -> None:
    model = randomise(Masked()).eval()
    network = trace(model, images())
    assert torch.equal(network.module(images()), model(images()))
    assert network.prunable.sum() == 8 and type(model) is Masked
    with pytest.raises(AjpqError, match="Demanding.forward needs 'mask' too; wrap it"):
        trace(Demanding(), images())


def named(name: str) -> nn.Module:
    return Net(lambda m, x: getattr(m, name)(m.a(x).mean((2, 3))), a=conv(3, 8), **{name: nn.Linear(8, 5)})


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Lazy modules")
@pytest.mark.parametrize(
    "model, told",
    (
        (lambda: plain().double(), "'0.weight' is torch.float64; call model.float()"),
        (lambda: plain().half(), "'0.weight' is torch.float16; call model.float()"),
        (lambda: torch.jit.trace(plain(), images()), "it is a TopLevelTracedModule, compiled by torch.jit; give"),
        (lambda: nn.Sequential(torch.jit.trace(plain(), images())), "0 is a TopLevelTracedModule, compiled by"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "'0.weight' has none yet; call the model once"),
        (lambda: named("graph"), "has a 'graph'; rename it"),
        (lambda: named("code"), "has a 'code'; rename it"),
        (lambda: named("meta"), "has a 'meta'; rename it"),
    ),
)  # fmt: skip
def test_what_cannot_be_traced_is_told_with_a_way_out(model, told: str) -> None:
    with pytest.raises(AjpqError, match=told):
        trace(model(), images())
