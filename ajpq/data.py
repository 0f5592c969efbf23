"""Images as whole batches: scikit-learn's digits, CIFAR from disk, and the container for a user's own loaders.

Images stay uint8 in memory; a batch is one fancy index, one crop and one normalisation, never a loop over images. Four
splits have four purposes: `train` fits weights, `search` scores policies, `test` is reported, `calibration` sets
clipping and batch-norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ajpq.cifar_files import CIFAR10, CIFAR100, Kind, Source, fetch, open_cifar
from ajpq.epochs import batches_in, begun, restarted, seeded
from ajpq.errors import AjpqError, check_alike
from ajpq.loaders import Batches


@dataclass(frozen=True)
class Data:
    """The splits of one image classification task. Each can be iterated again and again; a torch DataLoader is one.

    train: shuffled and augmented, in a new order every epoch. search, test: fixed order, no augmentation, disjoint from
        the images of train. calibration: training images in fixed order, no augmentation. classes: their names, index =
        label. unlabelled: further images, of which nothing needs to be known; a compressed network is fine-tuned on
        what the original makes of them, too. Their labels are not read.
    """

    train: Batches
    search: Batches
    test: Batches
    calibration: Batches
    classes: tuple[str, ...]
    unlabelled: Batches | None = None


class ImageBatches:
    """Batches of normalised float32 images made from uint8 images in memory.

    images: uint8 (N, C, H, W). labels: int64 (N,). mean, std: per channel, in units of pixel / `scale`. shuffle: the
        seed of the order and of the augmentation, both drawn anew every epoch; None = fixed order, all images. A
        shuffled
    epoch of more than one batch drops its incomplete last one. pad: random shifts of up to `pad` pixels, black coming
    in. flip: left-right at random.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, *, mean: Sequence[float], std: Sequence[float],
        scale: float = 255.0, shuffle: int | None = None, pad: int = 0, flip: bool = False,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise AjpqError(f"`batch_size >= 1` must hold, but {batch_size=}: give the number of images per batch.")
        self.images, self.labels, self.batch_size, self.pad, self.flip = images, labels, batch_size, pad, flip
        self._mean = torch.tensor(mean).view(1, -1, 1, 1) * scale
        self._std = torch.tensor(std).view(1, -1, 1, 1) * scale
        self._epochs = seeded(shuffle)

    def part(self, chosen: Tensor) -> ImageBatches:
        """The same over some of the images: their numbers (n,)."""
        twin = copy.copy(self)
        twin.images, twin.labels = self.images[chosen], self.labels[chosen]
        twin._epochs = restarted(self._epochs)
        return twin

    def joined(self, other: ImageBatches) -> ImageBatches:
        """The same over the images of both; its epochs are this one's next. Raises AjpqError if these are normalised
        otherwise."""
        same = torch.equal(self._mean, other._mean) and torch.equal(self._std, other._std)
        check_alike(same, "normalised alike")
        twin = copy.copy(self)
        twin.images, twin.labels = (
            torch.cat(pair) for pair in ((self.images, other.images), (self.labels, other.labels))
        )
        return twin

    def __len__(self) -> int:
        return batches_in(len(self.images), self.batch_size, self._epochs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._epochs is None:
            for images, labels in zip(
                self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
            ):
                yield self._normalise(images), labels
            return
        epoch = begun(self._epochs)
        order = torch.randperm(len(self.images), generator=epoch)
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield self._normalise(self._augment(self.images[chosen], epoch)), self.labels[chosen]

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self._mean).div_(self._std)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, c, h, w = images.shape
        dy, dx = torch.randint(2 * self.pad + 1, (2, n, 1), generator=generator)  # (N, 1) each
        cols = torch.arange(w).expand(n, w)
        if self.flip:
            cols = torch.where(torch.rand(n, 1, generator=generator) < 0.5, cols, w - 1 - cols)
        rows, cols = torch.arange(h) + dy, cols + dx  # (N, H), (N, W)
        padded = F.pad(images, (self.pad,) * 4)
        return padded[
            torch.arange(n).view(n, 1, 1, 1),
            torch.arange(c).view(1, c, 1, 1),
            rows[:, None, :, None],
            cols[:, None, None, :],
        ]


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded permutation of all images whose every prefix holds the classes in (nearly) their proportions."""
    rng = np.random.default_rng(seed)
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((rng.random(len(labels)), quantile))


def digits(
    seed: int = 0, batch_size: int = 64, train: float = 0.6, search: float = 0.2, eval_batch_size: int = 100
) -> Data:
    """scikit-learn's bundled handwritten digits: 1,797 real images (1, 8, 8), ten classes, no download.

    train, search: fractions of all images; the rest is the test split. Training images are shifted by up to one pixel;
        up to 256 of them, unshifted, are the calibration split. Raises AjpqError for fractions that leave a split
        empty.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8), 0..16
    n_train, n_search = (round(f * len(images)) if 0 < f < 1 else 0 for f in (train, search))
    if not (n_train > 0 and n_search > 0 and n_train + n_search < len(images)):
        raise AjpqError(
            f"`train > 0`, `search > 0` and `train + search < 1` must hold for the digits splits, but {train=} "
            f"and {search=}: "
            "leave some of the images for each of train, search and test."
        )
    order = stratified_order(bunch.target, 0)
    if seed:  # draws train and search anew from what is left of the same test split
        rest = order[: n_train + n_search]
        order = np.concatenate([rest[stratified_order(bunch.target[rest], seed)], order[n_train + n_search :]])
    labels = torch.from_numpy(bunch.target).long()
    norm = {"scale": 16.0, "mean": (0.3053,), "std": (0.3760,)}

    def part(chosen: np.ndarray, size: int, **options) -> ImageBatches:
        return ImageBatches(images[chosen], labels[chosen], size, **norm, **options)

    return Data(
        train=part(order[:n_train], batch_size, shuffle=seed, pad=1),
        search=part(order[n_train : n_train + n_search], eval_batch_size),
        test=part(order[n_train + n_search :], eval_batch_size),
        calibration=part(order[: min(256, n_train)], eval_batch_size),
        classes=tuple(str(name) for name in bunch.target_names),
    )


