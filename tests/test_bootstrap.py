"""Paired differences: the interval has its closed form and its coverage, and frames of one scene count as one."""

import csv

import numpy as np
import pytest
import torch
from nets import images_of, model_of
from PIL import Image

from ajpq import report
from ajpq.bootstrap import paired
from ajpq.box_data import dac_sdc
from ajpq.detection import Detection
from ajpq.errors import AjpqError
from ajpq.tasks import Classification
from ajpq.training import measure, metrics


def right(chance: float, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < chance


def test_right_and_wrong_have_the_normal_interval():
    ours, theirs = right(0.9, 2000, 1), right(0.85, 2000, 2)
    found, change = paired(ours, theirs), ours.astype(float) - theirs
    half = 1.95996 * change.std() / 2000**0.5
    assert found.mean == pytest.approx(ours.mean() - theirs.mean())
    assert found.low == pytest.approx(change.mean() - half, abs=0.04 * half + 1 / 2000)
    assert found.high == pytest.approx(change.mean() + half, abs=0.04 * half + 1 / 2000)
    assert (found.images, found.blocks, found.word) == (2000, 2000, "better")


def test_every_resample_of_two_images_is_counted():
    """Means are -1, 0 and 1 with chances of 1/4, 1/2 and 1/4, so both quantiles are at the ends."""
    found = paired([1, 0], [0, 1])
    assert (found.mean, found.low, found.high) == (0, -1, 1)
    assert found.word == "no better"


def test_blocks_of_one_image_are_none():
    ours, theirs = np.random.default_rng(0).random((2, 150))
    plain, order = paired(ours, theirs), np.random.default_rng(1).permutation(150)
    assert paired(ours, theirs, np.arange(150)) == plain
    assert paired(ours, theirs, order) == plain


def test_a_seed_repeats():
    ours, theirs = np.random.default_rng(0).random((2, 50))
    assert paired(ours, theirs, seed=3) == paired(ours, theirs, seed=3) != paired(ours, theirs, seed=4)


def test_blocks_of_different_sizes_weigh_by_their_images():
    found = paired([1, 1, 1, 0], [0, 0, 0, 0], [7, 7, 7, 2])
    assert (found.mean, found.low, found.high, found.images, found.blocks) == (0.75, 0, 1, 4, 2)


def covers(blocks: int, size: int, scene: float, blocked: bool, trials: int = 200) -> float:
    """How often the interval holds the true difference, 0, where images of a block share a part of theirs."""
    hits = 0
    for seed in range(trials):
        random = np.random.default_rng(seed)
        change = np.repeat(random.normal(0, scene, blocks), size) + random.normal(0, 1, blocks * size)
        change = np.sign(change) * (abs(change) > 0.7)  # better, worse or the same
        numbers = np.arange(blocks).repeat(size) if blocked else None
        found = paired(change, np.zeros_like(change), numbers, seed=seed)
        hits += found.low <= 0 <= found.high
    return hits / trials


def test_coverage_on_images_by_themselves():
    assert 0.90 <= covers(200, 1, 0.0, blocked=False) <= 0.99


def test_coverage_on_scenes_needs_blocks():
    assert 0.89 <= covers(30, 10, 1.0, blocked=True) <= 0.99
    assert covers(30, 10, 1.0, blocked=False) < 0.75


@pytest.mark.parametrize(
    "ours, theirs, blocks", [([], [], None), ([1, 2], [1], None), ([1, 2], [1, 2], [0]), ([[1.0]], [[1.0]], None)]
)
def test_other_shapes_are_refused(ours, theirs, blocks):
    with pytest.raises(AjpqError, match="one value of each network"):
        paired(ours, theirs, blocks)


# -- what it is computed from, and told of ----------------------------------------------------------------------------


def test_each_image_is_measured_in_the_same_pass():
    network, images = model_of("digits_cnn"), images_of("digits_cnn", 30)
    asked = []
    network.register_forward_hook(lambda *_: asked.append(1))
    labels = torch.arange(30) % 10
    split = list(zip(images.split(8), labels.split(8), strict=True))
    found, values = measure(network, split, Classification())
    assert len(asked) == len(split)
    with torch.no_grad():
        outputs = network(images)
    assert values["accuracy"].tolist() == (outputs.argmax(1) == labels).double().tolist()
    assert values["top5_accuracy"].tolist() == [
        float(label in row) for label, row in zip(labels, outputs.topk(5).indices, strict=True)
    ]
    assert found == {name: column.mean() for name, column in values.items()} == metrics(network, split)


def test_overlaps_are_measured_by_image():
    task = Detection()
    outputs, targets = torch.randn(6, 10, 4, 8), torch.tensor([[[0.2, 0.1, 0.6, 0.9]]]).repeat(6, 1, 1)
    values = task.per_image(outputs, targets)["iou"]
    assert values.dtype == torch.float64 and values.tolist() == task.quality(outputs, targets).tolist()
    assert task.metrics(outputs, targets)["iou"] == values.mean().item()


def test_frames_bring_their_blocks(tmp_path):
    (tmp_path / "images").mkdir()
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "xmin", "ymin", "xmax", "ymax"])
        for i in range(40):
            Image.new("RGB", (64, 36), (6 * i, 0, 0)).save(tmp_path / "images" / f"{i:03}.png")
            table.writerow([f"{i:03}.png", 16, 9, 32, 27])
    test = dac_sdc(tmp_path, size=(18, 32), block=4, batch_size=4, eval_batch_size=3).test
    frames = test.images
    assert test.blocks.tolist() == (frames // 4).tolist() and len(set(test.blocks.tolist())) == 2
    assert test.part(torch.tensor([5, 0])).blocks.tolist() == test.blocks[[5, 0]].tolist()
    seen = torch.cat([(x[:, 0, 0, 0] * 0.25 + 0.5) * 255 for x, _ in test]).round().long() // 6
    assert seen.tolist() == frames.tolist(), "the split is read in the order of its blocks"


VALUES = {
    "original": {"accuracy": right(0.9, 400, 0)},
    "searched": {"accuracy": right(0.6, 400, 1)},
    "final": {"accuracy": right(0.9, 400, 0)},
}


def test_differences_are_of_both_stages_and_told_in_words():
    found = report.differences(VALUES)
    assert set(found) == {"searched", "final"}
    assert set(found["final"]["accuracy"]) == {"mean", "low", "high", "images", "blocks"}
    worse = report.difference_told("accuracy", "searched", found["searched"]["accuracy"])
    assert worse.startswith("accuracy after search: -0.2") and worse.endswith(": worse")
    same = report.difference_told("accuracy", "final", found["final"]["accuracy"])
    assert "+0.0000 to the original on the same 400 test images" in same and same.endswith("no difference can be told")


@pytest.mark.parametrize(
    "difference, word", ((1e-8, "no better"), (-1e-8, "no better"), (1e-3, "better"), (-1e-3, "worse"))
)
def test_rounding_is_no_difference(difference, word):
    assert paired(np.full(50, 0.5) + difference, np.full(50, 0.5)).word == word


def test_blocks_are_told():
    blocked = report.differences(VALUES, torch.arange(400) // 20)["searched"]["accuracy"]
    assert "400 test images in 20 blocks, 95 % interval" in report.difference_told("accuracy", "searched", blocked)
    single = report.differences(VALUES, torch.zeros(400, dtype=torch.long))["searched"]["accuracy"]
    assert single["low"] is None and single["high"] is None
    assert report.difference_told("accuracy", "searched", single).endswith("in 1 block, too few for an interval")
