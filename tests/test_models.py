"""Shapes, published parameter counts, state-dict names, and that torch.fx can trace what the library is to compress."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from nets import difference, masked, random_policy, randomise
from torch import fx
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.checkpoint import load_weights, save_weights
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.models import (
    PadShortcut,
    cifar_resnet,
    digits_cnn,
    mobilenet_v1,
    resnet20,
    skynet,
    timm_model,
    torchvision_model,
)
from ajpq.shipping import load, ship
from ajpq.tracing import trace

SKYNET = Path(os.environ.get("AJPQ_DATA", ROOT.parent / "shared" / "data")) / "skynet_dac.safetensors"


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


def test_option_b_shortcut_is_a_projection():
    torch.manual_seed(0)
    model = randomise(cifar_resnet(20, shortcut="B"))
    extra = set(model.state_dict()) - set(resnet20().state_dict())
    assert {key.rsplit(".", 1)[0] for key in extra} == {f"layer{s}.0.shortcut.{i}" for s in (2, 3) for i in (0, 1)}
    assert count(model) - count(resnet20()) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    network = trace(model, torch.randn(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    policy = random_policy(network, 0, widths=(32,))
    assert difference(masked(network, policy), compress(network, policy), x) <= 1e-5
    with pytest.raises(AjpqError, match="A or B, but it is 'C'"):
        cifar_resnet(20, shortcut="C")


# -- SkyNet -----------------------------------------------------------------------------------------------------------


def test_skynet_has_the_published_size_and_every_channel_can_go():
    model = randomise(skynet())
    assert count(model) == 442_049
    network = trace(model, torch.randn(1, 3, 32, 64))
    assert sum(layer.macs for layer in network.layers) * (160 * 320) / (32 * 64) == 463_718_400
    frozen = {writer for space in network.spaces if not space.prunable for writer in space.writers}
    assert frozen == {"model_p1.0.0", "model_p3.1"}  # the image and the output
    x = torch.randn(2, 3, 32, 64)
    for seed in range(3):
        policy = random_policy(network, seed, widths=(32,))
        assert (policy.weight_bits["model_p1.4.3"] == 0).any()  # the bypass, read in four places
        assert difference(masked(network, policy), compress(network, policy), x) <= 1e-5


def test_skynet_rearranges_its_bypass_as_the_original():
    model, x = randomise(skynet()), torch.randn(2, 3, 16, 32)
    seen = {}
    model.model_p3.register_forward_pre_hook(lambda _, args: seen.update(joined=args[0]))
    with torch.no_grad():
        model(x)
        bypass = model.model_p1(x)
        n, c, h, w = bypass.shape
        moved = bypass.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        assert torch.equal(seen["joined"], torch.cat([moved, model.model_p2(bypass)], 1))


@pytest.mark.skipif(not SKYNET.is_file(), reason=f"needs {SKYNET}")
def test_the_shared_skynet_loads():
    model = skynet().eval()
    load_weights(model, SKYNET)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 160, 320)).shape == (1, 10, 20, 40)


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_torchvision_models_have_the_classes_asked_for(name):
    model = torchvision_model(name, classes=7).eval()
    with torch.no_grad():
        out = fx.symbolic_trace(model)(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 7) and torch.isfinite(out).all() and out.std() > 0
    assert not any("aux" in key for key in model.state_dict())


@pytest.mark.parametrize("make", [torchvision_model, timm_model])
def test_weights_come_from_a_file(make, tmp_path):
    if make is timm_model:
        pytest.importorskip("timm")
    one = make("resnet18", classes=3)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        save_weights(one, path) if path.suffix == ".safetensors" else torch.save(one.state_dict(), path)
        two = make("resnet18", str(path), 3)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(AjpqError, match="number of classes"):
        make("resnet18", str(path), 4)
    with pytest.raises(AjpqError, match="b.pt is not one"):
        make("resnet18", str(tmp_path / "b.pt"))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_torchvisions_own_weights_fit(name, tmp_path, monkeypatch):
    """From torch's cache, where a file stands for the one that would be fetched."""
    entry = torchvision.models.get_model_weights(name).DEFAULT
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, weights=None, **options)
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / Path(entry.url).name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    ours = torchvision_model(name, "DEFAULT")
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    if name == "googlenet":
        assert ours.transform_input
    ten = torchvision_model(name, "IMAGENET1K_V1", 10)
    last = list(ten.state_dict())[-1].rpartition(".")[0]
    for key, value in ten.state_dict().items():
        assert key.startswith(last) or torch.equal(value, theirs.state_dict()[key])
    assert ten.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_wrong_names_are_told_with_the_closest():
    for arguments, told in [
        (("resnet17",), "no.* called 'resnet17'; the closest is resnet1"),
        (("retinanet_resnet50_fpn",), "a torchvision classifier"),
        (("resnet18", "IMAGENET_V1"), "weights of resnet18, but none .*closest is IMAGENET1K_V1"),
    ]:
        with pytest.raises(AjpqError, match=told):
            torchvision_model(*arguments)
    with pytest.raises(AjpqError, match="unexpected keyword argument 'depth'"):
        torchvision_model("resnet18", depth=3)
    with pytest.raises(AjpqError, match="classes=0"):
        torchvision_model("resnet18", classes=0)


