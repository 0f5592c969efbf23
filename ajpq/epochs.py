"""The order of images in loaders whose epochs are seeded. `epochs`: the generator that a loader holds; None = fixed
order, all images."""

from __future__ import annotations

import torch


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
