"""Images with boxes: the folder of the DAC-SDC contest (a csv file) and COCO's json, read when they are asked for."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ajpq.data import Data
from ajpq.errors import AjpqError, check_counts
from ajpq.pictures import UNREADABLE, PartOfPictures, Pictures, pictures_under
from ajpq.views import MODES, View, Views, kept

Labelled = dict[Path, list[tuple[float, float, float, float]]]  # image -> corners x1, y1, x2, y2 in pixels


class BoxBatches(PartOfPictures):
    """Batches of normalised float32 images (N, 3, H, W) and boxes (N, M, 4): corners as fractions, unused rows all -1.

    pictures: of any size, their targets are the boxes. size: (H, W) of the images. resize: nearest, bilinear or
        bicubic. mean, std: of pixel / 255. views: what augmentation does where the order is shuffled.
    scenes: int64, for every picture: the same number for images that may show the same scene. None = every image by
        itself.
    """

    def __init__(
        self, pictures: Pictures, images: Tensor, batch_size: int, *, size: tuple[int, int], resize: str = "nearest",
        mean: float = 0.5, std: float = 0.25, shuffle: int | None = None, views: Views | None = None, workers: int = 0,
        scenes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(pictures, images, batch_size, shuffle, workers)
        self.size, self.resize, self.mean, self.std, self.scenes = tuple(size), resize, mean, std, scenes
        self.views = views or Views()

    @property
    def boxes(self) -> Tensor:
        return self.pictures.targets[self.images]

    @property
    def blocks(self) -> Tensor | None:
        """The scenes (n,) of the images, without those that could not be read so far: what a test split tells of the
        difference of two networks is counted by them (`ajpq.bootstrap`)."""
        if self.scenes is None:
            return None
        lost = torch.tensor(sorted(self.pictures.unreadable), dtype=torch.int64)
        return self.scenes[self.images[~torch.isin(self.images, lost)]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        keys = self.keys()
        seeds = dict(key for batch in keys for key in batch)
        for images, numbers in self.pictures.batches(keys, self._seen, self.workers):
            boxes = self.pictures.targets[numbers]
            if self._epochs is not None:
                views = (self.views.draw(torch.Generator().manual_seed(seeds[number])) for number in numbers.tolist())
                boxes = torch.stack([view.boxes(found) for view, found in zip(views, boxes, strict=True)])
            yield (images.float() / 255 - self.mean) / self.std, boxes

    def _seen(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) of any size -> of ours; where there is augmentation, torch's generator has the seed of it."""
        view = View() if self._epochs is None else self.views.draw(torch.default_generator)
        return view.pixels(image, self.size, self.resize)


