"""Splits are disjoint, stratified and reproducible; files are read exactly; bad files are refused by name."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from ajpq.cifar_files import CIFAR10_CLASSES
from ajpq.data import ImageBatches, cifar10, cifar100, digits, stratified_order
from ajpq.errors import AjpqError
from ajpq.loaders import divide, join

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
REAL = Path(os.environ.get("AJPQ_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10_jpeg"


def all_of(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def keys(batches):
    return {image.numpy().tobytes() for image in all_of(batches)[0]}


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """An image folder of PNGs (lossless): cat and dog, 12 training and 4 test images each, and their pixels."""
    root, stored = tmp_path / "images", {}
    for part, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            stored[part, name] = pixels(count, seed=count + label)
            for i, image in enumerate(stored[part, name]):
                Image.fromarray(image.transpose(1, 2, 0)).save(root / part / name / f"{i:04}.png")
    return root, stored


@pytest.fixture
def python_batches(tmp_path):
    root, stored = tmp_path / "cifar-10-batches-py", {}
    root.mkdir()
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        stored[name] = pixels(20, seed=number)
        record = {b"data": stored[name].reshape(20, -1), b"labels": [i % 10 for i in range(20)]}
        (root / name).write_bytes(pickle.dumps(record, protocol=2))
    return root, stored


def test_stratified_order_keeps_class_shares_in_every_prefix():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = stratified_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert np.abs(counts - n * np.array([0.6, 0.3, 0.1])).max() <= 1.5
    assert (order != stratified_order(labels, seed=4)).any()


def test_digits_splits_are_disjoint_and_complete():
    data = digits(seed=0)
    unshifted = ImageBatches(data.train.images, data.train.labels, 500, mean=(0.3053,), std=(0.3760,), scale=16)
    train, search, test = keys(unshifted), keys(data.search), keys(data.test)
    assert len(train) + len(search) + len(test) == 1797  # all 1,797 digits differ
    assert not train & search and not train & test and not search & test
    assert keys(data.calibration) <= train and len(keys(data.calibration)) == 256
    assert [len(all_of(part)[1]) for part in (data.search, data.test)] == [359, 360]
    for part in (data.search, data.test, data.calibration):
        shares = all_of(part)[1].bincount(minlength=10) / len(all_of(part)[1])
        assert (shares - 0.1).abs().max() < 0.01
    assert data.classes == tuple("0123456789")


def test_digits_of_every_seed_have_one_test_split():
    first, second = digits(seed=0), digits(seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert keys(first.search) != keys(second.search) and not keys(second.search) & keys(second.test)
    assert not keys(second.calibration) & keys(second.search)


def test_digits_are_normalised_and_typed():
    images, labels = all_of(digits().test)
    assert images.dtype == torch.float32 and images.shape == (360, 1, 8, 8) and labels.dtype == torch.int64
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05
    raw = images * 0.3760 + 0.3053
    assert torch.allclose(raw * 16, (raw * 16).round(), atol=1e-4) and raw.max() == pytest.approx(1)


def test_train_order_is_new_each_epoch_and_the_same_for_each_seed():
    one, two, other = digits(seed=1).train, digits(seed=1).train, digits(seed=2).train
    first, second = all_of(one), all_of(one)
    assert not torch.equal(first[1], second[1])
    again = all_of(two), all_of(two)
    for mine, theirs in ((first, again[0]), (second, again[1])):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert not torch.equal(first[1], all_of(other)[1])


def test_order_ignores_torchs_global_generator_and_abandoned_epochs():
    one, two = digits(seed=1).train, digits(seed=1).train
    state = torch.get_rng_state()
    all_of(one)
    assert torch.equal(state, torch.get_rng_state())
    next(iter(two))
    torch.manual_seed(5)
    assert torch.equal(all_of(one)[0], all_of(two)[0])


@pytest.mark.parametrize(("images", "size", "shuffle", "expected"), [
    (10, 4, 0, [4, 4]), (3, 4, 0, [3]), (8, 4, 0, [4, 4]), (10, 4, None, [4, 4, 2]), (4, 4, None, [4]),
])  # fmt: skip
def test_batch_sizes(images, size, shuffle, expected):
    x = torch.zeros(images, 1, 2, 2, dtype=torch.uint8)
    batches = ImageBatches(x, torch.zeros(images).long(), size, mean=(0.0,), std=(1.0,), shuffle=shuffle)
    assert [len(y) for _, y in batches] == expected and len(batches) == len(expected)


def test_parts_are_disjoint_and_complete():
    whole = digits().train
    dataset = TensorDataset(whole.images.float(), torch.arange(len(whole.images)))
    numbered = ImageBatches(whole.images, torch.arange(len(whole.images)), 64, mean=(0.0,), std=(1.0,), shuffle=0)
    for batches in (numbered, DataLoader(dataset, 50, shuffle=True), list(DataLoader(dataset, 10))):
        part, rest = divide(batches, 0.8, seed=3)
        ours, theirs = ({int(i) for epoch in range(4) for _, y in loader for i in y} for loader in (part, rest))
        assert not ours & theirs and len(ours | theirs) == len(dataset)
        assert len(ours) == pytest.approx(0.8 * len(dataset), abs=6)
        again = divide(batches, 0.8, seed=3)[0]
        assert {int(i) for epoch in range(4) for _, y in again for i in y} == ours
    order = [y for _, y in divide(DataLoader(dataset, 50), 0.5, seed=0)[0]]
    assert torch.equal(torch.cat(order), torch.cat([y for _, y in divide(DataLoader(dataset, 50), 0.5, seed=0)[0]]))


def test_a_loader_that_leaves_images_out_is_not_divided():
    dataset = TensorDataset(torch.zeros(64, 1), torch.arange(64))
    held = DataLoader(dataset, 8, sampler=SubsetRandomSampler(range(40)))
    with pytest.raises(AjpqError, match="yields its whole dataset.*SubsetRandomSampler"):
        divide(held, 0.5, 0)
    batched = DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 8, False))
    with pytest.raises(AjpqError, match="yields its whole dataset"):
        divide(batched, 0.5, 0)


def test_what_cannot_be_divided_is_named():
    with pytest.raises(AjpqError, match="generator"):
        divide((batch for batch in digits().train), 0.8, 0)
    with pytest.raises(AjpqError, match="leaves one empty"):
        divide([1], 0.8, 0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


def test_joined_loaders_have_the_images_of_both_in_the_first_ones_order():
    whole, numbers = digits().train, torch.arange(1000)
    dataset = TensorDataset(whole.images[:1000].float(), numbers)
    plain = ImageBatches(whole.images[:1000], numbers, 50, mean=(0.0,), std=(1.0,), shuffle=0)
    seeded = DataLoader(dataset, 50, shuffle=True, generator=torch.Generator().manual_seed(0))
    for batches in (plain, seeded, list(DataLoader(dataset, 50))):
        part, rest = divide(batches, 0.7, seed=3)
        both = join(part, rest)
        seen = [y for _, y in both]
        assert sorted(torch.cat(seen).tolist()) == numbers.tolist() and {len(y) for y in seen} == {50}
    first = [y for _, y in join(plain, plain.part(torch.arange(0)))]  # its next epoch is the loader's own
    second = [y for _, y in plain]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    with pytest.raises(AjpqError, match="ImageBatches and list; pass two of a kind"):
        join(plain, [1])
    other = ImageBatches(whole.images, torch.arange(len(whole.images)), 50, mean=(0.5,), std=(1.0,))
    with pytest.raises(AjpqError, match="normalised alike"):
        join(plain, other)
    drawn = DataLoader(dataset, 50, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(1)))
    again = DataLoader(dataset, 50, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(1)))
    one, two = (torch.cat([y for _, y in join(loader, seeded)]) for loader in (drawn, again))
    assert torch.equal(one, two)
    with pytest.raises(AjpqError, match="joined where their number is known"):
        join(DataLoader(Stream(), 8), seeded)
    held = DataLoader(dataset, 8, sampler=SubsetRandomSampler(range(40)))
    with pytest.raises(AjpqError, match="joined in a DataLoader that yields its whole dataset"):
        join(seeded, held)


def test_augmentation_is_a_shift_with_black_borders_and_a_flip():
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    batches = ImageBatches(
        image.expand(600, 1, 3, 3),
        torch.zeros(600).long(),
        600,
        mean=(0.0,),
        std=(1.0,),
        scale=1,
        shuffle=0,
        pad=1,
        flip=True,
    )
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1)).float()
    possible = [padded[y : y + 3, x : x + 3] for y in range(3) for x in range(3)]
    possible = {crop.numpy().tobytes() for p in possible for crop in (p.contiguous(), p.flip(1).contiguous())}
    assert {
        crop.contiguous().numpy().tobytes() for crop in next(iter(batches))[0][:, 0]
    } == possible  # all 18, and no other


@pytest.mark.parametrize(
    "fractions", [(0.0, 0.2), (0.8, 0.2), (0.6, 0.0), (1.2, 0.1), (-0.1, 0.5), (float("nan"), 0.2)]
)
def test_digits_refuses_fractions(fractions):
    with pytest.raises(AjpqError, match=r"train \+ search < 1"):
        digits(train=fractions[0], search=fractions[1])


def test_batch_size_must_be_positive():
    with pytest.raises(AjpqError, match="batch_size=0"):
        digits(batch_size=0)


@pytest.mark.parametrize("above", [False, True])
def test_image_folder_is_read_exactly(folder, above):
    root, stored = folder
    data = cifar10(root.parent if above else root, batch_size=5, search_images=6, calibration_images=8)
    assert data.classes == ("cat", "dog")
    images, labels = all_of(data.test)
    expected = torch.from_numpy(np.concatenate([stored["test", "cat"], stored["test", "dog"]]))
    assert torch.allclose(images, (expected / 255 - MEAN) / STD, atol=1e-5)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert all_of(data.search)[1].bincount().tolist() == [3, 3]
    assert [len(y) for _, y in data.train] == [5, 5, 5]
    train = {image.numpy().tobytes() for image in data.train.images}
    search = {image.numpy().tobytes() for image in data.search.images}
    assert len(train) == 18 and len(search) == 6 and not train & search
    assert all_of(data.calibration)[1].bincount().tolist() == [4, 4]
    assert torch.equal(data.calibration.images, data.train.images[:8])


@pytest.mark.parametrize("above", [False, True])
def test_python_batches_are_read_exactly(python_batches, above):
    root, stored = python_batches
    data = cifar10(root.parent if above else root, search_images=30, calibration_images=10)
    images, labels = all_of(data.test)
    assert torch.allclose(images, (torch.from_numpy(stored["test_batch"]) / 255 - MEAN) / STD, atol=1e-5)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert data.classes == CIFAR10_CLASSES
    assert len(data.train.images) == 70 and all_of(data.search)[1].bincount().tolist() == [3] * 10
    everything = {image.tobytes() for i in range(1, 6) for image in stored[f"data_batch_{i}"]}
    assert {image.numpy().tobytes() for part in (data.train, data.search) for image in part.images} == everything


@pytest.fixture
def hundred(tmp_path):
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    stored = {"train": pixels(400, seed=1), "test": pixels(200, seed=2)}
    for name, images in stored.items():
        fine = [i % 100 for i in range(len(images))]
        record = {b"data": images.reshape(len(images), -1), b"fine_labels": fine, b"coarse_labels": [0] * len(images)}
        (root / name).write_bytes(pickle.dumps(record, protocol=2))
    names = {b"fine_label_names": [f"thing {i}".encode() for i in range(100)], b"coarse_label_names": [b"all"]}
    (root / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return root, stored


@pytest.mark.parametrize("above", [False, True])
def test_cifar100_is_read_exactly(hundred, above):
    root, stored = hundred
    data = cifar100(root.parent if above else root, search_images=100, calibration_images=10)
    images, labels = all_of(data.test)
    assert torch.allclose(images, (torch.from_numpy(stored["test"]) / 255 - MEAN) / STD, atol=1e-5)
    assert labels.tolist() == [i % 100 for i in range(200)] and data.classes[99] == "thing 99"
    assert all_of(data.search)[1].bincount().tolist() == [1] * 100 and len(data.train.images) == 300


def test_damaged_cifar100_is_named(hundred):
    (hundred[0] / "meta").write_bytes(pickle.dumps({"fine_label_names": ["one"]}))
    with pytest.raises(AjpqError, match="meta must be .* 100 class names.*1 names"):
        cifar100(hundred[0], search_images=100)
    with pytest.raises(AjpqError, match="CIFAR-10 root must hold one data set.*holds neither"):
        cifar10(hundred[0], search_images=100)


def test_what_cannot_be_downloaded_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(AjpqError, match="CIFAR-100 must be fetched.*no connection"):
        cifar100(tmp_path, download=True)


def test_limit_caps_every_split(folder):
    data = cifar10(folder[0], search_images=10, limit=4)
    assert [len(part.images) for part in (data.train, data.search, data.test, data.calibration)] == [4, 4, 4, 4]
    assert all_of(data.test)[1].tolist() == [0, 0, 1, 1]


def test_python_batches_cannot_run_code(python_batches, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (python_batches[0] / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}, protocol=2))
    with pytest.raises(AjpqError, match="data_batch_2.*mkdir"):
        cifar10(python_batches[0])
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [
    b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"labels": [0]}),
    pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, protocol=2),
    pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, protocol=2),
    pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, protocol=2),
])  # fmt: skip
def test_damaged_python_batch_is_named(python_batches, content):
    (python_batches[0] / "data_batch_3").write_bytes(content)
    with pytest.raises(AjpqError, match="data_batch_3"):
        cifar10(python_batches[0], search_images=10)


def test_missing_python_batch_is_named(python_batches):
    (python_batches[0] / "test_batch").unlink()
    with pytest.raises(AjpqError, match="test_batch"):
        cifar10(python_batches[0], search_images=10)


def test_missing_and_empty_roots(tmp_path):
    with pytest.raises(AjpqError, match="nowhere is not one"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(AjpqError, match="is empty"):
        cifar10(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AjpqError, match="holds neither"):
        cifar10(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(AjpqError, match="train has none"):
        cifar10(tmp_path)


def test_two_data_sets_below_one_root_are_ambiguous(folder, python_batches):
    with pytest.raises(AjpqError, match=r"several \(cifar-10-batches-py, images\)"):
        cifar10(folder[0].parent)


def test_class_without_images_is_named(folder):
    for file in (folder[0] / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(AjpqError, match="test/dog has none"):
        cifar10(folder[0], search_images=4)


def test_differing_classes_are_named(folder):
    (folder[0] / "test" / "dog").rename(folder[0] / "test" / "wolf")
    with pytest.raises(AjpqError, match="dog, wolf"):
        cifar10(folder[0], search_images=4)


@pytest.mark.parametrize("keep", [0, 40, 500])
def test_corrupt_image_is_named(folder, keep):
    file = folder[0] / "train" / "cat" / "0003.png"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AjpqError, match="0003.png is not"):
        cifar10(folder[0], search_images=4)


def test_image_of_another_size_is_named(folder):
    Image.new("RGB", (16, 24)).save(folder[0] / "test" / "cat" / "0001.png")
    with pytest.raises(AjpqError, match="0001.png is 16x24"):
        cifar10(folder[0], search_images=4)


def test_grey_and_jpeg_images_become_rgb(folder):
    Image.new("L", (32, 32), 100).save(folder[0] / "test" / "cat" / "0000.png")
    Image.new("RGB", (32, 32), (100, 100, 100)).save(folder[0] / "test" / "cat" / "0001.jpg")
    images = cifar10(folder[0], search_images=4).test.images
    assert (images[0] == 100).all() and ((images[1].int() - 100).abs() <= 2).all()


@pytest.mark.parametrize("setting", ["search_images", "calibration_images", "limit"])
def test_image_counts_must_be_positive(folder, setting):
    with pytest.raises(AjpqError, match=f"{setting}=0"):
        cifar10(folder[0], **{"search_images": 4, setting: 0})


def test_search_must_leave_training_images(folder):
    with pytest.raises(AjpqError, match="search_images < 24.*search_images=24"):
        cifar10(folder[0], search_images=24)


@pytest.mark.skipif(
    not REAL.is_dir(), reason=f"needs the CIFAR-10 image folder at {REAL} (set AJPQ_DATA to its parent)"
)
def test_real_cifar10():
    data = cifar10(REAL, limit=1000)
    assert data.classes == CIFAR10_CLASSES
    images, labels = all_of(data.test)
    assert labels.bincount().tolist() == [100] * 10
    assert abs(images.mean()) < 0.15 and abs(images.std() - 1) < 0.2
