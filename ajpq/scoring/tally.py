"""How good outputs are: counted per batch, summed over batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ajpq.scoring.setting import Measured
from ajpq.tasks import Task

Tally = tuple[int, float, float, float]  # images, and the sums over them of quality, loss and divergence


def exact(outputs: Tensor) -> Tensor:
    """float64, on the CPU: sums over them do not depend on the number of batches or threads."""
    return outputs.detach().to("cpu", torch.float64)


def tally(task: Task, outputs: Tensor, targets: Tensor, original: Tensor) -> Tally:
    """outputs, original (N, ...), targets (N, ...); original: `exact` outputs of the uncompressed network."""
    found, targets = exact(outputs), targets.cpu()
    parts = task.quality(found, targets), task.losses(found, targets), task.divergences(found, original)
    return len(targets), *(float(part.sum()) for part in parts)


def summed(tallies: Iterable[Tally], whole: bool = True) -> Measured:
    images, quality, loss, divergence = (sum(column) for column in zip(*tallies, strict=True))
    return Measured(quality / images, images, whole, loss / images, divergence / images)
