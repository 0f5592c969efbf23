"""Images with boxes: the folder of the DAC-SDC contest (a csv file) and COCO's json, read when they are asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ajpq.data import Data
from ajpq.epochs import begun
from ajpq.errors import AjpqError, check_counts
from ajpq.pictures import PartOfPictures, Pictures, pictures_under

Labelled = dict[Path, list[tuple[float, float, float, float]]]  # image -> corners x1, y1, x2, y2 in pixels
RESIZE = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class BoxBatches(PartOfPictures):
    """Batches of normalised float32 images (N, 3, H, W) and boxes (N, M, 4): corners as fractions, unused rows all -1.

    pictures: of one size, their targets are the boxes. mean, std: of pixel / 255. Where the order is shuffled images
    are augmented: mirrored with probability 1/2, moved by up to `move` of their width and height (what leaves the image
    is cut off its box; a box that loses more than half is dropped) and changed in brightness by up to `light`.
    scenes: int64, for every picture: the same number for images that may show the same scene. None = every image by
        itself.
    """

    def __init__(
        self, pictures: Pictures, images: Tensor, batch_size: int, *, mean: float = 0.5, std: float = 0.25,
        shuffle: int | None = None, move: float = 0.1, light: float = 0.2, workers: int = 0,
        scenes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(pictures, images, batch_size, shuffle, workers)
        self.mean, self.std, self.move, self.light, self.scenes = mean, std, move, light, scenes

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
        epoch = None if self._epochs is None else begun(self._epochs)
        order = self.images if epoch is None else self.images[torch.randperm(len(self.images), generator=epoch)]
        keys = [[(number, None) for number in part.tolist()] for part in order.split(self.batch_size)[: len(self)]]
        for images, numbers in self.pictures.batches(keys, v2.Identity(), self.workers):
            boxes = self.pictures.targets[numbers]
            if epoch is not None:
                images, boxes = self._augmented(images, boxes, epoch)
            yield (images.float() / 255 - self.mean) / self.std, boxes

    def _augmented(self, images: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, c, h, w = images.shape
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        moved = (2 * torch.rand(2, n, 1, generator=generator) - 1) * self.move
        dy, dx = (moved[0] * h).round().long(), (moved[1] * w).round().long()  # (n, 1)
        rows, cols = torch.arange(h) - dy, torch.arange(w) - dx  # (n, h), (n, w): where a pixel comes from
        seen = ((rows >= 0) & (rows < h))[:, None, :, None] & ((cols >= 0) & (cols < w))[:, None, None, :]
        cols = torch.where(mirrored, w - 1 - cols, cols).clamp(0, w - 1)
        taken = images[
            torch.arange(n).view(n, 1, 1, 1),
            torch.arange(c).view(1, c, 1, 1),
            rows.clamp(0, h - 1)[:, None, :, None],
            cols[:, None, None, :],
        ]
        light = 1 + (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1) * self.light
        pixels = torch.where(seen, (taken.float() * light).clamp(0, 255), torch.full((), 127.5))
        return pixels, _moved(boxes, mirrored, dx / w, dy / h)


def _moved(boxes: Tensor, mirrored: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """boxes (N, M, 4) after mirroring (N, 1) and a shift (N, 1) by fractions of the image; lost ones are -1."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    x1, x2 = torch.where(mirrored, 1 - x2, x1), torch.where(mirrored, 1 - x1, x2)
    whole = torch.stack([x1 + dx, y1 + dy, x2 + dx, y2 + dy], dim=-1)
    cut = whole.clamp(0, 1)
    area, left = ((b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (whole, cut))
    kept = (boxes[..., 2] > boxes[..., 0]) & (left > area / 2)
    return torch.where(kept[..., None], cut, torch.full((), -1.0))


def dac_sdc(
    root: str | Path, seed: int = 0, size: tuple[int, int] = (160, 320), batch_size: int = 16, train: float = 0.6,
    search: float = 0.15, block: int = 20, calibration_images: int = 200, resize: str = "nearest", workers: int = 0,
    cache_bytes: int = 2**30, eval_batch_size: int = 25, unlabelled: str | Path | Sequence[str | Path] | None = None,
) -> Data:  # fmt: skip
    """UAV frames with one object each: `root`/boxes.csv (file, xmin, ymin, xmax, ymax in pixels) and `root`/images.

    Frames that follow each other may show the same scene: whole blocks of `block` consecutive frames (20: our choice)
    go to train, search or test, and count as one where the test split says how sure a difference is. train, search:
    fractions of the blocks; the rest is the test split. size: (H, W) of the network's input. resize: nearest, bilinear
    or bicubic. workers: processes that read. cache_bytes: of resized images kept in memory, at most, 3 * H * W for each
    (0.15 MB at 160 x 320); what does not fit is read anew in every epoch. unlabelled: a folder of further pictures, or
    several, see `Data`; they are resized and augmented like frames, and kept in as much memory again.

    Raises AjpqError for a missing folder or table, and more than 1 % unreadable images; fewer are left out with a
    warning.
    """
    root = Path(root)
    table = root / "boxes.csv"
    if not table.is_file():
        raise AjpqError(
            f"data.root must be a folder with boxes.csv and images/, but there is no {table}; set data.root"
        )
    labelled: Labelled = {}
    with table.open(newline="") as file:
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
    order = np.random.default_rng(seed).permutation(blocks.max() + 1)
    ends = [round(train * len(order)), round((train + search) * len(order))]
    if not 0 < ends[0] < ends[1] < len(order):
        raise AjpqError(
            f"each of train, search and test must have a block of frames, but {train=} and {search=} leave one of "
            f"{len(order)} blocks empty; change them or `block`"
        )
    parts = [torch.from_numpy(np.flatnonzero(np.isin(blocks, some))) for some in np.split(order, ends)]
    data = _splits(pictures, parts, seed, batch_size, eval_batch_size, calibration_images, workers,
                   torch.from_numpy(blocks))  # fmt: skip
    return _beside(data, unlabelled, size, resize, cache_bytes)


def coco(
    root: str | Path, seed: int = 0, size: tuple[int, int] = (160, 320), batch_size: int = 16, search: float = 0.2,
    calibration_images: int = 200, resize: str = "nearest", workers: int = 0, cache_bytes: int = 2**30,
    eval_batch_size: int = 25, annotations: str = "_annotations.coco.json",
    unlabelled: str | Path | Sequence[str | Path] | None = None,
) -> Data:  # fmt: skip
    """Images with boxes in COCO's json: `root`/train and `root`/valid (or test), each with images and `annotations`.

    All categories count as one. search: fraction of train. The other settings are those of `dac_sdc`. Raises AjpqError
    for a missing or broken folder, and more than 1 % unreadable images; fewer are left out with a warning.
    """
    root = Path(root)
    test = next((name for name in ("test", "valid", "val") if (root / name / annotations).is_file()), "valid")
    ours, theirs = (_coco_boxes(root / part / annotations) for part in ("train", test))
    count = round(search * len(ours))
    if not 0 < count < len(ours):
        raise AjpqError(f"`0 < search < 1` must hold and leave images to train on, but {search=}; use search=0.2")
    order = torch.randperm(len(ours), generator=torch.Generator().manual_seed(seed))
    parts = [order[count:], order[:count].sort().values, len(ours) + torch.arange(len(theirs))]
    data = _splits(_pictures(ours | theirs, size, resize, cache_bytes), parts, seed, batch_size, eval_batch_size,
                   calibration_images, workers)  # fmt: skip
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
            labelled[names[one["image_id"]]].append((x, y, x + w, y + h))
    except (ValueError, KeyError, TypeError) as error:
        raise AjpqError(f"{path} must be COCO's json, but it cannot be read ({error!r}); mend it") from error
    return labelled


def _pictures(labelled: Labelled, size: Sequence[int], resize: str, cache_bytes: int) -> Pictures:
    """Images (3, H, W) of `size` with boxes (M, 4) as fractions."""
    check_counts(0, cache_bytes=cache_bytes)
    if resize not in RESIZE:
        raise AjpqError(f"resize must be one of {', '.join(RESIZE)}, but it is {resize!r}; choose one")
    if not labelled:
        raise AjpqError("detection needs images, but the table names none; check data.root")
    h, w = size
    check_counts(1, height=h, width=w)
    boxes = torch.full((len(labelled), max(1, *map(len, labelled.values())), 4), -1.0)
    pictures = Pictures(list(labelled), boxes, cache_bytes, lambda picture: picture.resize((w, h), RESIZE[resize]))
    for rows, corners, found in zip(boxes, labelled.values(), pictures.check(), strict=True):
        if corners and found:
            rows[: len(corners)] = torch.tensor(corners) / torch.tensor(found * 2, dtype=torch.float32)
    return pictures


def _splits(
    pictures: Pictures, parts: Sequence[Tensor], seed: int, batch_size: int, eval_batch_size: int,
    calibration_images: int, workers: int, scenes: Tensor | None = None,
) -> Data:  # fmt: skip
    check_counts(0, workers=workers)
    train, search, test = parts
    spread = train[torch.linspace(0, len(train) - 1, min(calibration_images, len(train))).long()]
    settings = {"workers": workers, "scenes": scenes}
    return Data(
        train=BoxBatches(pictures, train, batch_size, shuffle=seed, **settings),
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
    held = data.test.pictures.paths[data.test.images]
    pictures = _pictures({path: [] for path in pictures_under(unlabelled, held)}, size, resize, cache_bytes)
    more = data.train.over(pictures)
    more.scenes = None
    return replace(data, unlabelled=more)
