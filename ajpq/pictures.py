"""Images of any size on disk: decoded when they are asked for, kept in memory up to a cap, batched by worker processes.

An image that cannot be read is left out of its batch, counted and named; it is fatal where there are many.
"""

from __future__ import annotations

import copy
import mmap
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ajpq.epochs import batches_in, begun, restarted, seeded
from ajpq.errors import AjpqError, check_alike, check_counts
from ajpq.rgb import rgb

UNREADABLE = 0.01  # of the images, at most
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def pictures_under(
    folders: str | Path | Sequence[str | Path], search: Iterable[str | Path], test: Iterable[str | Path]
) -> list[Path]:
    """The picture files of folders and of all folders in them but hidden ones and links, each once, in the order of
    their paths, without those of the search split, whose files are `search`. Raises AjpqError for a folder without any,
    and for one that has pictures of the test split, whose files are `test`."""
    given = [folders] if isinstance(folders, str | Path) else folders
    if (
        not isinstance(given, Sequence)
        or not given
        or not all(isinstance(one, str | Path) and str(one) for one in given)
    ):
        raise AjpqError(
            f"data.unlabelled must be a folder of pictures, or a list of such, but it is {folders!r}; name one, or "
            "write data.unlabelled=null"
        )
    held, found = {Path(path).resolve() for path in test}, {}
    for folder in map(Path, given):
        paths = [path for path in sorted(folder.rglob("*")) if is_picture(path) and path.is_file()]
        here = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
        if not here:
            raise AjpqError(
                "data.unlabelled must be a folder of pictures, or a list of such, but there are none "
                f"({', '.join(sorted(SUFFIXES))}) in {folder}; set it, or data.unlabelled=null"
            )
        for path in here:
            real = path.resolve()
            if real in held:
                raise AjpqError(
                    f"nothing may be learned from the test split, but data.unlabelled has its picture {path}; give "
                    "folders without the pictures of the test split"
                )
            found.setdefault(real, path)
    for path in search:
        found.pop(Path(path).resolve(), None)
    return list(found.values())


class Cache:
    """uint8 images by number, shared by all worker processes that are forked from here.

    images: how many numbers there are. cap: bytes at most; memory is taken as images come in, and what does not fit is
    not kept. Raises AjpqError if the machine cannot have that much.
    """

    def __init__(self, images: int, cap: int) -> None:
        self._cap, self._lock = cap, multiprocessing.Lock()
        # Anonymous shared memory: /dev/shm, where torch would put it, is small in many containers.
        try:
            self._pixels = np.frombuffer(mmap.mmap(-1, max(cap, 1)), np.uint8)
        except (OSError, OverflowError) as error:
            raise AjpqError(
                f"this machine must have the memory that data.cache_bytes allows, but {cap} bytes it cannot give "
                f"({error}); lower it: images beyond it are read anew in every epoch"
            ) from error
        self._table = np.frombuffer(mmap.mmap(-1, 32 * (images + 1)), np.int64).reshape(-1, 4)  # there, start, H, W
        self._used = self._table[-1]  # the row after the last image: bytes in use

    def get(self, number: int) -> Tensor | None:
        with self._lock:
            there, start, h, w = self._table[number].tolist()
        return torch.from_numpy(self._pixels[start : start + 3 * h * w].reshape(3, h, w)) if there else None

    def put(self, number: int, image: Tensor) -> None:
        """Keep an image (3, H, W) if it fits."""
        with self._lock:
            start = int(self._used[0])
            if self._table[number, 0] or start + image.numel() > self._cap:
                return
            self._pixels[start : start + image.numel()] = image.numpy().reshape(-1)
            self._table[number] = (1, start, *image.shape[1:])
            self._used[0] = start + image.numel()


