"""Any CNN: every classifier of torchvision at a small resolution with random weights, and what its detectors are made
of: traced, scored, masked == shrunk, finished, shipped and loaded. Most are slow tests; one of a family is not."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import batches_of, masked, random_policy, randomise
from torch import nn
from torchvision import models
from torchvision.models import convnext, densenet, detection, efficientnet, resnet, vgg

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.cost import Size, total
from ajpq.errors import AjpqError
from ajpq.importance import magnitude
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.shipping import load, ship
from ajpq.tracing import trace

TRANSFORMERS = {
    "vit": (32, {"image_size": 32}),
    "swin": (32, {}),
    "maxvit": (224, {}),
}
SIZES = {"alexnet": 63, "inception_v3": 75}  # the smallest pictures they take; 32 for the others
SETTINGS = {
    "googlenet": {"aux_logits": True, "init_weights": False, "transform_input": True},
    "inception_v3": {"aux_logits": True, "init_weights": False, "transform_input": True},
    "convnext": {"layer_scale": 1.0},  # its own, 1e-6, hides what the blocks do
}
CLASSIFIERS = [n for n in models.list_models(module=models) if n.split("_")[0] not in TRANSFORMERS]
QUICK = (
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1",
)  # fmt: skip
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _vgg() -> nn.Module:
    model = vgg.VGG(vgg.make_layers([16, "M", 32, "M", 32, "M"]), num_classes=10, init_weights=False)
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(32 * 49, 48), nn.Linear(48, 48), nn.Linear(48, 10)
    )  # fmt: skip
    return model


NARROW = {  # of families whose smallest member is large
    "vgg": _vgg,
    "densenet": lambda: densenet.DenseNet(12, (2, 2, 2, 2), 24, num_classes=10),
    "resnext": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, groups=8, width_per_group=4),
    "efficientnet_v2": lambda: efficientnet.EfficientNet(
        [
            efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 1),
            efficientnet.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
            efficientnet.MBConvConfig(4, 3, 2, 24, 32, 2),
        ],
        dropout=0.2, num_classes=10, last_channel=64,
    ),
    "convnext": lambda: convnext.ConvNeXt(
        [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)], layer_scale=1.0, num_classes=10
    ),
}  # fmt: skip


def classifier(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A randomised network, and two images."""
    torch.manual_seed(0)
    family = name.split("_")[0]
    size, settings = TRANSFORMERS.get(family, (SIZES.get(name, 32), SETTINGS.get(name, SETTINGS.get(family, {}))))
    model = NARROW[name]() if name in NARROW else models.get_model(name, weights=None, num_classes=10, **settings)
    return randomise(model), torch.randn(2, 3, size, size)


def called(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The convolutions and linear layers that a forward pass calls, in order."""
    names, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(names))


def leaves(out: object) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    else:
        for part in out.values() if isinstance(out, dict) else out:
            yield from leaves(part)


@torch.no_grad()
def apart(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of two networks' outputs, in units of the largest output."""
    pairs = zip(leaves(a(x.clone())), leaves(b(x.clone())), strict=True)
    return max(((one - two).abs().max() / one.abs().max()).item() for one, two in pairs)


def policies(network: Network) -> tuple[CompressionPolicy, CompressionPolicy]:
    """Half of the prunable channels gone: the rest untouched; the rest at 4 and 8 bits, activations at 8."""
    whole, mixed = (random_policy(network, 0, 0.5, w, a) for w, a in (((32,), (32,)), ((4, 8), (8,))))
    assert (whole.alive(network) == mixed.alive(network)).all()
    return whole, mixed


def check_shrunk(network: Network, policy: CompressionPolicy, x: torch.Tensor) -> None:
    reference = masked(network, policy)
    assert apart(reference, compress(network, policy), x) <= 1e-5
    if not policy.alive(network).all():
        assert apart(reference, network.module, x) > 1e-3  # the comparison is about something


def check_shipped(network: Network, policy: CompressionPolicy, student: nn.Module, x: torch.Tensor, to: Path) -> None:
    small = freeze(student)
    path = ship(small, to)
    again = load(path)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(leaves(small(x)), leaves(again(x)), strict=True))
    assert 8 * path.stat().st_size <= total(Size(), network, policy)


