"""What can be done with batches of any kind: a part of them, two parts, two made one, two side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from ajpq.errors import AjpqError

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) float32, labels (N,) int64


def check_batches(*, may_be_empty: Collection[str] = (), **splits: Batches) -> None:
    """Raise AjpqError for a split, given by its name, that can be gone through only once, or holds nothing and must."""
    for name, batches in splits.items():
        if not isinstance(batches, Iterable):
            raise AjpqError(
                f"the {name} split must be batches (images, labels), but it is {type(batches).__name__}; pass a "
                "DataLoader or a list"
            )
        if isinstance(batches, Iterator):
            raise AjpqError(
                f"the {name} split is read more than once, but {type(batches).__name__} can be gone through only once; "
                "pass the DataLoader itself, or a list of its batches"
            )
        try:
            empty = isinstance(batches, Sized) and not len(batches)
        except TypeError:  # a DataLoader over a stream
            empty = False
        if empty and name not in may_be_empty:
            raise AjpqError(f"the {name} split must hold images, but it has no batch; check the data and its fractions")


def take(batches: Batches, images: int | None) -> Batches:
    """The first whole batches that together hold `images` images, kept in memory; `batches` itself for None."""
    if images is None:
        return batches
    kept, seen = [], 0
    for batch in batches:
        if seen >= images:
            break
        kept.append(batch)
        seen += len(batch[0])
    return kept


def apart(batches: Batches) -> Batches:
    """The same batches, to be gone through while somebody else does: a DataLoader with persistent workers has one pass
    at a time, which every `iter` begins anew."""
    if not isinstance(batches, DataLoader) or not batches.persistent_workers:
        return batches
    twin = copy.copy(batches)
    twin._iterator = None  # workers of its own
    return twin


def divide(batches: Batches, share: float, seed: int) -> tuple[Batches, Batches]:
    """Two loaders like `batches` over disjoint images; the first has `share` of them, drawn by `seed`.

    Divides DataLoaders and what has `images` and `part(numbers)`, as `ImageBatches`, by image, lists by batch. Raises
    AjpqError for other loaders, and where a part would be empty.
    """
    in_memory = hasattr(batches, "part") and hasattr(batches, "images")
    by_image = in_memory or isinstance(batches, DataLoader)
    if not by_image and not isinstance(batches, Sequence):
        raise AjpqError(
            f"training images can be divided in ImageBatches, a DataLoader or a list of batches, but these are "
            f"{type(batches).__name__}; pass one of those"
        )
    if isinstance(batches, DataLoader):
        _check_order(batches, "divided")
    whole = batches.images if in_memory else batches.dataset if by_image else batches
    count = round(share * len(whole))
    if not 0 < count < len(whole):
        raise AjpqError(
            f"both parts of the training images must have some, but {share=} of {len(whole)} "
            f"{'images' if by_image else 'batches'} leaves one empty; give more images or another share"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return _part(batches, order[:count]), _part(batches, order[count:])


def _check_order(loader: DataLoader, what: str) -> None:
    """Whether it yields all of its dataset: a sampler may leave out what is to be held out."""
    if not isinstance(loader.dataset, Sized):
        raise AjpqError(f"images can be {what} where their number is known, but this dataset is a stream")
    plain = type(loader.sampler) in (RandomSampler, SequentialSampler)
    plain = plain and not getattr(loader.sampler, "replacement", False)
    if not plain or loader.batch_size is None or len(loader.sampler) != len(loader.dataset):
        raise AjpqError(
            f"images can be {what} in a DataLoader that yields its whole dataset in batches, but this one has "
            f"a sampler of its own ({type(loader.sampler if loader.batch_size else loader.batch_sampler).__name__}); "
            "wrap the images that it draws in torch.utils.data.Subset and shuffle those"
        )


def _part(batches: Batches, chosen: Tensor) -> Batches:
    if hasattr(batches, "part"):
        return batches.part(chosen)
    if isinstance(batches, DataLoader):
        return _like(batches, Subset(batches.dataset, chosen.tolist()))
    return [batches[i] for i in chosen.tolist()]


def _like(loader: DataLoader, dataset: Dataset, generator: torch.Generator | None = None) -> DataLoader:
    return DataLoader(
        dataset, loader.batch_size, shuffle=isinstance(loader.sampler, RandomSampler), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, drop_last=loader.drop_last, generator=generator,
        timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers, multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip


def join(batches: Batches, others: Batches) -> Batches:
    """A loader like `batches`, of its batch size, order and augmentation, over the images of both.

    Joins two loaders of one kind: those that have `joined(other)`, as `ImageBatches`, DataLoaders (the images of the
    other come as its data set gives them), and lists, batch by batch. Raises AjpqError for others.
    """
    if hasattr(batches, "joined") and type(batches) is type(others):
        return batches.joined(others)
    if isinstance(batches, DataLoader) and isinstance(others, DataLoader):
        for loader in (batches, others):
            _check_order(loader, "joined")
        orders = batches.generator or getattr(batches.sampler, "generator", None)
        return _like(batches, ConcatDataset([batches.dataset, others.dataset]), orders)
    if isinstance(batches, Sequence) and isinstance(others, Sequence):
        return [*batches, *others]
    raise AjpqError(
        f"images of two splits can be joined in two ImageBatches, DataLoaders or lists of batches, but these are "
        f"{type(batches).__name__} and {type(others).__name__}; pass two of a kind"
    )


class Beside:
    """Batches (x, y, u) of an epoch of `labelled`, with the images u of the next batch of `unlabelled` in each; these
    begin anew with every epoch, and whenever they are at their end. Raises AjpqError where there are none."""

    def __init__(self, labelled: Batches, unlabelled: Batches) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __len__(self) -> int:
        return len(self.labelled)

    @property
    def turns(self) -> int:
        """How often an epoch begins `unlabelled`; its length, where it has one, tells."""
        both = [len(part) if isinstance(part, Sized) else 0 for part in (self.labelled, self.unlabelled)]
        return math.ceil(both[0] / both[1]) if all(both) else 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        more = iter(self.unlabelled)
        for x, y, *_ in self.labelled:
            batch = next(more, None)
            if batch is None:
                more = iter(self.unlabelled)
                batch = next(more, None)
            if batch is None:
                raise AjpqError(
                    "images without labels must be at hand in every epoch, but there is none: give batches that can be "
                    "iterated again"
                )
            yield x, y, batch[0] if isinstance(batch, Sequence) else batch
