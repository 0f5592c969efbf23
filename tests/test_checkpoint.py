"""A round trip is exact; every bad file is refused in one sentence and leaves the model as it was."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ajpq.checkpoint import load_weights, save_weights
from ajpq.errors import AjpqError
from ajpq.models import digits_cnn, resnet20

REAL = (
    Path(os.environ.get("AJPQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
    / "resnet20_cifar10_jpeg.safetensors"
)


def model(seed=0, **options):
    torch.manual_seed(seed)
    return digits_cnn(width=4, **options)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def test_round_trip(tmp_path):
    source, target = model(0), model(1)
    assert not same(source, target)
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.th", "w.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", ["", "state_dict", "model", "model_state_dict"])
def test_common_layouts(tmp_path, name, prefix, wrapped):
    tensors = {prefix + key: value for key, value in model(0).state_dict().items()}
    if wrapped and name == "w.safetensors":
        tensors = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    write(
        tmp_path / name,
        {wrapped: tensors, "epoch": 3, "optimizer": {}} if wrapped and name != "w.safetensors" else tensors,
    )
    target = model(1)
    load_weights(target, str(tmp_path / name))
    assert same(target, model(0))


def test_a_model_whose_own_names_begin_with_module(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, target = Outer(), Outer()
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source, target)


def test_tied_weights_can_be_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["0.weight"], loaded["1.weight"])


def refused(path, match, **options):
    target, before = model(1, **options), model(1, **options)
    with pytest.raises(AjpqError, match=match) as caught:
        load_weights(target, path)
    assert same(target, before)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_unreadable_files(tmp_path, name):
    path = tmp_path / name
    refused(path, "existing file")
    write(path, model(0).state_dict())
    content = path.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1 if name == "w.safetensors" else len(content) - 30):
        path.write_bytes(content[:size])
        refused(path, "complete file of tensors")


def test_unknown_ending(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"x")
    refused(tmp_path / "w.onnx", "must end in .safetensors, .pt, .pth or .th")


def test_torch_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": Evil()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "tensors only")
    assert not (tmp_path / "owned").exists()


def test_torch_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds a list")
    torch.save({**model(0).state_dict(), "conv1.weight": 3}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "conv1.weight .* is int")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_keys_shapes_and_values(tmp_path, name):
    path, good = tmp_path / name, model(0).state_dict()
    write(path, {key: value for key, value in good.items() if not key.startswith("bn1")})
    refused(path, "lacks bn1.weight, bn1.bias, bn1.running_mean and 1 more")
    write(path, {**good, "head.weight": torch.zeros(2)})
    refused(path, "unexpected head.weight:")
    write(path, good)
    refused(path, r"linear.weight is \(10, 8\) .* \(7, 8\) in the model", classes=7)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = good["layer2.0.conv1.weight"].clone()
        bad[1, 2, 0, 0] = value
        write(path, {**good, "layer2.0.conv1.weight": bad})
        refused(path, "layer2.0.conv1.weight .* NaN or infinity")
    write(path, {**good, "linear.bias": torch.full((10,), 1e300, dtype=torch.float64)})
    refused(path, "linear.bias .* NaN or infinity")


def test_save_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(model(0), path)
    before = path.read_bytes()

    def fail(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("ajpq.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_weights(model(1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_save_refuses_paths(tmp_path):
    with pytest.raises(AjpqError, match="w.pt"):
        save_weights(model(), tmp_path / "w.pt")
    with pytest.raises(AjpqError, match="existing folder"):
        save_weights(model(), tmp_path / "none" / "w.safetensors")


@pytest.mark.skipif(not REAL.is_file(), reason=f"needs the trained ResNet-20 at {REAL} (set AJPQ_DATA to its folder)")
def test_real_resnet20_loads():
    network = resnet20()
    load_weights(network, REAL)
    assert torch.equal(network.linear.weight, load_file(REAL)["linear.weight"])