def check(name: str, to: Path) -> Network:
    model, x = classifier(name)
    layers = called(model, x)
    network = trace(model, x)
    assert [layer.name for layer in network.layers] == layers
    del model
    whole, mixed = policies(network)
    check_shrunk(network, whole, x)
    data = batches_of(network), batches_of(network, seed=1)
    problem = Problem(network, *data, {"size": 0.9}, importance=magnitude)  # at once; others: test_elimination.py
    score = problem.score(mixed)
    assert np.isfinite([score.loss, score.divergence]).all() and score.divergence > 0 and score.images == 8
    assert problem.evaluator.logits(mixed).shape == (8, 10)  # without the plain evaluator's help
    student = compress(network, mixed, problem.calibration, problem.evaluator.engine.bank)
    problem.close()
    check_shipped(network, mixed, student, x, to)
    return network


def frozen(network: Network) -> set[str]:
    """Why kernels cannot be pruned."""
    return {s.why_not for s in network.spaces if s.writers and not s.prunable}


def slow(names: list[str]) -> list:
    marks = pytest.mark.slow
    return [
        pytest.param(name, marks=[marks, pytest.mark.skipif(MEMORY < 40e9, reason="needs 40 GB")])
        if name == "regnet_y_128gf"
        else name if name in (*QUICK, *NARROW) else pytest.param(name, marks=marks)
        for name in names
    ]  # fmt: skip


@pytest.mark.parametrize("name", slow([*CLASSIFIERS, *NARROW]))
def test_every_cnn_of_torchvision(name, tmp_path):
    network = check(name, tmp_path)
    if name.startswith("convnext"):
        assert any("layer_norm" in why for why in frozen(network))
        hidden = [layer for layer in network.layers if layer.name.endswith("block.3")]
        assert all(network.prunable[layer.writes].all() for layer in hidden) and hidden
    else:
        assert frozen(network) == {"network output"}
        assert network.prunable.sum() == network.n_channels - 3 - 10  # all but the picture and the classes
    auxiliary = name in ("googlenet", "inception_v3")
    assert any("aux" in layer.lower() for layer in network.unused) == auxiliary and bool(network.unused) == auxiliary


@pytest.mark.slow
@pytest.mark.parametrize("name", ("vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"))
def test_vision_transformers_are_searched_in_part(name, tmp_path):
    """No CNNs: what can be pruned is the hidden channels between two linear layers, and MaxViT's convolutions."""
    model, x = classifier(name)
    network = trace(model, x)
    free = [layer for layer in network.layers if network.prunable[layer.writes].all()]
    assert sum(layer.kind == "linear" for layer in free) >= 12
    assert {layer.kind for layer in free} == ({"linear", "conv", "depthwise"} if name == "maxvit_t" else {"linear"})
    policy = policies(network)[0]
    check_shrunk(network, policy, x)
    student = compress(network, policy)
    if name.startswith("swin"):
        with pytest.raises(AjpqError, match="calls torchvision.*_get_relative_position_bias.*torch.fx.wrap"):
            ship(freeze(student), tmp_path)
    else:
        check_shipped(network, policy, student, x, tmp_path)


# -- detectors --------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """What of a torchvision detector is a network: backbone and head, without anchors, matching and suppression."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), (("ssdlite320_mobilenet_v3_large", 320), ("retinanet_resnet50_fpn", 64))
)  # fmt: skip
def test_torchvisions_detectors(name, size, tmp_path):
    """Backbone (with RetinaNet's pyramid) and, apart, backbone and head; the backbone that was loaded takes the place
    of the original in the detector."""
    torch.manual_seed(0)
    detector = randomise(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5))
    x = torch.randn(2, 3, size, size)
    for part, share in ((detector.backbone, 0.75), (Detector(detector), 0.85)):
        network = trace(part, x)
        assert [layer.name for layer in network.layers] == called(part, x)
        kernels = np.concatenate([network.prunable[layer.writes] for layer in network.layers])
        assert kernels.mean() > share
        whole, mixed = policies(network)
        check_shrunk(network, whole, x)
        student = compress(network, mixed, calibrate(network, [(x, None)]))
        check_shipped(network, mixed, student, x, tmp_path)
        if part is detector.backbone:
            smaller = copy.deepcopy(detector)
            smaller.backbone = load(tmp_path)
            with torch.no_grad():
                found = smaller([torch.rand(3, size, size)])
            assert set(found[0]) == {"boxes", "scores", "labels"}