class Pictures:
    """The images of one data set. paths: (N,) files. targets: (N, ...), what belongs to each. cache_bytes: of decoded
    pixels kept in memory, at most. ready: what is done to an image before it is kept; None = nothing.

    `unreadable` holds the numbers of those that could not be read so far.
    """

    def __init__(
        self, paths: Sequence[Path], targets: Tensor, cache_bytes: int,
        ready: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:  # fmt: skip
        self.paths, self.targets, self._ready = np.array([str(path) for path in paths]), targets, ready
        self.unreadable: set[int] = set()
        self._told = 0
        self._cache = Cache(len(paths), cache_bytes)

    def __deepcopy__(self, memo: dict) -> Pictures:
        """Itself: copies of a loader read the same files and share what is in memory."""
        return self

    def size(self, number: int) -> tuple[int, int] | None:
        """Width and height in the file, pixels, or None if its header cannot be read; no pixel is decoded."""
        try:
            with Image.open(self.paths[number]) as file:
                return file.size
        except Exception:  # a damaged file can fail in any way
            return None

    def read(self, number: int) -> Tensor | None:
        """uint8 (3, H, W), or None if the file cannot be read."""
        image = self._cache.get(number)
        if image is None:
            try:
                with Image.open(self.paths[number]) as file:
                    whole = rgb(file)
                    image = functional.pil_to_tensor(whole if self._ready is None else self._ready(whole))
            except Exception:  # a damaged file can fail in any way
                return None
            self._cache.put(number, image)
        return image

    def batches(
        self, keys: Sequence[Sequence[tuple[int, int | None]]], transform: Callable[[Tensor], Tensor], workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each list of (number, seed of `transform` or None): uint8 images (n, 3, H, W) and their numbers (n,).

        workers: processes that decode and transform; 0 = this one. Images that cannot be read are left out and told.
        """
        loader = DataLoader(
            _Views(self, transform), batch_sampler=keys, collate_fn=_together, num_workers=workers,
            multiprocessing_context="fork" if workers else None, generator=torch.Generator(),
        )  # fmt: skip
        try:
            for images, numbers, missed in loader:
                self.miss(missed)
                if len(numbers):
                    yield images, numbers
        except GeneratorExit:  # an epoch that is left half-way
            self.tell()
            raise
        self.tell()

    def check(self) -> list[tuple[int, int] | None]:
        """Open all files, decoding no pixel: the `size` of each. Tells which cannot be read; raises AjpqError if there
        are too many."""
        sizes = [self.size(number) for number in range(len(self.paths))]
        self.miss([number for number, found in enumerate(sizes) if found is None])
        self.tell()
        return sizes

    def miss(self, numbers: Sequence[int]) -> None:
        """Note images that could not be read. Raises AjpqError if there are too many."""
        self.unreadable.update(numbers)
        if len(self.unreadable) > UNREADABLE * len(self.paths):
            raise AjpqError(
                f"at most {UNREADABLE:.0%} of the images may be unreadable, but {self._names()}; restore them or take "
                "them out of the folder"
            )

    def tell(self) -> None:
        """Warn of images that could not be read, if there are new ones."""
        if len(self.unreadable) > self._told:
            self._told = len(self.unreadable)
            warnings.warn(f"unreadable images are left out: {self._names()}", stacklevel=3)

    def _names(self) -> str:
        first = ", ".join(self.paths[sorted(self.unreadable)[:3]])
        more = f" and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
        return f"{len(self.unreadable)} of {len(self.paths)} cannot be read: {first}{more}"


class PartOfPictures:
    """What loaders of some of the pictures have in common.

    images: the numbers (N,) of those that are here. shuffle: the seed of the order and of the augmentation, both drawn
    anew every epoch; None = fixed order, all images. A shuffled epoch of more than one batch drops its incomplete last
    one. workers: processes that read; 0 = this one. The batches are the same for every number of workers.
    """

    def __init__(
        self, pictures: Pictures, images: Tensor, batch_size: int, shuffle: int | None = None, workers: int = 0
    ) -> None:
        check_counts(1, batch_size=batch_size)
        self.pictures, self.images, self.batch_size, self.workers = pictures, images, batch_size, workers
        self._epochs = seeded(shuffle)

    def part(self, chosen: Tensor) -> Self:
        """The same over some of the images: their places (n,) in `images`."""
        twin = copy.copy(self)
        twin.images = self.images[chosen]
        twin._epochs = restarted(self._epochs)
        return twin

    def joined(self, other: Self) -> Self:
        """The same over the images of both; its epochs are this one's next. Raises AjpqError if these are numbers of
        other pictures."""
        check_alike(self.pictures is other.pictures, "of one set of pictures")
        twin = copy.copy(self)
        twin.images = torch.cat([self.images, other.images])
        return twin

    def over(self, pictures: Pictures) -> Self:
        """The same over all of other pictures."""
        twin = self.part(torch.arange(0))
        twin.pictures, twin.images = pictures, torch.arange(len(pictures.paths))
        return twin

    def __len__(self) -> int:
        return batches_in(len(self.images), self.batch_size, self._epochs)

    def keys(self) -> list[list[tuple[int, int | None]]]:
        """The number of every picture of the next epoch's batches, and the seed of its augmentation or None."""
        if self._epochs is None:
            keys = [(number, None) for number in self.images.tolist()]
        else:
            epoch = begun(self._epochs)
            order = self.images[torch.randperm(len(self.images), generator=epoch)].tolist()
            seeds = torch.randint(2**62, (len(order),), generator=epoch).tolist()
            keys = list(zip(order, seeds, strict=True))
        return [keys[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]


class PictureBatches(PartOfPictures):
    """Batches of normalised float32 images (n, 3, size, size) and labels (n,).

    transform: of torchvision.transforms.v2, uint8 (3, H, W) -> uint8 (3, size, size). mean, std: per channel, of
    pixel / 255.
    """

    def __init__(
        self, pictures: Pictures, images: Tensor, batch_size: int, transform: v2.Transform, *,
        mean: Sequence[float], std: Sequence[float], shuffle: int | None = None, workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(pictures, images, batch_size, shuffle, workers)
        self.transform, self.mean, self.std = transform, list(mean), list(std)

    @property
    def labels(self) -> Tensor:
        return self.pictures.targets[self.images]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, numbers in self.pictures.batches(self.keys(), self.transform, self.workers):
            floats = functional.to_dtype(images, torch.float32, scale=True)
            yield functional.normalize(floats, self.mean, self.std, inplace=True), self.pictures.targets[numbers]


class _Views(Dataset):
    """(number, seed of the augmentation or None) -> the number, and the transformed image or None."""

    def __init__(self, pictures: Pictures, transform: Callable[[Tensor], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[int, Tensor | None]:
        number, seed = key
        image = self.pictures.read(number)
        if image is None:
            return number, None
        if seed is None:
            return number, self.transform(image)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.default_generator.manual_seed(seed)
            return number, self.transform(image)


def _together(items: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor, list[int]]:
    """uint8 (n, 3, H, W), their numbers (n,), and the numbers of those that could not be read."""
    found = [(number, image) for number, image in items if image is not None]
    # Contiguous, as the cache keeps them: the layout of a batch must not depend on what has been read before.
    images = (
        torch.stack([image for _, image in found]).contiguous() if found else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    )
    missed = [number for number, image in items if image is None]
    return images, torch.tensor([number for number, _ in found], dtype=torch.int64), missed