def cifar10(
    root: str | Path, seed: int = 0, batch_size: int = 128, search_images: int = 5000, calibration_images: int = 1000,
    limit: int | None = None, eval_batch_size: int = 100, download: bool = False,
) -> Data:  # fmt: skip
    """CIFAR-10 (Krizhevsky 2009), images (3, 32, 32), from a folder on disk.

    root: `cifar-10-batches-py` (data_batch_1..5, test_batch), or an image folder `{train,test}/<class>/*.jpg|png`, or
        the folder that contains one of these. search_images: carved off the training part, stratified.
        calibration_images: at most so many training images. limit: at most so many images in each split, stratified,
        for quick runs. download: torchvision fetches the official batches into `root` first, unless they are there.
    Training images are shifted by up to four pixels and flipped at random. Raises AjpqError for a missing or empty
    folder, classes without images or that differ, and unreadable images.
    """
    return _cifar(CIFAR10, Path(root), seed, batch_size, search_images, calibration_images, limit, eval_batch_size,
                  download)  # fmt: skip


def cifar100(
    root: str | Path, seed: int = 0, batch_size: int = 128, search_images: int = 5000, calibration_images: int = 1000,
    limit: int | None = None, eval_batch_size: int = 100, download: bool = False,
) -> Data:  # fmt: skip
    """CIFAR-100 with its hundred fine labels; `cifar-100-python` (train, test, meta) or an image folder as `cifar10`,
    which explains the settings."""
    return _cifar(CIFAR100, Path(root), seed, batch_size, search_images, calibration_images, limit, eval_batch_size,
                  download)  # fmt: skip


def _cifar(
    kind: Kind, root: Path, seed: int, batch_size: int, search_images: int, calibration_images: int, limit: int | None,
    eval_batch_size: int, download: bool,
) -> Data:  # fmt: skip
    for name, value in {
        "search_images": search_images,
        "calibration_images": calibration_images,
        "limit": limit,
    }.items():
        if value is not None and value < 1:
            raise AjpqError(f"`{name} >= 1` must hold, but {name}={value}: give a number of images.")
    if download:
        fetch(kind, root)
    train, test, classes = open_cifar(kind, root)
    if search_images >= len(train.labels):
        raise AjpqError(
            f"`search_images < {len(train.labels)}` must hold for the training images of {root}, but "
            f"{search_images=}: leave some to train on."
        )
    order, test_order = stratified_order(train.labels, seed), stratified_order(test.labels, seed)
    search_order, train_order = order[:search_images][:limit], order[search_images:][:limit]

    def part(source: Source, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        return source.read(chosen), torch.from_numpy(source.labels[chosen])

    norm = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    images, labels = part(train, train_order)
    return Data(
        train=ImageBatches(images, labels, batch_size, **norm, shuffle=seed, pad=4, flip=True),
        search=ImageBatches(*part(train, search_order), eval_batch_size, **norm),
        test=ImageBatches(*part(test, np.sort(test_order[:limit])), eval_batch_size, **norm),
        calibration=ImageBatches(images[:calibration_images], labels[:calibration_images], eval_batch_size, **norm),
        classes=classes,
    )
