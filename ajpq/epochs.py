"""The order of images in loaders whose epochs are seeded, and how any loader goes on after an interrupt.

`epochs`: the generator that a loader holds; None = fixed order, all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ajpq.errors import AjpqError

# Attributes of loaders, samplers and data sets.
_PARTS = ("sampler", "batch_sampler", "dataset", "labelled", "unlabelled")


def seeded(shuffle: int | None) -> torch.Generator | None:
    return None if shuffle is None else torch.Generator().manual_seed(shuffle)


def restarted(epochs: torch.Generator | None) -> torch.Generator | None:
    """A generator of the same seed, at its beginning."""
    return None if epochs is None else torch.Generator().manual_seed(epochs.initial_seed())


def batches_in(images: int, batch_size: int, epochs: torch.Generator | None) -> int:
    """Batches of an epoch: a shuffled one of more than one batch drops its incomplete last one."""
    whole, rest = divmod(images, batch_size)
    return whole + (rest > 0 and (epochs is None or whole == 0))


def begun(epochs: torch.Generator) -> torch.Generator:
    """The generator of the next epoch: its own, so that one that is abandoned half-way does not change the next."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=epochs)))


def skip(batches: Iterable, epochs: int) -> None:
    """Begin so many epochs and leave them: the next one is that which a training of that length would see."""
    for _ in range(epochs):
        next(iter(batches), None)


def reseed(batches: Iterable, seed: int) -> None:
    """Give a fresh loader the orders of a seed: other ones for every other seed. A loader that hides its generators is
    begun `seed` % 1000 times; a DataLoader without one draws from torch's own, whose state is the caller's business."""
    for part, _ in _loaders(batches):
        generators = _generators(part)
        for generator in generators:
            both = np.random.SeedSequence([generator.initial_seed(), seed])
            generator.manual_seed(int(both.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        if not generators and not isinstance(part, DataLoader):
            skip(part, seed % 1000)


def orders_of(batches: Iterable) -> list[Tensor]:
    """What the next epoch's order depends on, for `go_on`: the states of the random generators that a loader holds. A
    DataLoader without one draws from torch's own, whose state is the caller's business."""
    return [generator.get_state() for generator in _generators(batches)]


def go_on(batches: Iterable, orders: Sequence[Tensor], epochs: int) -> None:
    """Let a fresh loader continue where another one like it was.

    orders: `orders_of` the other. epochs: how many that one had begun; a loader that hides its generators is begun as
    often. Raises AjpqError for a loader with more or fewer generators.
    """
    generators = _generators(batches)
    if len(generators) != len(orders):
        raise AjpqError(
            "a training can be continued only with the images that it had, but what was kept has the state of "
            f"{len(orders)} generators and its batches have {len(generators)}; give the loader that it had, or begin "
            "again"
        )
    for part, begun_in_an_epoch in _loaders(batches):
        if not _generators(part) and not isinstance(part, DataLoader):
            skip(part, epochs * begun_in_an_epoch)
    for generator, order in zip(generators, orders, strict=True):
        generator.set_state(order)


def _loaders(batches: Iterable) -> list[tuple[Iterable, int]]:
    """The loaders that one is made of (`data.Beside`, of two), and how often an epoch begins each of them."""
    if not hasattr(batches, "unlabelled"):
        return [(batches, 1)]
    return [(batches.labelled, 1), (batches.unlabelled, batches.turns)]


def _generators(batches: Iterable) -> list[torch.Generator]:
    """Those that a loader, its samplers and its data sets hold as attributes, each once, in a fixed order."""
    found: list[torch.Generator] = []
    waiting, seen = [batches], set()
    while waiting:
        part = waiting.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, torch.Generator):
                found += [value] if not any(value is other for other in found) else []
            elif name in _PARTS:
                waiting.append(value)
            elif name == "datasets":
                waiting += value
    return found
