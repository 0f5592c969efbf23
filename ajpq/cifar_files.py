"""CIFAR-10 on disk: the official Python batches, read without running their pickles, or a folder of images per
class.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ajpq.errors import AjpqError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Source:
    """One part of CIFAR-10 on disk. labels: int64 (N,). read: indices (n,) -> uint8 images (n, 3, 32, 32)."""

    labels: np.ndarray
    read: Callable[[np.ndarray], Tensor]


def open_cifar10(root: Path) -> tuple[Source, Source, tuple[str, ...]]:
    """(train, test, classes) of the one data set in `root` or in a folder directly below it."""
    if not root.is_dir():
        raise AjpqError(f"The CIFAR-10 root must be an existing folder, but {root} is not one: check `data.root`.")
    here = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    batches = [p for p in here if any((p / name).is_file() for name in CIFAR10_FILES[0])]
    folders = [p for p in here if all((p / part).is_dir() for part in ("train", "test"))]
    found = [root] if root in batches + folders else batches + folders
    if len(found) != 1:
        what = (
            f"holds several ({', '.join(p.name for p in found)})"
            if found
            else "holds neither"
            if any(root.iterdir())
            else "is empty"
        )
        raise AjpqError(
            "The CIFAR-10 root must hold one data set, data_batch_1..5 with test_batch or "
            "{train,test}/<class>/*.jpg|png, "
            f"but {root} {what}: point `data.root` at the data set's own folder."
        )
    if found[0] in batches:
        train, test = (_python_batches(found[0], names) for names in CIFAR10_FILES)
        return train, test, CIFAR10_CLASSES
    (train, classes), (test, test_classes) = (_image_folder(found[0] / part) for part in ("train", "test"))
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise AjpqError(
            f"The classes of train and test must be the same, but {found[0]} has only one of the two for: "
            f"{odd}; add or remove them."
        )
    return train, test, classes


def _image_folder(folder: Path) -> tuple[Source, tuple[str, ...]]:
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise AjpqError(
            f"An image folder must hold one folder of images per class, but {folder} has none: check `data.root`."
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise AjpqError(
                f"Every class must have at least one .jpg or .png image, but {folder / name} has none: "
                "add images or remove it."
            )
        paths += files
        labels += [label] * len(files)

    def read(chosen: np.ndarray) -> Tensor:
        images = np.empty((len(chosen), 32, 32, 3), np.uint8)
        for row, index in enumerate(chosen):
            images[row] = _pixels(paths[index])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    return Source(np.array(labels, dtype=np.int64), read), classes


def _pixels(path: Path) -> np.ndarray:
    # One thread: Pillow takes 0.1 ms for such an image, and handing work between Python threads costs more than that.
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.size == (32, 32):
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            size = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise AjpqError(
            f"Every image must be a readable JPEG or PNG file, but {path} is not ({error}): restore or remove it."
        ) from error
    raise AjpqError(f"Every image must be 32x32 pixels, but {path} is {size[0]}x{size[1]}: resize or remove it.")


def _python_batches(folder: Path, names: tuple[str, ...]) -> Source:
    """The official batches: pickled dictionaries of `data`, uint8 (n, 3072), and `labels`, n integers in 0..9."""
    images, labels = [], []
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                record = _CifarUnpickler(file, encoding="bytes").load()
            record = {key.decode() if isinstance(key, bytes) else key: value for key, value in record.items()}
            batch = np.frombuffer(record["data"].raw, np.uint8).reshape(-1, 3, 32, 32)
            targets = np.array(record["labels"], dtype=np.int64)
            if targets.shape != batch.shape[:1] or targets.size == 0 or targets.min() < 0 or targets.max() > 9:
                raise ValueError(f"{len(batch)} images with labels of shape {targets.shape}")
        except Exception as error:  # a damaged pickle can fail in any way
            raise AjpqError(
                f"A CIFAR-10 batch must be a readable pickle of uint8 images and labels 0..9, but {folder / name} "
                "is not "
                f"({type(error).__name__}: {error}): download it again."
            ) from error
        images.append(batch)
        labels.append(targets)
    pixels = torch.from_numpy(np.concatenate(images))
    return Source(np.concatenate(labels), lambda chosen: pixels[torch.from_numpy(chosen)])


class _Bytes:
    """Stands in for a pickled numpy array and keeps its raw bytes, so that no file reaches numpy's own unpickling."""

    raw: bytes = b""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, _dtype, fortran_order, raw = state
        if fortran_order or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("the array is not C-ordered bytes")
        self.raw = raw


class _Dtype:
    def __setstate__(self, state: tuple) -> None:
        pass


def _uint8_dtype(name: object, *_: object) -> _Dtype:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"the array is {name!r} instead of uint8")
    return _Dtype()


def _latin1(text: str, encoding: object) -> bytes:  # how Python 3 writes bytes at pickle protocol 2
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    """Knows only the four names that the official files need; any other one, which could run code, is refused."""

    _KNOWN = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Bytes() for core in ("core", "_core")},
        ("numpy", "ndarray"): _Bytes,
        ("numpy", "dtype"): _uint8_dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 batch needs")
        return self._KNOWN[module, name]
