"""Shapes, published parameter counts, state-dict names, and that torch.fx can trace what the library is to compress."""

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from ajpq.errors import AjpqError
from ajpq.models import PadShortcut, cifar_resnet, digits_cnn, resnet20


def count(model):
    return sum(p.numel() for p in model.parameters())


# Table 6 of He et al. gives 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_published_sizes(depth, millions):
    assert count(cifar_resnet(depth)) / 1e6 == pytest.approx(millions, abs=0.03 if depth == 110 else 0.005)


def test_resnet20_names_and_size():
    model = resnet20()
    names = {key.rsplit(".", 1)[0] for key in model.state_dict()}
    blocks = {f"layer{s}.{b}.{m}" for s in (1, 2, 3) for b in (0, 1, 2) for m in ("conv1", "bn1", "conv2", "bn2")}
    assert names == blocks | {"conv1", "bn1", "linear"}
    assert count(model) == 269_722


def test_option_a_shortcut_subsamples_and_pads_both_sides():
    x = torch.randn(2, 4, 6, 6)
    out = PadShortcut(2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2]) and not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize(
    ("make", "shape"),
    [(digits_cnn, (3, 1, 8, 8)), (resnet20, (3, 3, 32, 32)), (lambda: cifar_resnet(8), (3, 3, 24, 40))],
)
def test_traced_network_computes_the_same(make, shape):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x)) and model(x).shape == (3, 10)


def test_average_pool_covers_all_positions():
    model = digits_cnn().eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        features = model.layer3(model.layer2(model.layer1(F.relu(model.bn1(model.conv1(x))))))
        assert torch.allclose(model(x), model.linear(features.mean((2, 3))), atol=1e-5)


def test_digits_cnn_is_small_and_scales():
    assert 20_000 <= count(digits_cnn()) <= 45_000
    assert digits_cnn(classes=3, width=4)(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return digits_cnn().conv1.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("depth", [2, 18, 21, 34, -4])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(AjpqError, match=f"6n \\+ 2.*depth={depth}"):
        cifar_resnet(depth)


@pytest.mark.parametrize(
    "make", [lambda: digits_cnn(width=0), lambda: digits_cnn(classes=0), lambda: resnet20(classes=0)]
)
def test_counts_must_be_positive(make):
    with pytest.raises(AjpqError, match="=0"):
        make()
