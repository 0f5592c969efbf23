"""Image folders: labels, splits, transforms, determinism, the cache, and images that cannot be read."""

import copy
import inspect
import json
import random
import tarfile
from pathlib import Path
from pydoc import locate

import numpy as np
import pytest
import torch
import yaml
from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from test_data import all_of

from ajpq.errors import AjpqError
from ajpq.image_folder import IMAGENETTE, imagefolder, imagenette
from ajpq.loaders import divide, join
from ajpq.pictures import Cache, PictureBatches, Pictures

SMALL = {"size": 16, "resize": 20, "batch_size": 8, "eval_batch_size": 8, "search_images": 20}


def write(folder: Path, classes: dict[str, int], seed: int = 0, sizes=((24, 32), (40, 20))) -> None:
    """Smooth JPEGs: every class has a grey level of its own, every image a slope of its own."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            h, w = sizes[i % len(sizes)]
            slope = np.linspace(-30, 30, w)[None, :, None] * rng.uniform(-1, 1, 3)
            pixels = np.clip(60 + 60 * label + slope + np.zeros((h, 1, 1)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.JPEG", quality=95)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "set" / "train", {"ant": 60, "bee": 60})
    write(tmp_path / "set" / "val", {"ant": 6, "bee": 5}, seed=1)
    return tmp_path / "set"


SQUARE = {"size": 32, "resize": 32, "batch_size": 20, "search_images": 20}


@pytest.fixture
def square(tmp_path):
    write(tmp_path / "train", {"a": 20, "b": 20}, sizes=((32, 32),))
    write(tmp_path / "val", {"a": 1, "b": 1}, sizes=((32, 32),))
    return tmp_path


def raw(batches: PictureBatches):
    """Images in 0..255 and labels."""
    images, labels = all_of(batches)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (batches.mean, batches.std))
    return (images * std + mean) * 255, labels


def test_pictures_without_labels_come_beside_the_splits(root):
    write(root.parent / "more" / "deep", {"any": 10}, seed=2)
    write(root.parent / "other", {"any": 5}, seed=3)
    (root.parent / "more" / "notes.txt").write_text("no picture")
    (root.parent / "more" / ".hidden.png").write_text("no picture")
    plain = imagefolder(root, **SMALL)
    data = imagefolder(root, unlabelled=[root.parent / "more", str(root.parent / "other")], **SMALL)
    assert plain.unlabelled is None and torch.equal(data.train.images, plain.train.images)
    assert torch.equal(next(iter(data.train))[0], next(iter(plain.train))[0])
    first, second = ([x for x, _ in data.unlabelled] for _ in range(2))
    assert [x.shape for x in first] == [(8, 3, 16, 16)] and len(data.unlabelled) == 1
    assert not torch.equal(first[0], second[0])  # another order, cut out and mirrored anew
    assert len(data.unlabelled.images) == 15 and data.unlabelled.pictures.paths[0].endswith("more/deep/any/000.JPEG")
    assert abs((first[0] * torch.tensor(data.train.std).view(3, 1, 1)).mean() + 0.449 - 60 / 255) < 0.1
    with pytest.raises(AjpqError, match="data.unlabelled must be a folder of pictures.*nowhere"):
        imagefolder(root, unlabelled=root.parent / "nowhere", **SMALL)
    with pytest.raises(AjpqError, match="nothing may be learned from the test split.*val/ant/000.JPEG"):
        imagefolder(root, unlabelled=root, **SMALL)
    own = imagefolder(root, unlabelled=root / "train", **SMALL)
    unseen = {own.search.pictures.paths[i] for i in own.search.images.tolist()}
    rest = {own.unlabelled.pictures.paths[i] for i in own.unlabelled.images.tolist()}
    assert len(rest) == 120 - len(unseen) and not rest & unseen
    for wrong in ([], "", 5, [None]):
        with pytest.raises(AjpqError, match="data.unlabelled must be a folder of pictures, or a list of such, but it"):
            imagefolder(root, unlabelled=wrong, **SMALL)
    twice = [root.parent / "other", root.parent / "other" / "any"]
    assert len(imagefolder(root, unlabelled=twice, **SMALL).unlabelled.images) == 5
    for i in range(3):
        (root.parent / "other" / "any" / f"{i:03}.JPEG").write_text("no picture")
    with pytest.raises(AjpqError, match="at most 1% of the images may be unreadable, but 3 of 5"):
        imagefolder(root, unlabelled=root.parent / "other", **SMALL)


@pytest.mark.parametrize("above", [False, True])
def test_splits_labels_and_shapes(root, above):
    data = imagefolder(root.parent if above else root, **SMALL)
    train, search, test = ({*part.images.tolist()} for part in (data.train, data.search, data.test))
    assert len(train) == 100 and len(search) == 20 and len(test) == 11
    assert not train & search and not (train | search) & test
    assert {*data.calibration.images.tolist()} <= train and len(data.calibration.images) == 100
    assert data.classes == ("ant", "bee")
    assert all_of(data.search)[1].bincount().tolist() == [10, 10]
    assert [len(y) for _, y in data.train] == [8] * 12 and len(data.train) == 12
    images, labels = raw(data.test)
    assert images.dtype == torch.float32 and images.shape == (11, 3, 16, 16) and labels.dtype == torch.int64
    assert labels.tolist() == [0] * 6 + [1] * 5
    assert (images[:6].mean((1, 2, 3)) - 60).abs().max() < 6 and (images[6:].mean((1, 2, 3)) - 120).abs().max() < 6
    images, labels = raw(data.train)
    assert (images.mean((1, 2, 3)) - (60 + 60 * labels)).abs().max() < 35  # the label is that of the image


def test_evaluation_cuts_out_the_centre(root):
    data = imagefolder(root, **{**SMALL, "size": 20})
    images, _ = raw(data.test)
    for image, number in zip(images, data.test.images.tolist(), strict=True):
        with Image.open(data.test.pictures.paths[number]) as file:
            w, h = file.size
            scale = 20 / min(w, h)
            small = file.resize((int(w * scale), int(h * scale)), Image.BILINEAR)
        left, top = (small.width - 20) // 2, (small.height - 20) // 2
        expected = np.asarray(small.crop((left, top, left + 20, top + 20)), dtype=np.float32).transpose(2, 0, 1)
        apart = (image - torch.from_numpy(expected)).abs()
        assert apart.max() <= 3 and apart.mean() < 0.5


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_images_are_mirrored(square, flip):
    # The whole area of a square has no other aspect ratio, so it comes whole.
    data = imagefolder(square, **SQUARE, flip=flip, scale=(1.0, 1.0))
    still, train = raw(data.calibration)[0].round(), raw(data.train)[0].round()
    expected = {image.numpy().tobytes() for image in (still.flip(3) if flip else still).contiguous()}
    assert len(expected) == 20 and {image.contiguous().numpy().tobytes() for image in train} == expected


def test_training_images_are_cut_out_anew_every_epoch(square):
    data = imagefolder(square, **SQUARE, scale=(0.2, 0.4))  # at most sqrt(0.4 * 4 / 3) = 0.73 of the width
    still, first, second = (raw(part)[0] for part in (data.calibration, data.train, data.train))
    rises = [(images[..., -1] - images[..., 0]).abs().amax() for images in (still, first, second)]
    assert max(rises[1:]) < 0.8 * rises[0] and not torch.equal(first, second)


def test_batches_depend_on_the_seed_alone(root):
    torch.manual_seed(1)
    one = imagefolder(root, seed=3, **SMALL)
    state = torch.get_rng_state()
    first, second = all_of(one.train), all_of(one.train)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's random numbers are used up
    torch.manual_seed(2)
    random.seed(5)
    two = imagefolder(root, seed=3, workers=2, cache_bytes=0, **SMALL)
    next(iter(two.calibration))
    for mine in (first, second):
        for a, b in zip(mine, all_of(two.train), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], all_of(imagefolder(root, seed=4, **SMALL).train)[0])
    for mine, theirs in ((one.search, two.search), (one.test, two.test), (one.calibration, two.calibration)):
        assert torch.equal(all_of(mine)[0], all_of(theirs)[0]) and torch.equal(all_of(mine)[1], all_of(theirs)[1])


def test_training_images_can_be_divided(root):
    data = imagefolder(root, **SMALL)
    part, rest = divide(data.train, 0.8, seed=0)
    assert len(part.images) == 80 and {*part.images.tolist()} | {*rest.images.tolist()} == {*data.train.images.tolist()}
    assert not {*part.images.tolist()} & {*rest.images.tolist()}
    again = divide(data.train, 0.8, seed=0)[0]
    assert torch.equal(all_of(part)[0], all_of(again)[0])
    assert len(all_of(rest)[1]) == 16  # whole batches of 8
    both = join(data.train, data.search)
    assert {*both.images.tolist()} == {*data.train.images.tolist(), *data.search.images.tolist()}
    assert all_of(both)[0].shape[2:] == all_of(data.train)[0].shape[2:]
    with pytest.raises(AjpqError, match="of one set of pictures"):
        join(data.train, imagefolder(root, **SMALL).search)


def test_a_copy_of_a_loader_goes_on_by_itself_and_shares_the_pictures(root):
    train = imagefolder(root, **SMALL).train
    twin = copy.deepcopy(train)
    assert twin.pictures is train.pictures
    first = all_of(twin)[0]
    assert torch.equal(first, all_of(train)[0]) and not torch.equal(first, all_of(twin)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_spares_the_disk_and_keeps_to_its_cap(root, workers):
    data = imagefolder(root, workers=workers, **SMALL)
    before = all_of(data.test)[0]
    for file in (root / "val").rglob("*.JPEG"):
        file.write_bytes(b"")
    assert torch.equal(all_of(data.test)[0], before)  # what a worker has read, all have
    cache = Cache(3, cap=3 * 4 * 4 * 2)
    images = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(3)]
    for i, image in enumerate(images):
        cache.put(i, image)
        cache.put(i, image)
    assert torch.equal(cache.get(0), images[0]) and torch.equal(cache.get(1), images[1]) and cache.get(2) is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_an_unreadable_image_is_named_and_left_out(root, workers, content):
    file = root / "val" / "bee" / "002.JPEG"
    whole = all_of(imagefolder(root, **SMALL).test)[0]
    file.write_bytes(file.read_bytes()[:400] if content == "half" else content)
    data = imagefolder(root, workers=workers, **SMALL)
    with pytest.warns(UserWarning, match=f"1 of 131 cannot be read: {file}"):
        images, labels = all_of(data.test)
    assert labels.tolist() == [0] * 6 + [1] * 4 and torch.equal(images, whole[[*range(8), 9, 10]])
    all_of(data.test)  # told once
    for name in ("000", "001"):
        (root / "val" / "ant" / f"{name}.JPEG").write_bytes(b"")
    with pytest.raises(AjpqError, match="at most 1% of the images may be unreadable, but 2 of 131.*000.JPEG.*001.JPEG"):
        all_of(imagefolder(root, **SMALL).test)


def test_a_batch_of_unreadable_images_only_is_no_batch(root):
    (root / "val" / "ant" / "000.JPEG").write_bytes(b"")
    data = imagefolder(root, **{**SMALL, "eval_batch_size": 1})
    with pytest.warns(UserWarning, match="1 of 131"):
        assert [len(y) for _, y in data.test] == [1] * 10


@pytest.mark.parametrize("layout", ["plain", "keras"])
def test_labels_are_the_networks_outputs(root, tmp_path, layout):
    listed = {"ant": 310, "bee": 309, "cat": 281}
    if layout == "keras":
        listed = {str(index): [name, name.upper()] for name, index in listed.items()}
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    data = imagefolder(root, classes=str(tmp_path / "classes.json"), **SMALL)
    assert all_of(data.test)[1].tolist() == [310] * 6 + [309] * 5
    assert len(data.classes) == 311 and (data.classes[310], data.classes[309], data.classes[0]) == ("ant", "bee", "")
    assert sorted({*all_of(data.train)[1].tolist()}) == [309, 310]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"ant": 3}', "bee in .* is not there"),
        ('{"ant": 3, "bee": 3}', "index of its own"),
        ('{"ant": 3, "bee": "x"}', "index of its own"),
        ("[1, 2]", "cannot be read as one"),
        ("{", "cannot be read as one"),
        (None, "cannot be read as one"),
    ],
)
def test_a_wrong_class_index_is_named(root, tmp_path, text, told):
    path = tmp_path / "classes.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AjpqError, match=told):
        imagefolder(root, classes=path, **SMALL)


def test_imagenette_has_imagenets_labels(tmp_path):
    names = list(IMAGENETTE)
    write(tmp_path / "imagenette2" / "train", {name: 4 for name in names})
    write(tmp_path / "imagenette2" / "test", {name: 1 for name in names})
    data = imagenette(tmp_path, **{**SMALL, "search_images": 10})
    assert all_of(data.test)[1].tolist() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert len(data.classes) == 702 and data.classes[0] == "tench" and data.classes[701] == "parachute"
    data = imagenette(tmp_path, imagenet=False, **{**SMALL, "search_images": 10})
    assert all_of(data.test)[1].tolist() == list(range(10)) and data.classes[1] == "English springer"
    (tmp_path / "imagenette2" / "train" / "n02102040").rename(tmp_path / "imagenette2" / "train" / "n00000001")
    (tmp_path / "imagenette2" / "test" / "n02102040").rename(tmp_path / "imagenette2" / "test" / "n00000001")
    with pytest.raises(AjpqError, match="n00000001"):
        imagenette(tmp_path, **SMALL)


def test_wrong_folders_are_named(root, tmp_path):
    with pytest.raises(AjpqError, match="there is no .*nowhere"):
        imagefolder(tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(AjpqError, match="empty does not"):
        imagefolder(tmp_path / "empty")
    write(tmp_path / "other" / "train", {"ant": 2})
    write(tmp_path / "other" / "test", {"ant": 2})
    with pytest.raises(AjpqError, match="several: other, set"):
        imagefolder(tmp_path, **SMALL)
    write(tmp_path / "one" / "train", {"ant": 2})
    write(tmp_path / "one" / "test", {"ant": 2})
    with pytest.raises(AjpqError, match="two classes at least, but .*one has only ant"):
        imagefolder(tmp_path / "one", **SMALL)
    (root / "train" / "cow").mkdir()
    with pytest.raises(AjpqError, match="train/cow has none"):
        imagefolder(root, **SMALL)
    (root / "train" / "cow").rmdir()
    (root / "val" / "bee").rename(root / "val" / "wasp")
    with pytest.raises(AjpqError, match="only one has bee, wasp"):
        imagefolder(root, **SMALL)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"search_images": 120}, "search_images < 120"),
        ({"search_images": 0}, "search_images=0"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"size": 21}, "resize >= size"),
    ],
)
def test_wrong_settings_are_named(root, settings, told):
    with pytest.raises(AjpqError, match=told):
        imagefolder(root, **{**SMALL, **settings})


def test_limit_caps_every_split(root):
    data = imagefolder(root, limit=6, **SMALL)
    parts = (data.train, data.search, data.test, data.calibration)
    assert [len(part.images) for part in parts] == [6, 6, 6, 6]
    assert data.test.labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_defaults_of_conf_are_settings_of_their_function(path):
    cfg = yaml.safe_load(path.read_text())
    parameters = inspect.signature(locate(cfg.pop("_target_"))).parameters
    if "settings" in parameters:  # passed on
        parameters = {**inspect.signature(imagefolder).parameters, **parameters}
    assert cfg.keys() <= parameters.keys()
    assert {name for name, p in parameters.items() if p.default is p.empty} <= {*cfg, "settings"}


def test_the_configuration_makes_them(root):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", ["data=imagefolder", f"data.root={root}", "data.size=16", "data.search_images=20"])
        data = instantiate(cfg.data, _convert_="all")
        assert next(iter(data.search))[0].shape == (20, 3, 16, 16)
        cfg = compose("config", ["data=imagenette", f"data.root={root}"])
        with pytest.raises(AjpqError, match="ant, bee"):
            imagenette(**{k: v for k, v in cfg.data.items() if k not in ("_target_", "search_images")}, search_images=9)


def unpacked(archive: Path, folder: Path, train: int) -> Path:
    """The test part of the shared Imagenette, and `train` training images per class."""
    counts: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            counts["/".join(parts[:-1])] = number = counts.get("/".join(parts[:-1]), -1) + member.isfile()
            if member.isfile() and (parts[1] == "test" or number < train):
                tar.extract(member, folder, filter="data")
    return folder


def test_grey_pictures_of_16_bits_keep_their_upper_8(tmp_path):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = Pictures([tmp_path / "ramp.png"], torch.zeros(1), 0).read(0)
    assert torch.equal(found, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, 32, 32))
