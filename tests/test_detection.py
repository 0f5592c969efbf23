"""Boxes: decoded by hand, lost by a closed form, found again after every augmentation, read exactly from disk."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import all_of

from ajpq.box_data import BoxBatches, coco, dac_sdc
from ajpq.detection import Detection
from ajpq.errors import AjpqError
from ajpq.loaders import divide, join
from ajpq.pictures import Pictures
from ajpq.tasks import Classification, check_task
from ajpq.views import MODES, View, Views, kept

H, W = 4, 8
TASK = Detection(anchors=((1.0, 2.0), (3.0, 3.0)))


def nothing(n: int = 1) -> torch.Tensor:
    """Outputs (n, 10, H, W) that are sure of no object."""
    outputs = torch.zeros(n, 2, 5, H, W)
    outputs[:, :, 4] = -20.0
    return outputs.view(n, 10, H, W)


def says(box: tuple[float, float, float, float], sure: float = 20.0) -> torch.Tensor:
    """Outputs that tell one box of corners in fractions, in the cell of its centre, by the second anchor."""
    x1, y1, x2, y2 = box
    x, y, w, h = (x1 + x2) / 2 * W, (y1 + y2) / 2 * H, (x2 - x1) * W, (y2 - y1) * H
    outputs = nothing().view(1, 2, 5, H, W)
    at = torch.tensor([x % 1, y % 1])
    told = [*torch.logit(at).tolist(), math.log(w / 3), math.log(h / 3), sure]
    outputs[0, 1, :, int(y), int(x)] = torch.tensor(told)
    return outputs.view(1, 10, H, W)


BOX = (0.2, 0.1, 0.6, 0.9)
NONE = (-1.0, -1.0, -1.0, -1.0)


def test_the_box_that_was_encoded_is_decoded():
    boxes, sure = TASK.decode(says(BOX))
    assert boxes.shape == (1, 2 * H * W, 4) and sure.argmax() == H * W + 2 * W + 3
    assert boxes[0, sure.argmax()].tolist() == pytest.approx(BOX, abs=1e-5)


def test_quality_is_the_overlap_of_the_surest_box():
    shifted = (BOX[0] + 0.2, BOX[1], BOX[2] + 0.2, BOX[3])
    targets = torch.tensor([[BOX, NONE], [shifted, NONE], [NONE, NONE], [NONE, NONE], [shifted, BOX]])
    outputs = torch.cat([says(BOX), says(BOX), says(BOX), nothing(), says(BOX)])
    assert TASK.quality(outputs, targets).tolist() == pytest.approx([1, 1 / 3, 0, 1, 1], abs=1e-5)
    assert TASK.metrics(outputs, targets)["iou"] == pytest.approx(2 / 3, abs=1e-5)


def test_loss_has_its_closed_form():
    targets = torch.tensor([[BOX]])
    assert TASK.losses(says(BOX), targets).item() == pytest.approx(0, abs=1e-6)
    unsure = TASK.losses(says(BOX, sure=0.0), targets).item()
    assert unsure == pytest.approx(5 * 0.5**2 / 2, abs=1e-6)
    assert TASK.losses(nothing(), torch.tensor([[NONE]])).item() == pytest.approx(0, abs=1e-6)
    empty = torch.zeros(1, 10, H, W)  # every confidence is 1/2
    assert TASK.losses(empty, torch.tensor([[NONE]])).item() == pytest.approx(2 * H * W * 0.25 / 2)
    wider = says((BOX[0] - 0.1, BOX[1], BOX[2] + 0.1, BOX[3]))
    expected = (math.log(1.5) ** 2 + 5 * (1 - 2 / 3) ** 2) / 2
    assert TASK.losses(wider, targets).item() == pytest.approx(expected, abs=1e-5)


def test_gradients_lead_to_the_object():
    outputs = torch.zeros(1, 10, H, W, requires_grad=True)
    optimizer = torch.optim.Adam([outputs], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        TASK.losses(outputs, torch.tensor([[BOX]])).sum().backward()
        optimizer.step()
    assert TASK.quality(outputs.detach(), torch.tensor([[BOX]])).item() > 0.95


@pytest.mark.parametrize(
    "task, outputs", [(TASK, torch.randn(5, 10, H, W)), (Classification(), torch.randn(5, 7))], ids=["boxes", "labels"]
)
def test_divergence_is_zero_only_for_the_same(task, outputs):
    other = outputs + 0.5 * torch.randn_like(outputs)
    assert task.divergences(outputs, outputs).tolist() == pytest.approx([0] * 5, abs=1e-5)
    assert (task.divergences(other, outputs) > 0).all() and task.divergences(other, outputs).shape == (5,)
    soft = task.divergences(other, outputs, temperature=100.0)
    assert torch.isfinite(soft).all() and (soft > 0).all()


def test_average_precision():
    pytest.importorskip("pycocotools", reason="the extra `detection` is not installed")
    task = Detection(anchors=TASK.anchors, average_precision=True)
    targets = torch.tensor([[BOX], [BOX], [BOX], [BOX]])
    off = (BOX[0], BOX[1], BOX[2], BOX[3] - 0.2)  # IoU 3/4: right at six of COCO's ten levels
    found = task.metrics(torch.cat([says(BOX)] * 4), targets)
    assert found["map50"] == pytest.approx(1) and found["map"] == pytest.approx(1)
    assert task.metrics(torch.cat([says(off)] * 4), targets)["map"] == pytest.approx(0.5, abs=0.11)
    assert task.metrics(torch.cat([nothing()] * 4), targets) == {"iou": 0.0, "map50": 0.0, "map": 0.0} | {
        "iou": task.metrics(torch.cat([nothing()] * 4), targets)["iou"]
    }


def test_wrong_number_of_anchors_is_named():
    with pytest.raises(AjpqError, match="2 anchors needs 10 output channels, but the network has 15"):
        TASK.decode(torch.zeros(1, 15, H, W))


@pytest.mark.parametrize(
    "task, width, targets",
    (
        (Detection(), 10, torch.tensor([0, 1])),
        (Classification(), 3, torch.tensor([0, 3])),
        (Classification(), 3, torch.zeros(2, 1, 4)),
    ),
)
def test_a_task_that_does_not_fit_is_told(task, width, targets):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, width))
    with pytest.raises(AjpqError, match=rf"{type(task).__name__} cannot judge outputs of \(2, {width}\).*set task="):
        check_task(task, model, torch.zeros(2, 3, 2, 2), targets)
    check_task(Classification(), model, torch.zeros(2, 3, 2, 2), torch.tensor([0, 2]))


def test_classification_reports_top5_of_many_classes():
    outputs, targets = torch.eye(10), torch.arange(10).roll(1)
    assert Classification().metrics(outputs, torch.arange(10)) == {"accuracy": 1.0, "top5_accuracy": 1.0}
    assert (
        Classification().metrics(outputs[:, :4], targets)["accuracy"]
        == 0.1 * (outputs[:, :4].argmax(1) == targets).sum()
    )


# -- data -------------------------------------------------------------------------------------------------------------


def written(folder, images: torch.Tensor, boxes: torch.Tensor) -> Pictures:
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return Pictures(paths, boxes, cache_bytes=2**20)


def scenes(folder, n: int = 30, h: int = 160, w: int = 320) -> Pictures:
    """Black images with one white rectangle each."""
    images, boxes = torch.zeros(n, 3, h, w, dtype=torch.uint8), torch.full((n, 2, 4), -1.0)
    rng = np.random.default_rng(0)
    for i in range(n):
        x, y = int(rng.integers(100, 180)), int(rng.integers(50, 80))
        images[i, :, y : y + 32, x : x + 48] = 255
        boxes[i, 0] = torch.tensor([x / w, y / h, (x + 48) / w, (y + 32) / h])
    return written(folder, images, boxes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [(160, 320), (80, 160)])
def test_boxes_stay_on_their_objects(tmp_path, size, workers):
    h, w = size
    pictures, every = scenes(tmp_path), torch.arange(30)
    settings = {"size": size, "shuffle": 0, "workers": workers}
    loader = BoxBatches(pictures, every, 10, mean=0.0, std=1.0, views=Views(zoom=0.25, light=0.0), **settings)
    places, areas = set(), []
    for x, y in loader:
        assert x.shape == (10, 3, h, w)
        for picture, (box, unused) in zip(x, y, strict=True):
            rows, cols = (picture[0] == 1).nonzero(as_tuple=True)
            found = [cols.min() / w, rows.min() / h, (cols.max() + 1) / w, (rows.max() + 1) / h]
            assert box.tolist() == pytest.approx([float(v) for v in found], abs=1.5 / h)
            assert unused.tolist() == [-1.0] * 4
            places.add(tuple(box.tolist()))
            areas.append(float((box[2:] - box[:2]).prod()) / (48 * 32 / (320 * 160)))
    assert len(places) == 30
    assert min(areas) < 0.8 and max(areas) > 1.25 and all(np.exp(-0.61) < area < np.exp(0.61) for area in areas)
    first, again = (next(iter(BoxBatches(pictures, every, 10, **settings))) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_boxes_that_leave_the_image_are_dropped(tmp_path):
    edge = torch.tensor([[[0.0, 0.4, 0.1, 0.6]]]).repeat(200, 1, 1)
    pictures = written(tmp_path, torch.zeros(200, 3, 20, 40, dtype=torch.uint8), edge)
    loader = BoxBatches(pictures, torch.arange(200), 200, size=(20, 40), shuffle=0, views=Views(move=0.2))
    _, boxes = next(iter(loader))
    width = boxes[:, 0, 2] - boxes[:, 0, 0]
    assert (boxes[:, 0, 0] == -1).any() and (width[boxes[:, 0, 0] >= 0] >= 0.05 - 1e-6).all()


def test_what_is_beyond_the_picture_is_grey_in_every_light():
    white = torch.full((3, 36, 64), 255, dtype=torch.uint8)
    seen = View(across=2.0, down=2.0, light=0.8).pixels(white, (36, 64), "nearest")
    assert (seen[:, 9:27, 16:48] == 204).all() and (seen == 127).sum() == 3 * 36 * 64 * 3 / 4


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("native", [(64, 36), (79, 45), (32, 18), (20, 11), (65, 41)])
def test_without_augmentation_pictures_are_resized_as_pillow_does(tmp_path, native, resize):
    noise = np.random.default_rng(0).integers(0, 256, (native[1], native[0], 3), dtype=np.uint8)
    (picture := Image.fromarray(noise)).save(tmp_path / "noise.png")
    pictures = Pictures([tmp_path / "noise.png"], torch.zeros(1, 1, 4), 0)
    loader = BoxBatches(pictures, torch.arange(1), 1, size=(18, 32), resize=resize, mean=0.0, std=1 / 255)
    wanted = torch.from_numpy(np.array(picture.resize((32, 18), MODES[resize][0]))).permute(2, 0, 1)
    off = (next(iter(loader))[0][0].round() - wanted).abs().max()
    assert off <= (0 if resize == "nearest" else 1)


def test_large_pictures_are_kept_smaller():
    for native, wanted in (((640, 360), (640, 360)), ((1600, 900), (800, 450)), ((4000, 300), (4000, 300))):
        assert kept(Image.new("RGB", native), (160, 320), "nearest").size == wanted


def dac_frames(folder, n: int, size: tuple[int, int] = (64, 36), suffix: str = "png"):
    """A folder like that of the DAC-SDC contest."""
    (folder / "images").mkdir()
    with (folder / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "xmin", "ymin", "xmax", "ymax"])
        for i in range(n):
            Image.new("RGB", size, (6 * i % 256, 0, 0)).save(folder / "images" / f"{i:03}.{suffix}")
            table.writerow([f"{i:03}.{suffix}", 16, 9, 32, 27])
    return folder


@pytest.fixture
def frames(tmp_path):
    return dac_frames(tmp_path, 40)


def test_frames_are_split_by_blocks(frames):
    data = dac_sdc(frames, size=(18, 32), block=4, batch_size=4, eval_batch_size=4)
    numbers = {}
    for name in ("train", "search", "test"):
        loader = getattr(data, name)
        assert (loader.boxes[:, 0] == torch.tensor([0.25, 0.25, 0.5, 0.75])).all()
        read = loader.pictures.read
        numbers[name] = {int(read(number)[0, 0, 0]) // 6 for number in loader.images.tolist()}
        assert {n // 4 * 4 + i for n in numbers[name] for i in range(4)} == numbers[name]
    assert sorted(n for part in numbers.values() for n in part) == list(range(40))
    assert [len(part) for part in numbers.values()] == [24, 8, 8]
    part, rest = divide(data.train, 0.75, seed=0)
    assert len(part.images) == 18 and len(rest.images) == 6
    both = join(data.train, data.search)
    assert {*both.images.tolist()} == {*data.train.images.tolist(), *data.search.images.tolist()}
    assert sum(len(boxes) for _, boxes in both) == 32


def test_every_seed_has_the_same_test_frames(frames):
    """A network that was trained with one seed would otherwise be tested with another on what it has learned from."""
    settings = {"size": (18, 32), "block": 4, "train": 0.5, "search": 0.25}
    found = [dac_sdc(frames, seed=seed, **settings) for seed in range(3)]
    test, *others = [data.test.images.tolist() for data in found]
    assert others == [test] * 2
    searched = [frozenset(data.search.images.tolist()) for data in found]
    assert len(set(searched)) == 3
    for data in found:
        parts = [set(getattr(data, name).images.tolist()) for name in ("train", "search", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_coco_json_is_read(tmp_path):
    for part, count in (("train", 10), ("valid", 3)):
        (tmp_path / part).mkdir()
        found = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "plane"}]}
        for i in range(count):
            Image.new("RGB", (64, 36)).save(tmp_path / part / f"{i}.png")
            found["images"].append({"id": i, "file_name": f"{i}.png"})
            found["annotations"] += [{"image_id": i, "bbox": [16, 9, 16, 18]}] * (i % 3)
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(found))
    data = coco(tmp_path, size=(18, 32), batch_size=4)
    assert [len(getattr(data, part).images) for part in ("train", "search", "test")] == [8, 2, 3]
    valid = all_of(data.test)[1]
    assert valid.shape == (3, 2, 4) and (valid[..., 0] >= 0).sum(1).tolist() == [0, 1, 2]
    assert valid[2, 1].tolist() == pytest.approx([0.25, 0.25, 0.5, 0.75])


def coco_folder(folder, change=lambda part, found: None):
    """200 images with two boxes to train on, 3 to test on."""
    for part, count in (("train", 200), ("valid", 3)):
        (folder / part).mkdir()
        boxes = [{"image_id": i, "bbox": [16, 9, 16, 18]} for i in range(count) for _ in range(2)]
        found = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(count)], "annotations": boxes}
        for i in range(count):
            Image.new("RGB", (64, 36)).save(folder / part / f"{i}.png")
        change(part, found)
        (folder / part / "_annotations.coco.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize(
    "box", ([8, 8, 0, 4], [20, 9, -4, 18], [64, 0, 5, 5], [-9, 0, 9, 5], [float("nan"), 9, 16, 18], [0, 0, 1e999, 5])
)
def test_boxes_that_show_nothing_are_left_out_and_named(tmp_path, box):
    def spoil(part, found):
        if part == "train":
            found["annotations"][6]["bbox"] = box

    with pytest.warns(UserWarning, match="boxes are left out: 1 of 406 boxes .*train/3.png"):
        data = coco(coco_folder(tmp_path, spoil), size=(18, 32))
    boxes = data.train.pictures.targets
    assert (boxes[..., 0] >= 0).sum(1).tolist() == [2, 2, 2, 1, *[2] * 199]
    assert torch.equal(boxes[3, 0], torch.tensor([0.25, 0.25, 0.5, 0.75]))


def test_a_table_of_wrong_boxes_is_an_error(tmp_path):
    def centres(part, found):  # as corners, so that most are inside out
        for one in found["annotations"]:
            one["bbox"] = [40, 20, -16, -18]

    with pytest.raises(AjpqError, match="at most 1% of the boxes .* but 406 of 406 .* and 403 more"):
        coco(coco_folder(tmp_path, centres), size=(18, 32))


@pytest.mark.parametrize("part", ("train", "valid"))
def test_a_split_without_a_box_is_an_error(tmp_path, part):
    """It would be right about everything by seeing nothing."""

    def forget(name, found):
        found["annotations"] = [one | {"iscrowd": int(name == part)} for one in found["annotations"]]

    name = {"train": "train", "valid": "test"}[part]
    with pytest.raises(AjpqError, match=f"the {name} split must show objects, but none of its"):
        coco(coco_folder(tmp_path, forget), size=(18, 32))


def test_a_table_of_a_spreadsheet_begins_with_a_mark(frames):
    table = frames / "boxes.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(dac_sdc(frames, block=4).test.images) == 8


def test_what_is_wrong_with_a_folder_is_said(frames, tmp_path):
    with pytest.raises(AjpqError, match="there is no .*boxes.csv"):
        dac_sdc(tmp_path / "nowhere")
    with pytest.raises(AjpqError, match="block >= 1"):
        dac_sdc(frames, block=0)
    with pytest.raises(AjpqError, match="train=0.99"):
        dac_sdc(frames, train=0.99)
    with pytest.raises(AjpqError, match="resize must be one of"):
        dac_sdc(frames, resize="lanczos")
    for zoom in (-0.1, 2, True, "far"):
        with pytest.raises(AjpqError, match="zoom must be a number from 0 to 1"):
            dac_sdc(frames, block=4, zoom=zoom)
    with pytest.raises(AjpqError, match="_annotations.coco.json"):
        coco(tmp_path / "nowhere")
    (frames / "images" / "003.png").write_bytes(b"no image")
    with pytest.raises(AjpqError, match="003.png"):
        dac_sdc(frames)


FAST = {"size": (18, 32), "batch_size": 8, "eval_batch_size": 8, "block": 10}


def damage(folder, number: int, how: str):
    path = folder / "images" / f"{number:03}.jpg"
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[:-30] if how == "cut off" else b"no image")
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "no image", "cut off"])
def test_an_unreadable_frame_is_named_and_left_out(tmp_path, workers, how):
    whole = dac_sdc(dac_frames(tmp_path, 200, suffix="jpg"), **FAST)
    images, boxes = all_of(whole.test)
    number = whole.test.images[3].item()
    with pytest.warns(UserWarning, match=f"1 of 200 cannot be read: {damage(tmp_path, number, how)}"):
        data = dac_sdc(tmp_path, workers=workers, **FAST)
        found = all_of(data.test)
    kept = whole.test.images != number
    assert torch.equal(found[0], images[kept]) and torch.equal(found[1], boxes[kept])
    assert torch.equal(data.test.blocks, whole.test.blocks[kept]) and kept.sum() == len(kept) - 1
    assert torch.equal(data.train.images, whole.train.images)  # the splits do not depend on it
    all_of(data.test)  # told once


def test_frames_without_boxes_come_beside_the_splits(frames, tmp_path):
    (tmp_path / "more").mkdir()
    more = dac_frames(tmp_path / "more", 12, suffix="jpg") / "images"
    plain, data = (dac_sdc(frames, unlabelled=where, **FAST) for where in (None, more))
    assert plain.unlabelled is None and torch.equal(next(iter(plain.train))[0], next(iter(data.train))[0])
    first, second = (next(iter(data.unlabelled)) for _ in range(2))
    assert first[0].shape[1:] == next(iter(data.train))[0].shape[1:] and (first[1] == -1).all()
    assert not torch.equal(first[0], second[0]) and data.unlabelled.blocks is None
    with pytest.raises(AjpqError, match="nothing may be learned from the test split"):
        dac_sdc(frames, unlabelled=frames / "images", **FAST)


@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_many_unreadable_frames_are_an_error(tmp_path, how):
    dac_frames(tmp_path, 200, suffix="jpg")
    for number in (5, 6, 7):
        damage(tmp_path, number, how)
    with pytest.raises(AjpqError, match="at most 1% .* but 3 of 200 .*005.jpg.*006.jpg.*007.jpg"):
        data = dac_sdc(tmp_path, **FAST)
        for part in (data.train, data.search, data.test):
            all_of(part)


def test_frames_do_not_depend_on_the_cache_and_the_workers(frames):
    settings = {"size": (18, 32), "batch_size": 8, "block": 4}
    one, many, none = (
        dac_sdc(frames, **more, **settings) for more in ({}, {"workers": 2, "cache_bytes": 5000}, {"cache_bytes": 0})
    )
    for _ in range(2):
        first, second, third = (all_of(data.train) for data in (one, many, none))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
    for file in (frames / "images").iterdir():
        file.unlink()
    assert torch.equal(all_of(one.calibration)[0], all_of(one.calibration)[0])  # all of training is in memory
    with pytest.raises(AjpqError, match="cannot be read"):
        all_of(none.calibration)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": -1}, "workers >= 0"),
        ({"size": (0, 32)}, "height >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"cache_bytes": -1}, "cache_bytes >= 0"),
        ({"cache_bytes": 2**62}, "data.cache_bytes allows, but 4611686018427387904 bytes"),
    ],
)
def test_settings_of_frames_are_checked(frames, settings, told):
    with pytest.raises(AjpqError, match=told):
        dac_sdc(frames, **{"block": 4, **settings})
