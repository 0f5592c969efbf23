"""Folders of images as ImageNet has them, `train/<class>/` and `val/<class>/` or `test/<class>/`, as `Data`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from ajpq.data import Data, stratified_order
from ajpq.errors import AjpqError, check_counts
from ajpq.pictures import PictureBatches, Pictures, is_picture, pictures_under

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENETTE = {  # folder: index in ImageNet, name
    "n01440764": (0, "tench"),
    "n02102040": (217, "English springer"),
    "n02979186": (482, "cassette player"),
    "n03000684": (491, "chain saw"),
    "n03028079": (497, "church"),
    "n03394916": (566, "French horn"),
    "n03417042": (569, "garbage truck"),
    "n03425413": (571, "gas pump"),
    "n03445777": (574, "golf ball"),
    "n03888257": (701, "parachute"),
}


def imagefolder(
    root: str | Path, seed: int = 0, size: int = 224, resize: int = 256, batch_size: int = 64,
    search_images: int = 1000, calibration_images: int = 1000, limit: int | None = None,
    classes: str | Path | Mapping[str, int] | None = None, scale: Sequence[float] = (0.08, 1.0), flip: float = 0.5,
    mean: Sequence[float] = MEAN, std: Sequence[float] = STD, workers: int = 0, cache_bytes: int = 2**30,
    eval_batch_size: int = 50, unlabelled: str | Path | Sequence[str | Path] | None = None,
) -> Data:  # fmt: skip
    """Images (3, size, size) of a folder with `train/<class>/*` and `val/<class>/*` or `test/<class>/*`.

    root: that folder, or one that holds exactly one such; the test split is `test` where that has class folders, else
        `val`. size: of the images that the network sees, pixels. resize: to this many pixels the shorter side is
        brought before the centre is cut out. Training images are cut out at random instead (Szegedy et al. 2015, arXiv
        1409.4842, section 6), `scale` of their area, and mirrored with probability `flip`. search_images: carved off
        the training part, stratified. calibration_images: at most so many training images, not augmented. limit: at
        most so many images in each split, stratified. classes: the index of every class folder among the network's
        outputs, or a json file with them, {"n01440764": 0, ...} or {"0": ["n01440764", "tench"], ...}; None = by
        alphabet. mean, std: per channel, of pixel / 255. workers: processes that read and augment. cache_bytes: of
        decoded images kept in memory, at most. unlabelled: a folder of further pictures, or several, see `Data`; they
        are augmented as training images are, and kept in as much memory again.

    Raises AjpqError for a missing or empty folder, classes that are not listed or differ, and more than 1 % unreadable
    images; fewer are left out with a warning.
    """
    check_counts(1, size=size, search_images=search_images, calibration_images=calibration_images, limit=limit,
                 batch_size=batch_size, eval_batch_size=eval_batch_size)  # fmt: skip
    check_counts(0, workers=workers, cache_bytes=cache_bytes)
    if resize < size:
        raise AjpqError(f"`resize >= size` must hold, as the centre is cut out, but {resize=} and {size=}; raise it")
    folder, test_part = _find(Path(root))
    train, test = _files(folder / "train"), _files(folder / test_part)
    names, indices = _indices(folder, train, test, classes)
    paths = [path for part in (train, test) for files in part.values() for path in files]
    labels = np.array([indices[name] for part in (train, test) for name, files in part.items() for _ in files])
    n_train = sum(map(len, train.values()))
    if search_images >= n_train:
        raise AjpqError(
            f"`search_images < {n_train}` must hold for the training images of {folder}, but {search_images=}: leave "
            "some to train on"
        )
    order, later = stratified_order(labels[:n_train], seed), stratified_order(labels[n_train:], seed)
    fitted = order[search_images:][:limit]
    pictures = Pictures(paths, torch.from_numpy(labels), cache_bytes)
    cut = v2.Compose([v2.RandomResizedCrop(size, scale=tuple(scale)), v2.RandomHorizontalFlip(flip)])
    whole = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])

    def part(chosen: np.ndarray, count: int, transform: v2.Transform, shuffle: int | None = None) -> PictureBatches:
        return PictureBatches(
            pictures, torch.from_numpy(chosen), count, transform, mean=mean, std=std, shuffle=shuffle, workers=workers
        )

    data = Data(
        train=part(fitted, batch_size, cut, shuffle=seed),
        search=part(order[:search_images][:limit], eval_batch_size, whole),
        test=part(n_train + np.sort(later[:limit]), eval_batch_size, whole),
        calibration=part(fitted[:calibration_images], eval_batch_size, whole),
        classes=names,
    )
    if unlabelled is None:
        return data
    others = pictures_under(unlabelled, [paths[i] for i in order[:search_images]], paths[n_train:])
    more = Pictures(others, torch.full((len(others),), -1), cache_bytes)
    more.check()
    return replace(data, unlabelled=data.train.over(more))


def imagenette(root: str | Path, seed: int = 0, imagenet: bool = True, resize: int = 224, **settings: Any) -> Data:
    """Imagenette (Howard 2019): ten classes of ImageNet, a folder as for `imagefolder`, which has the other settings.

    imagenet: labels are the indices of ImageNet's 1,000 classes; false = 0 to 9.
    """
    indices = {folder: index if imagenet else i for i, (folder, (index, _)) in enumerate(IMAGENETTE.items())}
    data = imagefolder(root, seed, resize=resize, classes=indices, **settings)
    told = dict(IMAGENETTE.values()) if imagenet else dict(enumerate(name for _, name in IMAGENETTE.values()))
    return replace(data, classes=tuple(told.get(i, "") for i in range(max(told) + 1)))


def _find(root: Path) -> tuple[Path, str]:
    """The folder with `train`, and which of `test` and `val` it has."""
    if not root.is_dir():
        raise AjpqError(f"data.root must be a folder with train/ and val/ or test/, but there is no {root}; set it")
    here = [root] if (root / "train").is_dir() else sorted(p for p in root.iterdir() if (p / "train").is_dir())
    found = [
        (folder, part)
        for folder in here
        for part in [next((p for p in ("test", "val") if _class_folders(folder / p)), None)]
        if part is not None
    ]
    if len(found) != 1:
        what = f"holds several: {', '.join(folder.name for folder, _ in found)}" if found else "does not"
        raise AjpqError(
            f"data.root must hold train/ and val/ or test/ with a folder of images for every class, but {root} {what}; "
            "set it to the data set's own folder"
        )
    return found[0]


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []


def _files(folder: Path) -> dict[str, list[Path]]:
    """Class folder -> its images."""
    found = {one.name: sorted(p for p in one.iterdir() if is_picture(p)) for one in _class_folders(folder)}
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        raise AjpqError(
            f"every class must have a folder of images, but {folder / empty[0] if empty else folder} has none; "
            "add some or remove it"
        )
    return found


def _indices(
    folder: Path, train: Mapping, test: Mapping, classes: str | Path | Mapping[str, int] | None
) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Names by label, and the label of every class folder."""
    if set(train) != set(test):
        odd = ", ".join(sorted(set(train) ^ set(test))[:3])
        raise AjpqError(
            f"training and test part must have the same classes, but in {folder} only one has {odd}; mend the folders"
        )
    if len(train) < 2:
        raise AjpqError(
            f"a classifier needs two classes at least, but {folder} has only {', '.join(train)}; give every class a "
            "folder of its own"
        )
    if classes is None:
        return tuple(train), {name: i for i, name in enumerate(train)}
    given = classes if isinstance(classes, Mapping) else _read(Path(classes))
    missing = [name for name in train if name not in given]
    if missing:
        raise AjpqError(
            f"data.classes must list every class folder, but {', '.join(missing[:3])} in {folder} "
            f"{'is' if len(missing) == 1 else 'are'} not there; add the index"
        )
    told = {index: name for name, index in given.items()}
    if len(told) < len(given) or not all(isinstance(i, int) and i >= 0 for i in told):
        raise AjpqError("data.classes must give every class an index of its own, 0 or more, but does not; mend it")
    return tuple(told.get(i, "") for i in range(max(told) + 1)), given


def _read(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
        if all(isinstance(value, list) for value in found.values()):
            return {value[0]: int(index) for index, value in found.items()}
        return dict(found)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise AjpqError(
            f'data.classes must be a json file as {{"n01440764": 0, ...}}, but {path} cannot be read as one ({error}); '
            "mend or remove it"
        ) from error
