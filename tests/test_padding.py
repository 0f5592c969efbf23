"""Finished networks with dead channels put back: the same outputs, in whole blocks of channels."""

import json
from pathlib import Path

import hydra
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import RandomNet, conv, images_of, model_of, network_of, random_policy, randomise, traced
from onnx import numpy_helper
from torch import Tensor, fx, nn

import ajpq
from ajpq import models, pipeline
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.finetuning import finetune
from ajpq.layers import ActQuant, ChannelAffine, FrozenLayer
from ajpq.network import Network
from ajpq.outputs import quantize_outputs
from ajpq.padding import pad, padded, padded_alive
from ajpq.policy import CompressionPolicy
from ajpq.shipping import load, ship
from ajpq.tracing import trace

slow = pytest.mark.slow
WHOLE = (1, 2, 3, 4, 5, 6, 7, 8)
NETWORKS = (
    "digits_cnn", "resnet20", "skynet",
    *(pytest.param(name, marks=slow) for name in ("mobilenet_v2", "shufflenet_v2_x0_5", "densenet121")),
)  # fmt: skip


def known(name: str) -> tuple[Network, Tensor]:
    if name != "skynet":
        return network_of(name), images_of(name, 4, seed=1)
    images = torch.randn(4, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    return trace(randomise(models.skynet()), images[:2]), images


def finished(network: Network, policy: CompressionPolicy, images: Tensor, rounded: bool = True) -> fx.GraphModule:
    student = compress(network, policy, calibrate(network, [(images, None)]))
    if rounded:
        quantize_outputs(student, images)
    return freeze(student)


def check_same(ours: fx.GraphModule, final: fx.GraphModule, images: Tensor, whole: bool = False) -> None:
    """Whether two networks give the same outputs: to the bit where all sums are whole numbers. Where layers are many, a
    float sum in another order turns a code here and there, and all that is behind it moves a little."""
    with torch.no_grad():
        found, told = ours(images), final(images)
    assert told.abs().max() > 0
    if whole:
        assert torch.equal(found, told)
    elif len(kernels(final)) > 100:
        near = (found - told).abs() / told.abs().max()
        assert near.max() < 0.05 and (near < 1e-4).all(1).any()
    else:
        torch.testing.assert_close(found, told, rtol=1e-4, atol=1e-5 * max(1.0, told.abs().max().item()))


def kernels(network: fx.GraphModule) -> dict[str, int]:
    return {name: len(part.codes) for name, part in network.named_modules() if isinstance(part, FrozenLayer)}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_channels_come_in_blocks(name: str) -> None:
    network, images = known(name)
    for seed, widths, acts in ((0, WHOLE, (4, 8)), (1, (1, 2, 3, 8, 32), (3, 8, 32)), (2, (32,), (32,))):
        policy = random_policy(network, seed, 0.4, widths, acts)
        final = finished(network, policy, images, rounded=seed < 2)
        ours = pad(final, network, policy, 16)
        # a pooled sum of a concatenation or the like may be added up in another order
        check_same(ours, final, images, whole=seed == 0)
        wide = padded_alive(network, policy, 16)
        before, after = kernels(final), kernels(ours)
        assert sum(after.values()) > sum(before.values()) and before.keys() == after.keys()
        assert all(after[layer.name] == wide[layer.writes].sum() >= before[layer.name] for layer in network.layers)
        for space in network.spaces:
            kept, there = (int(alive[space.channels].sum()) for alive in (policy.alive(network), wide))
            assert kept <= there and (there % 16 == 0 or there == space.size)
        if name == "skynet":
            odd = [n for layer, n in after.items() if n % 16 and n > 10]
            assert not odd and any(n % 16 for n in before.values() if n > 10)


@pytest.mark.parametrize("seed", range(8, 20))
def test_random_networks_keep_their_outputs(seed: int) -> None:
    network = trace(randomise(RandomNet(seed), seed), torch.randn(2, 3, 8, 8))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    policy = random_policy(network, seed, 0.5, (1, 2, 3, 5, 8, 32), (4, 8, 32))
    final = finished(network, policy, images)
    ours = pad(final, network, policy, 4)
    assert ours is not final
    with torch.no_grad():
        found, told = ours(images), final(images)
    near = ((found - told).abs() <= 1e-4 * told.abs().max()).all(1)  # a float sum in another order may turn a code
    assert near.float().mean() >= 0.75


def test_skipped_branches_stay_away() -> None:
    network, images = known("resnet20")
    drawn = random_policy(network, 0, 0.3, WHOLE, (8,))
    gone = {name for i in (1, 4, 7) for name in network.branches[i].layers}
    policy = CompressionPolicy({n: b * (n not in gone) for n, b in drawn.weight_bits.items()}, drawn.act_bits)
    policy.validate(network)
    final = finished(network, policy, images)
    ours = pad(final, network, policy, 16)
    check_same(ours, final, images, whole=True)
    assert len(gone) == 6 and not gone & kernels(ours).keys() and kernels(ours) != kernels(final)


@pytest.mark.parametrize("how", ["module", "indexed", "selected"])
def test_shuffles_may_become_whole_again(how: str) -> None:
    """Surgery writes an index where channels are missing and the shuffle itself where none is."""
    order = nn.Parameter(torch.randperm(16), requires_grad=False)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        moved = {"module": lambda: m.mix(y), "indexed": lambda: y[:, m.order],
                 "selected": lambda: torch.index_select(y, 1, m.order)}  # fmt: skip
        return m.l(m.b(moved[how]()).relu().mean((2, 3)))

    parts = {"mix": nn.ChannelShuffle(2)} if how == "module" else {"order": order}
    network = traced(forward, a=conv(3, 16), b=conv(16, 8), l=nn.Linear(8, 4), **parts)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    policy = random_policy(network, 0, 0.3, (4, 8), (8,))
    assert not policy.alive(network)[network["a"].writes].all()
    final = finished(network, policy, images)
    check_same(pad(final, network, policy, 16), final, images)


def test_what_is_little_or_whole_stays() -> None:
    assert [padded(n, 64, 16) for n in (0, 3, 7, 8, 16, 17, 63, 64)] == [0, 16, 16, 16, 16, 32, 64, 64]
    assert [padded(n, 24, 16) for n in (15, 17, 24)] == [16, 24, 24] and padded(3, 3, 16) == 3
    counts = [padded(n / 10, 100, 16) for n in range(1001)]
    assert counts == sorted(counts)
    network, images = known("digits_cnn")
    whole = CompressionPolicy.homogeneous(network, 8, 8)
    final = finished(network, whole, images)
    assert pad(final, network, whole, 16) is final
    policy = random_policy(network, 0, 0.5, (8,), (8,))
    final = finished(network, policy, images)
    assert pad(final, network, policy, 1) is final
    for multiple in (0, True, 1.5):
        with pytest.raises(AjpqError, match="onnx_multiple must be a whole number"):
            pad(final, network, policy, multiple)


def test_what_is_no_layer_is_carried() -> None:
    parts = {"stem": conv(3, 32), "norm": nn.BatchNorm2d(32), "slope": nn.PReLU(), "group": nn.GroupNorm(2, 10)}
    parts |= {"gain": nn.Parameter(torch.zeros(())), "b": conv(32, 32), "drop": nn.Dropout(0.1), "c": conv(32, 10, 1)}

    def forward(m, x):
        y = m.slope(m.stem(x))
        return m.drop(m.group(m.c(m.b(m.norm(y.relu())) + y)).mean((2, 3))) * m.gain.exp()

    network = traced(forward, **parts)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    policy = random_policy(network, 0, 0.4, (2, 4, 8), (8,))
    student = compress(network, policy, calibrate(network, [(images, None)]))
    final = finetune(student, [(images, torch.arange(8))], epochs=2, lr=0.1, norm_batches=1, warmup=0.0)
    final.slope.weight.fill_(0.7)
    final.gain.fill_(0.3)
    ours = pad(final, network, policy, 16)
    check_same(ours, final, images)
    assert kernels(final) == {"stem": 22, "b": 22, "c": 10} and kernels(ours) == {"stem": 32, "b": 32, "c": 10}
    assert isinstance(ours.norm, ChannelAffine) and len(ours.norm.scale) == 32
    assert not any(p.requires_grad for p in ours.parameters())
    found = {name for name, part in ours.named_children() if isinstance(part, ActQuant)}
    assert found and found == {name for name, part in final.named_children() if isinstance(part, ActQuant)}


def test_kernels_and_sums_are_the_very_same() -> None:
    network, images = known("digits_cnn")
    policy = random_policy(network, 1, 0.4, (1, 2, 3, 6, 8, 32), (8,))
    final = finished(network, policy, images)
    final.linear.scale[:2] = torch.tensor([6e-8, -2e-5])  # below float16's normal numbers, and negative
    layer = final.linear
    again = FrozenLayer(layer.codes, layer.bits, layer.scale, layer.raw, layer.bias, layer.geometry, layer.act)
    final.linear = again
    ours = pad(final, network, policy, 16)
    alive, wide = policy.alive(network), padded_alive(network, policy, 16)
    for spec in network.layers:
        old, new = final.get_submodule(spec.name), ours.get_submodule(spec.name)
        rows = np.flatnonzero(alive[spec.writes][wide[spec.writes]])
        columns = np.flatnonzero(alive[spec.inputs_of_a_kernel][wide[spec.inputs_of_a_kernel]])
        assert torch.equal(new.weight[rows][:, columns], old.weight)
        assert new.weight.count_nonzero() == old.weight.count_nonzero()
        if old.unit is not None:
            assert torch.equal(new.unit[rows], old.unit)
        dead = np.setdiff1d(np.arange(len(new.codes)), rows)
        assert new.bias is None or (torch.equal(new.bias[rows], old.bias) and not new.bias[dead].any())


# -- files ------------------------------------------------------------------------------------------------------------


def run(model: bytes, images: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def widths_in(model: bytes) -> list[int]:
    """Kernels of all int8 convolutions and linear layers."""
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer}
    codes = [w for w in stored.values() if w.dtype == np.int8 and w.ndim > 1]
    return [w.shape[1] if w.ndim == 2 else w.shape[0] for w in codes]


@slow
@pytest.mark.parametrize("name", ["resnet20", "skynet", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_runtime_gives_the_packed_networks_answers(name: str, tmp_path: Path) -> None:
    network, images = known(name)
    policy = random_policy(network, 0, 0.4, (1, 2, 3, 4, 5, 6, 7), (8,))
    final = finished(network, policy, images)
    packed = ship(final, tmp_path).read_bytes()
    ship(final, tmp_path, images=images, onnx=pad(final, network, policy, 16))
    assert (tmp_path / "model.safetensors").read_bytes() == packed
    model = (tmp_path / "model.onnx").read_bytes()
    assert sum(widths_in(model)) > sum(kernels(final).values()) - 3  # SkyNet's first layer stays float
    found = run(model, images)
    with torch.no_grad():
        told = load(tmp_path)(images).numpy()
    assert (found.reshape(4, -1).argmax(1) == told.reshape(4, -1).argmax(1)).all()
    assert np.median(np.abs(found - told)) <= 1e-4 * np.abs(told).max()
    assert np.abs(found - told).max() <= 0.05 * np.abs(told).max()  # a float scale may tip a code


def test_command_pads_what_it_exports(tmp_path: Path) -> None:
    quick = "train.epochs=1 search=uniform finetune.epochs=1 timing=null tensorboard=false budget.macs=0.4 threads=1"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg, bad = (hydra.compose("config", [*quick.split(), *more]) for more in ((), ("onnx_multiple=0",)))
    pipeline.run(cfg, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    wide, kept = widths_in((tmp_path / "model.onnx").read_bytes()), [*kernels(load(tmp_path)).values()]
    assert sorted(wide) == sorted([*(int(padded(n, 32, 16)) for n in kept[:-1]), 10]) and sum(wide) > sum(kept)
    assert report["onnx"]["agreement"] == 1 and report["onnx"]["images"] == 360
    assert report["onnx"]["metric"] == report["metrics"]["final"]
    assert [row["kept"] for row in report["layers"]] == kept
    with pytest.raises(AjpqError, match="onnx_multiple must be"):
        pipeline.run(bad, tmp_path / "0")


def test_it_is_there_for_everybody() -> None:
    network = ajpq.trace(model_of("digits_cnn"), images_of("digits_cnn"))
    policy = random_policy(network, 0, 0.4)
    final = ajpq.freeze(ajpq.compress(network, policy))
    check_same(ajpq.pad(final, network, policy), final, images_of("digits_cnn", 4))
