"""Quantization-aware fine-tuning: the compressed network learns to live with its widths, then becomes final."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from torch import fx, nn

from ajpq.compression import freeze
from ajpq.data import Batches
from ajpq.training import fit, recalibrate


def finetune(
    student: fx.GraphModule,
    train: Batches,
    *,
    epochs: int = 10,
    lr: float = 0.02,
    teacher: nn.Module | None = None,
    norm_batches: int = 100,
    on_epoch: Callable[[int, dict], None] | None = None,
    seed: int = 0,
    **training,
) -> fx.GraphModule:
    """Train `student` (from `compress`) in place, straight-through, and return the finished network, a new module.

    train: batches (x, y), augmented or not.
    teacher: the uncompressed network, for distillation.
    norm_batches: batch-norms are re-estimated on so many batches before the first and after the last step.
    training: further keywords of `training.fit`. epochs=0 only re-estimates and finishes.
    """
    recalibrate(student, islice(train, norm_batches))
    if epochs:
        fit(student, train, epochs=epochs, lr=lr, teacher=teacher, on_epoch=on_epoch, seed=seed, **training)
        recalibrate(student, islice(train, norm_batches))
    return freeze(student)
