"""MobileNetV1's sizes and padding, and what the shared weights reach on the shared images."""

import math
import os
from pathlib import Path

import pytest
import torch
from test_folders import unpacked
from torch.nn import functional as F

from ajpq.checkpoint import load_weights
from ajpq.errors import AjpqError
from ajpq.image_folder import imagenette
from ajpq.models import mobilenet_v1
from ajpq.tracing import trace
from ajpq.training import metrics

SHARED = Path(os.environ.get("AJPQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
WEIGHTS, IMAGES = SHARED / "mobilenet_v1_224.safetensors", SHARED / "imagenette.tar"
HERE = {"tf_same": True, "folded": True, "background": True}
needs_shared = pytest.mark.skipif(
    not (WEIGHTS.is_file() and IMAGES.is_file()), reason=f"needs {WEIGHTS.name} and {IMAGES.name} in {SHARED}"
)


# Table 6 of Howard et al. gives 4.2, 2.6, 1.3 and 0.5 million parameters and 569, 325, 149 and 41 million MACs.
@pytest.mark.parametrize(
    ("width", "params", "macs"), [(1.0, 4.2, 569), (0.75, 2.6, 325), (0.5, 1.3, 149), (0.25, 0.5, 41)]
)
def test_published_sizes(width, params, macs):
    model = mobilenet_v1(width=width).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.06)
    network = trace(model, torch.zeros(1, 3, 32, 32))
    convs = sum(layer.macs for layer in network.layers[:-1]) * 49 + network.layers[-1].macs  # of 224x224
    assert convs / 1e6 == pytest.approx(macs, rel=0.02)


def test_tf_same_is_tensorflows_padding():
    torch.manual_seed(0)
    model, other = (mobilenet_v1(10, 0.25, tf_same=same, folded=True).eval() for same in (True, False))
    other.load_state_dict(model.state_dict())
    x = given = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for conv in model.features:
            pads = []
            for n, k, s in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True):
                total = max((math.ceil(n / s) - 1) * s + k - n, 0)
                pads = [total // 2, total - total // 2, *pads]
            x = F.relu6(F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, groups=conv.groups))
        expected = model.classifier(x.mean((2, 3), keepdim=True)).flatten(1)
        assert torch.allclose(model(given), expected, atol=1e-5)
        assert not torch.allclose(other(given), expected, atol=1e-2)


def test_background_is_not_given_out():
    torch.manual_seed(0)
    model = mobilenet_v1(5, 0.25, folded=True, background=True).eval()
    assert model.classifier.out_channels == 6 and not any("norms" in key for key in model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        model.classifier.bias[0] += 100
        assert before.shape == (2, 5) and torch.equal(model(x), before)


@pytest.mark.parametrize("settings", [{"classes": 0}, {"width": 0}])
def test_settings_must_be_positive(settings):
    with pytest.raises(AjpqError, match="=0"):
        mobilenet_v1(**settings)


def reached(tmp_path, limit):
    model = mobilenet_v1(**HERE)
    load_weights(model, WEIGHTS)
    folder = unpacked(IMAGES, tmp_path, train=2)
    data = imagenette(folder, mean=(0.5,) * 3, std=(0.5,) * 3, search_images=10, limit=limit, eval_batch_size=25)
    return metrics(model, data.test)


@needs_shared
def test_the_shared_weights_know_a_few_images(tmp_path):
    found = reached(tmp_path, limit=30)
    assert found["accuracy"] >= 0.55 and found["top5_accuracy"] >= 0.75  # of all 250: 0.692 and 0.888


@pytest.mark.slow
@needs_shared
def test_the_shared_weights_reach_what_their_readme_says(tmp_path):
    found = reached(tmp_path, limit=None)
    assert found["accuracy"] == pytest.approx(0.692, abs=0.005)
    assert found["top5_accuracy"] == pytest.approx(0.888, abs=0.005)
