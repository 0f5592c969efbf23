"""Batch-norms that keep their statistics while a network is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor, nn

from ajpq.loaders import Batches, apart
from ajpq.objective import norms_of
from ajpq.training import recalibrate


class FrozenNorms:
    """A `change` of `training.fit`: in the last `share` of all steps batch-norms normalise by their own statistics, not
    by those of each batch, and learn scale and shift alone (Krishnamoorthi 2018, arXiv 1806.08342), so that weights
    are fitted to the network that will be used.

    Statistics are re-estimated on `norm_batches` of `batches` before, where there were steps without; 0 batches: they
    stay as they are.
    """

    def __init__(self, model: nn.Module, share: float, batches: Batches, norm_batches: int) -> None:
        self.model, self.share, self.batches, self.norm_batches = model, share, batches, norm_batches

    def __call__(self, step: int, steps: int) -> Sequence[Tensor]:
        first = round((1 - self.share) * steps)
        if 0 < step == first and self.norm_batches:
            recalibrate(self.model, islice(apart(self.batches), self.norm_batches))
        if step >= first:
            for norm in norms_of(self.model):
                norm.eval()
        return ()