def dac_sdc(
    root: str | Path, seed: int = 0, size: tuple[int, int] = (160, 320), batch_size: int = 16, train: float = 0.6,
    search: float = 0.15, block: int = 20, calibration_images: int = 200, resize: str = "nearest", zoom: float = 0.0,
    workers: int = 0, cache_bytes: int = 2**30, eval_batch_size: int = 25,
    unlabelled: str | Path | Sequence[str | Path] | None = None,
) -> Data:  # fmt: skip
    """UAV frames with one object each: `root`/boxes.csv (file, xmin, ymin, xmax, ymax in pixels) and `root`/images.

    Frames that follow each other may show the same scene: whole blocks of `block` consecutive frames (20: our choice)
    go to train, search or test, and count as one where the test split says how sure a difference is. train, search:
    fractions of the blocks; the rest is the test split. size: (H, W) of the network's input. resize: nearest, bilinear
    or bicubic. seed: of the frames that the search sees and of the order of the others; the test frames are the same
    for every seed, so that no network has learned from them by another. zoom: training sees exp(-zoom) to exp(zoom) of
    a frame's width and height, see `Views`. workers: processes that read. cache_bytes: of frames kept in memory, at
    most, 3 bytes for each of their pixels (of 640 x 360 0.7 MB; larger than 2.5 times `size` they are kept smaller);
    what does not fit is read anew in every epoch.
    unlabelled: a folder of further pictures, or several, see `Data`; they are resized and augmented like frames, and
    kept in as much memory again.

    Raises AjpqError for a missing folder or table, a split without boxes, and more than 1 % unreadable images or boxes
    without area in their image; fewer are left out with a warning.
    """
    check_counts(1, block=block)
    root = Path(root)
    table = root / "boxes.csv"
    if not table.is_file():
        raise AjpqError(
            f"data.root must be a folder with boxes.csv and images/, but there is no {table}; set data.root"
        )
    labelled: Labelled = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            try:
                corners = tuple(float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
                labelled.setdefault(root / "images" / row["file"], []).append(corners)
            except (KeyError, TypeError, ValueError) as error:
                raise AjpqError(
                    f"every line of {table} must have file, xmin, ymin, xmax, ymax, but one is {row}; mend it"
                ) from error
    pictures = _pictures(labelled, size, resize, cache_bytes)
    blocks = np.arange(len(labelled)) // block
    order = np.random.default_rng(0).permutation(blocks.max() + 1)
    ends = [round(train * len(order)), round((train + search) * len(order))]
    if not 0 < ends[0] < ends[1] < len(order):
        raise AjpqError(
            f"each of train, search and test must have a block of frames, but {train=} and {search=} leave one of "
            f"{len(order)} blocks empty; change them or `block`"
        )
    learned = np.roll(order[: ends[1]], seed * (ends[1] - ends[0]))  # every seed holds out the next blocks
    splits = np.split(np.concatenate([learned, order[ends[1] :]]), ends)
    parts = [torch.from_numpy(np.flatnonzero(np.isin(blocks, some))) for some in splits]
    data = _splits(
        pictures, parts, seed, batch_size, eval_batch_size, calibration_images, zoom, size=size, resize=resize,
        workers=workers, scenes=torch.from_numpy(blocks),
    )  # fmt: skip
    return _beside(data, unlabelled, size, resize, cache_bytes)


def coco(
    root: str | Path, seed: int = 0, size: tuple[int, int] = (160, 320), batch_size: int = 16, search: float = 0.2,
    calibration_images: int = 200, resize: str = "nearest", zoom: float = 0.0, workers: int = 0,
    cache_bytes: int = 2**30, eval_batch_size: int = 25, annotations: str = "_annotations.coco.json",
    unlabelled: str | Path | Sequence[str | Path] | None = None,
) -> Data:  # fmt: skip
    """Images with boxes in COCO's json: `root`/train and `root`/valid (or test), each with images and `annotations`.

    All categories count as one; what is marked `iscrowd` is no object. search: fraction of train. The other settings
    and errors are those of `dac_sdc`.
    """
    root = Path(root)
    test = next((name for name in ("test", "valid", "val") if (root / name / annotations).is_file()), "valid")
    ours, theirs = (_coco_boxes(root / part / annotations) for part in ("train", test))
    count = round(search * len(ours))
    if not 0 < count < len(ours):
        raise AjpqError(f"`0 < search < 1` must hold and leave images to train on, but {search=}; use search=0.2")
    order = torch.randperm(len(ours), generator=torch.Generator().manual_seed(seed))
    parts = [order[count:], order[:count].sort().values, len(ours) + torch.arange(len(theirs))]
    data = _splits(
        _pictures(ours | theirs, size, resize, cache_bytes), parts, seed, batch_size, eval_batch_size,
        calibration_images, zoom, size=size, resize=resize, workers=workers,
    )  # fmt: skip
    return _beside(data, unlabelled, size, resize, cache_bytes)


def _coco_boxes(path: Path) -> Labelled:
    if not path.is_file():
        raise AjpqError(
            f"data.root must hold train/ and valid/ with COCO's json, but there is no {path}; set data.root"
        )
    try:
        found = json.loads(path.read_text())
        names = {image["id"]: path.parent / image["file_name"] for image in found["images"]}
        labelled: Labelled = {names[key]: [] for key in sorted(names)}
        for one in found["annotations"]:
            x, y, w, h = one["bbox"]
            if not one.get("iscrowd"):
                labelled[names[one["image_id"]]].append((x, y, x + w, y + h))
    except (ValueError, KeyError, TypeError) as error:
        raise AjpqError(f"{path} must be COCO's json, but it cannot be read ({error!r}); mend it") from error
    return labelled


def _pictures(labelled: Labelled, size: Sequence[int], resize: str, cache_bytes: int) -> Pictures:
    """Pictures with boxes (M, 4) as fractions, to be seen at a size (H, W)."""
    check_counts(0, cache_bytes=cache_bytes)
    if resize not in MODES:
        raise AjpqError(f"resize must be one of {', '.join(MODES)}, but it is {resize!r}; choose one")
    if not labelled:
        raise AjpqError("detection needs images, but the table names none; check data.root")
    check_counts(1, height=size[0], width=size[1])
    boxes = torch.full((len(labelled), max(1, *map(len, labelled.values())), 4), -1.0)
    pictures = Pictures(list(labelled), boxes, cache_bytes, lambda picture: kept(picture, size, resize))
    wrong: list[str] = []
    for rows, (path, corners), found in zip(boxes, labelled.items(), pictures.check(), strict=True):
        if corners and found:
            ours = torch.tensor(corners) / torch.tensor(found * 2, dtype=torch.float32)
            shown = _shown(ours)
            rows[: int(shown.sum())] = ours[shown]
            wrong += [f"{corners[i]} of {path}" for i in (~shown).nonzero()[:, 0].tolist()]
    _tell(wrong, sum(map(len, labelled.values())))
    return pictures


def _shown(boxes: Tensor) -> Tensor:
    """Which of the corners (M, 4), as fractions, are those of a box of which a part is in the image, bool (M,)."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return boxes.isfinite().all(1) & ((low < high) & (low < 1) & (high > 0)).all(1)


def _tell(wrong: Sequence[str], count: int) -> None:
    """Warn of boxes that are none, and raise AjpqError if there are too many."""
    if not wrong:
        return
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    told = f"{len(wrong)} of {count} boxes have no area in their image: {'; '.join(wrong[:3])}{more}"
    if len(wrong) > UNREADABLE * count:
        raise AjpqError(f"at most {UNREADABLE:.0%} of the boxes may be empty or outside, but {told}; mend the table")
    warnings.warn(f"boxes are left out: {told}", stacklevel=5)


def _splits(
    pictures: Pictures, parts: Sequence[Tensor], seed: int, batch_size: int, eval_batch_size: int,
    calibration_images: int, zoom: float, **settings: Any,
) -> Data:  # fmt: skip
    """settings: of all loaders."""
    check_counts(0, workers=settings["workers"])
    train, search, test = parts
    for name, part in (("train", train), ("search", search), ("test", test)):
        if not (pictures.targets[part][..., 2] > 0).any():
            raise AjpqError(
                f"the {name} split must show objects, but none of its {len(part)} images has a box; check the table"
            )
    spread = train[torch.linspace(0, len(train) - 1, min(calibration_images, len(train))).long()]
    return Data(
        train=BoxBatches(pictures, train, batch_size, shuffle=seed, views=Views(zoom=zoom), **settings),
        search=BoxBatches(pictures, search, eval_batch_size, **settings),
        test=BoxBatches(pictures, test, eval_batch_size, **settings),
        calibration=BoxBatches(pictures, spread, eval_batch_size, **settings),
        classes=("object",),
    )


def _beside(
    data: Data, unlabelled: str | Path | Sequence[str | Path] | None, size: Sequence[int], resize: str, cache_bytes: int
) -> Data:
    """The data with pictures of which nothing is known beside those of training, in the same batches."""
    if unlabelled is None:
        return data
    names, search, test = data.test.pictures.paths, data.search.images, data.test.images
    others = pictures_under(unlabelled, names[search], names[test])
    pictures = _pictures({path: [] for path in others}, size, resize, cache_bytes)
    more = data.train.over(pictures)
    more.scenes = None
    return replace(data, unlabelled=more)
