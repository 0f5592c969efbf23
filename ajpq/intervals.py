"""Means over seeds, differences of means, and what the 95 % interval of a difference allows to say.

A sample is a mapping seed -> value. What has no seed has one value, under None: it is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # of Student's distribution; scipy.stats takes a second to import

LEVEL = 0.95
Sample = Mapping[Hashable, float]


@dataclass(frozen=True)
class Estimate:
    """mean +- half of its 95 % interval; half is nan for a single value."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} +- {self.half:.4f}"


@dataclass(frozen=True)
class Difference:
    """A difference of two means +- half of its 95 % interval, and the method it comes from; half is nan where there are
    not enough seeds to tell, and 0 where neither side has a seed ("exact")."""

    mean: float
    half: float
    method: str

    @property
    def word(self) -> str | None:
        """better, worse or no better; None where there are not enough seeds to tell."""
        if math.isnan(self.half):
            return None
        if abs(self.mean) <= self.half:
            return "no better"
        return "better" if self.mean > 0 else "worse"

    def sentence(self, ours: str, theirs: str) -> str:
        if self.word is None:
            return f"`{ours}` against `{theirs}`: {self.mean:+.4f}, not enough seeds to tell"
        found = f"`{ours}` is {self.word} than `{theirs}`: {self.mean:+.4f}"
        return f"{found}, neither has a seed" if self.method == "exact" else f"{found} +- {self.half:.4f}"


def estimate(values: Sequence[float]) -> Estimate:
    """half = t * s / sqrt(n), t the 0.975 quantile of Student's distribution with n - 1 degrees of freedom."""
    column = np.asarray(values, float)
    if len(column) < 2:
        return Estimate(float(column.mean()), math.nan)
    error = column.std(ddof=1) / math.sqrt(len(column))
    return Estimate(float(column.mean()), float(stdtrit(len(column) - 1, (1 + LEVEL) / 2) * error))


def difference(ours: Sample, theirs: Sample) -> Difference:
    """Mean of ours - mean of theirs.

    Paired where both have the same seeds; one-sample where one side has no seed; Welch's for different seeds (Welch
    1947, with Satterthwaite's degrees of freedom).
    """
    a, b = (np.array(list(side.values()), float) for side in (ours, theirs))
    mean = float(a.mean() - b.mean())
    fixed = [set(side) == {None} for side in (ours, theirs)]
    if all(fixed):
        return Difference(mean, 0.0, "exact")
    if any(fixed):
        return Difference(mean, estimate(b if fixed[0] else a).half, "one-sample")
    if set(ours) == set(theirs):
        return Difference(mean, estimate([ours[seed] - theirs[seed] for seed in ours]).half, "paired")
    return Difference(mean, _welch(a, b), "Welch")


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    if min(len(a), len(b)) < 2:
        return math.nan
    squares = [float(side.var(ddof=1)) / len(side) for side in (a, b)]
    error = sum(squares)
    if not error:
        return 0.0
    freedom = error**2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, (a, b), strict=True))
    return float(stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(error))
