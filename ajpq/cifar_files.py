"""CIFAR-10 and CIFAR-100 on disk: the official Python batches, read without running their pickles, or a folder of
images per class.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ajpq.errors import AjpqError
from ajpq.rgb import rgb

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Kind:
    """What the official batches of a data set look like. train, test: file names. labels: the key of the labels.
    classes: their number. names: of the classes, or the file and the key that hold them."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    classes: int
    names: tuple[str, ...] | tuple[str, str]


CIFAR10 = Kind(
    "CIFAR-10", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "labels", 10, CIFAR10_CLASSES
)
CIFAR100 = Kind("CIFAR-100", ("train",), ("test",), "fine_labels", 100, ("meta", "fine_label_names"))


@dataclass(frozen=True)
class Source:
    """One part of the data set on disk. labels: int64 (N,). read: indices (n,) -> uint8 images (n, 3, 32, 32)."""

    labels: np.ndarray
    read: Callable[[np.ndarray], Tensor]


def fetch(kind: Kind, root: Path) -> None:
    """Have torchvision download the official batches into `root`, unless they are there; AjpqError if it cannot."""
    from torchvision import datasets

    try:
        getattr(datasets, kind.name.replace("-", ""))(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise AjpqError(
            f"{kind.name} must be fetched for data.download=true, but: {error}; fetch it elsewhere and set data.root"
        ) from error


def open_cifar(kind: Kind, root: Path) -> tuple[Source, Source, tuple[str, ...]]:
    """(train, test, classes) of the one data set in `root` or in a folder directly below it."""
    if not root.is_dir():
        raise AjpqError(f"The {kind.name} root must be an existing folder, but {root} is not one: check `data.root`.")
    here = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    batches = [p for p in here if any((p / name).is_file() for name in kind.train)]
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
        files = f"{kind.train[0]}..{len(kind.train)}" if len(kind.train) > 1 else kind.train[0]
        raise AjpqError(
            f"The {kind.name} root must hold one data set, {files} with {kind.test[0]} or "
            "{train,test}/<class>/*.jpg|png, "
            f"but {root} {what}: point `data.root` at the data set's own folder."
        )
    if found[0] in batches:
        train, test = (_python_batches(found[0], names, kind) for names in (kind.train, kind.test))
        return train, test, _class_names(found[0], kind)
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
                return np.asarray(rgb(image))
            size = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise AjpqError(
            f"Every image must be a readable JPEG or PNG file, but {path} is not ({error}): restore or remove it."
        ) from error
    raise AjpqError(f"Every image must be 32x32 pixels, but {path} is {size[0]}x{size[1]}: resize or remove it.")


def _python_batches(folder: Path, names: tuple[str, ...], kind: Kind) -> Source:
    """The official batches: pickled dictionaries of `data`, uint8 (n, 3072), and n integers below `kind.classes`."""
    images, labels = [], []
    for name in names:
        try:
            record = _unpickled(folder / name)
            batch = np.frombuffer(record["data"].raw, np.uint8).reshape(-1, 3, 32, 32)
            targets = np.array(record[kind.labels], dtype=np.int64)
            if (
                targets.shape != batch.shape[:1]
                or targets.size == 0
                or targets.min() < 0
                or targets.max() >= kind.classes
            ):
                raise ValueError(f"{len(batch)} images with labels of shape {targets.shape}")
        except Exception as error:  # a damaged pickle can fail in any way
            raise AjpqError(
                f"A {kind.name} batch must be a readable pickle of uint8 images and labels 0..{kind.classes - 1}, but "
                f"{folder / name} "
                "is not "
                f"({type(error).__name__}: {error}): download it again."
            ) from error
        images.append(batch)
        labels.append(targets)
    pixels = torch.from_numpy(np.concatenate(images))
    return Source(np.concatenate(labels), lambda chosen: pixels[torch.from_numpy(chosen)])


def _class_names(folder: Path, kind: Kind) -> tuple[str, ...]:
    if len(kind.names) == kind.classes:
        return kind.names
    file, key = kind.names
    try:
        names = tuple(
            name.decode() if isinstance(name, bytes) else str(name) for name in _unpickled(folder / file)[key]
        )
        if len(names) != kind.classes:
            raise ValueError(f"{len(names)} names")
    except Exception as error:  # a damaged pickle can fail in any way
        raise AjpqError(
            f"{folder / file} must be a readable pickle with {kind.classes} class names in {key}, but is not "
            f"({type(error).__name__}: {error}): download it again."
        ) from error
    return names


def _unpickled(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        record = _CifarUnpickler(file, encoding="bytes").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in record.items()}


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
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch needs")
        return self._KNOWN[module, name]
