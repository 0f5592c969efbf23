"""Step sizes that fit kernels: for each the one that (nearly) minimises its squared quantization error.

A step s gives the magnitudes w of a kernel the levels q; the best step for these levels is ``<w, q> / <q, q>`` and
leaves an error of ``<w, w> - <w, q>^2 / <q, q>``, so that the two products tell everything. For kernels of many weights
and few levels they come from the sorted magnitudes: what lies above the threshold between two levels is counted, and
its sum is a difference of prefix sums, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ajpq.quantize import FLOAT, grid

CLIPS = tuple(np.linspace(1.15, 0.2, 32))  # tried for the highest level, of the largest weight
SORTED = 32  # from this many weights per level on, counting in sorted magnitudes is faster than rounding them
ELEMENTS = 1 << 17  # of a temporary tensor, so that it stays in the cache
TINY = 1e-30

Products = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def fit_scale(weight: Tensor, bits: Tensor) -> Tensor:
    """weight (c_out, ...), bits (c_out,) -> step size of every kernel, float32 (c_out,).

    The highest level is put at 32 points from 1.15 to 0.2 of the largest weight; the step that fits the levels of the
    best of these, which 1 bit has in closed form (twice the mean magnitude), is fitted once more to its own. Kernels
    of 0 or 32 bits, which have none, get 1, those that are all zero one above 0.
    """
    magnitudes = weight.detach().float().reshape(len(weight), -1).abs()
    found = torch.ones(len(magnitudes), device=weight.device)
    for width in bits.unique().tolist():
        if 0 < width < FLOAT:
            kernels = (bits == width).nonzero()[:, 0]
            found[kernels] = _fit(magnitudes[kernels], *_levels(width))
    return found


def _levels(bits: int) -> tuple[int, float]:
    """Levels of one sign are ``offset, 1 + offset, .., top + offset``: -> top, offset."""
    _, top, offset = grid(torch.tensor([bits]))
    return int(top), offset.item()


def _fit(magnitudes: Tensor, top: int, offset: float) -> Tensor:
    weights = magnitudes.shape[1]
    counts = weights > SORTED * top
    products, elements = (_counted, max(len(CLIPS) * top, weights)) if counts else (_rounded, len(CLIPS) * weights)
    rows = max(1, ELEMENTS // elements)
    return torch.cat([_of_part(_sorted(part), top, offset, products) for part in magnitudes.split(rows)])


def _of_part(w: Tensor, top: int, offset: float, products: Products) -> Tensor:
    peak = torch.where(w[:, -1:] > 0, w[:, -1:], 1.0) / (top + offset)
    tried = peak * torch.tensor(CLIPS, dtype=w.dtype, device=w.device)
    cross, energy = products(w, tried, top, offset)
    gain = torch.where(energy > 0, cross.square() / energy.clamp(min=TINY), 0.0)
    step, exact = tried.gather(1, gain.argmax(1, keepdim=True)).double(), w.double()
    for _ in range(2):  # in float64: the same whatever kernels are fitted beside it
        cross, energy = _rounded(exact, step, top, offset)
        step = torch.where((cross > 0) & (energy > 0), cross / energy.clamp(min=TINY), peak)
    return step[:, 0].float()


def _sorted(w: Tensor) -> Tensor:
    """Rows in ascending order; numpy's sort is several times faster than torch's on a CPU."""
    return torch.from_numpy(np.sort(w.numpy(), axis=1)) if w.device.type == "cpu" else w.sort(dim=1).values


def _rounded(w: Tensor, steps: Tensor, top: int, offset: float) -> tuple[Tensor, Tensor]:
    """w (kernels, weights), steps (kernels, tried) -> <w, q>, <q, q>, each (kernels, tried).

    As sums, not as products of matrices, whose last bits depend on what else is in the batch.
    """
    q = w[:, None] / steps[:, :, None]
    q = q.sub_(offset).round_().clamp_(0, top).add_(offset)
    return (q * w[:, None]).sum(2), q.square_().sum(2)


def _counted(w: Tensor, steps: Tensor, top: int, offset: float) -> tuple[Tensor, Tensor]:
    """The same of ascending w: a weight above the threshold of level k adds 1 to q, and ``2 k - 1 + 2 offset`` to its
    square."""
    sums = torch.nn.functional.pad(w.double().cumsum(1), (1, 0))
    level = torch.arange(1, top + 1, device=w.device)
    thresholds = steps[:, :, None] * (level - 0.5 + offset)
    below = torch.searchsorted(w, thresholds.flatten(1))
    above = (sums[:, -1:] - sums.gather(1, below)).view(thresholds.shape)
    count = (w.shape[1] - below).view(thresholds.shape)
    cross = offset * sums[:, -1:] + above.sum(2)
    return cross, offset**2 * w.shape[1] + (count * (2 * level - 1 + 2 * offset)).sum(2).double()