def test_weights_that_cannot_be_fetched_are_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(AjpqError, match="resnet18's DEFAULT cannot be: no connection; fetch"):
        torchvision_model("resnet18", "DEFAULT")


def test_timm_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(AjpqError, match=r"install ajpq\[timm\]"):
        timm_model("resnet18")


def test_timm_models_have_the_classes_asked_for():
    pytest.importorskip("timm")
    model = timm_model("resnet10t", classes=4).eval()
    assert trace(model, torch.randn(1, 3, 64, 64)).layers[-1].c_out == 4
    with pytest.raises(AjpqError, match="a timm model, .*the closest is resnet10t"):
        timm_model("resnet10tt")
    with pytest.raises(AjpqError, match="null, DEFAULT or a file"):
        timm_model("resnet10t", "IMAGENET1K_V1")
    with pytest.raises(AjpqError, match="unexpected keyword argument"):
        timm_model("resnet10t", nonsense=3)


def test_timms_own_modules_become_plain_ones(tmp_path):
    timm = pytest.importorskip("timm")
    theirs, x = randomise(timm.create_model("lcnet_050", num_classes=10)), torch.randn(2, 3, 64, 64)
    save_weights(theirs, tmp_path / "a.safetensors")
    ours = timm_model("lcnet_050", str(tmp_path / "a.safetensors"), 10).eval()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    network = trace(ours, x)
    kernels = sum(len(space.channels) for space in network.spaces if space.prunable)
    assert kernels == network.n_channels - 3 - 10  # all but the image and the output


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        (["model=resnet20"], 269_722),
        (["model=resnet32", "model.shortcut=B", "model.classes=100"], 472_756),
        (["model=resnet44"], 658_586),
        (["model=resnet56"], 853_018),
        (["model=resnet110"], 1_727_962),
        (["model=mobilenet_v1", "model.width=0.25"], 470_072),
        (["model=skynet"], 442_049),
        (["model=torchvision", "model.name=squeezenet1_1", "model.classes=10"], 727_626),
        (["model=torchvision", "model.name=mobilenet_v2", "model.classes=10", "+model.width_mult=0.25"], None),
    ],
)
def test_the_configuration_makes_them(settings, parameters):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        model = instantiate(compose("config", settings).model, _convert_="all")
    assert parameters is None or count(model) == parameters


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (skynet, (3, 32, 64)),
        (lambda: mobilenet_v1(10, 0.25), (3, 32, 32)),
        (lambda: mobilenet_v1(10, 0.25, tf_same=True, folded=True, background=True), (3, 32, 32)),
    ],
    ids=["skynet", "mobilenet_v1", "converted"],
)
def test_compressed_networks_ship_and_come_back(make, shape, tmp_path):
    torch.manual_seed(0)
    network = trace(randomise(make()), torch.randn(1, *shape))
    policy, x = random_policy(network, 1), torch.randn(2, *shape)
    small = freeze(compress(network, policy, calibrate(network, [(x, torch.zeros(2).long())])))
    with torch.no_grad():
        assert torch.equal(load(ship(small, tmp_path))(x), small(x))
    whole = random_policy(network, 2, widths=(32,))
    assert difference(masked(network, whole), compress(network, whole), x) <= 1e-5
