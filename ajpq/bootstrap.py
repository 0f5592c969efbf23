"""How much two networks differ on the same images, and what the images allow to say of it: the paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ajpq.errors import AjpqError
from ajpq.intervals import LEVEL

RESAMPLES = 10_000
CELLS = 2**22  # of a table of draws in memory: our choice
ROUNDING = 1e-6  # of metrics that were computed in float32


@dataclass(frozen=True)
class Paired:
    """A mean difference with its 95 % interval, None where a single block tells of none. blocks: how many were drawn
    from; the number of images where each counts by itself."""

    mean: float
    low: float | None
    high: float | None
    images: int
    blocks: int

    @property
    def word(self) -> str | None:
        """better, worse or no better, as differences of rounding are; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return "better" if self.low > ROUNDING else "worse" if self.high < -ROUNDING else "no better"


def paired(ours: ArrayLike, theirs: ArrayLike, blocks: ArrayLike | None = None, seed: int = 0) -> Paired:
    """Mean of ours - theirs over images, with the percentile interval of `RESAMPLES` bootstrap samples (Efron and
    Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).

    ours, theirs: (n,) what two networks reach on the same images. blocks: (n,) images of the same number are drawn
    together, as frames of one scene are (Davison and Hinkley 1997, Bootstrap Methods, section 3.8); None = every image
    by itself. The interval is too narrow where there are few blocks: with 12 it covers about 90 %, not 95 %. Raises
    AjpqError for other shapes, and where there is no image.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    blocks = np.arange(len(ours)) if blocks is None else np.asarray(blocks)
    if not len(ours) or not ours.shape == theirs.shape == blocks.shape == (len(ours),):
        raise AjpqError(
            f"a paired difference needs one value of each network and one block for each image, but there are "
            f"{ours.shape}, {theirs.shape} and {blocks.shape}; measure both on the same split"
        )
    change = ours - theirs  # (n,)
    _, place = np.unique(blocks, return_inverse=True)  # (n,)
    rows = np.stack([np.bincount(place, change), np.bincount(place)], axis=1)  # (B, 2): sum and size of every block
    mean, count = float(change.mean()), len(rows)
    if count < 2:
        return Paired(mean, None, None, len(change), count)
    # How often each kind of block is drawn is multinomial; of right or wrong there are but three kinds.
    kinds, many = np.unique(rows, axis=0, return_counts=True)  # (K, 2), (K,)
    random, step = np.random.default_rng(seed), max(1, CELLS // len(kinds))
    totals = np.concatenate(
        [
            random.multinomial(count, many / count, size=min(step, RESAMPLES - start)) @ kinds
            for start in range(0, RESAMPLES, step)
        ]
    )  # (RESAMPLES, 2)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Paired(mean, float(low), float(high), len(change), count)
