"""Rounding that compensates: what one weight loses is made good by those that are not rounded yet."""

from __future__ import annotations

import torch
from torch import Tensor

from ajpq import quantize
from ajpq.quantize import FLOAT

BLOCK = 128  # columns that are rounded before the others learn of their errors


@torch.no_grad()
def round_compensated(weight: Tensor, gram: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """Weights on their grids that, on inputs with the second moments `gram`, come closer to `weight` than the nearest.

    weight (groups, kernels, n); gram (groups, n, n), positive definite; bits and scale (groups * kernels,). Returns
    (groups, kernels, n). Inputs are taken one by one, those with the largest moment first; the error of each is spread
    over the rest in the least squares sense. Kernels of 32 bits stay as they are.

    Frantar et al., GPTQ (2022, arXiv 2210.17323), algorithm 1, after Optimal Brain Compression (2022, arXiv
    2208.11580), with a width for every kernel; the order is that of GPTQ's "act-order".
    """
    groups, kernels, n = weight.shape
    order = torch.argsort(gram.diagonal(dim1=1, dim2=2), dim=1, descending=True)  # (groups, n)
    rows = order[:, :, None].expand(-1, -1, n)
    gram = gram.gather(1, rows).gather(2, order[:, None, :].expand(-1, n, -1))
    w = weight.gather(2, order[:, None, :].expand(-1, kernels, -1)).to(gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)  # (groups, n, n)
    rounded, free = w.clone(), (bits == FLOAT).view(groups, kernels)
    lo, hi, offset = (t.view(groups, kernels) for t in quantize.grid(bits))
    step = quantize.usable(scale).view(groups, kernels)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.zeros_like(w[:, :, start:stop])
        for i in range(start, stop):
            column = w[:, :, i]  # (groups, kernels)
            nearest = torch.where(free, column, quantize.on_grid(column.float(), lo, hi, offset, step).to(w.dtype))
            rounded[:, :, i] = nearest
            error = (column - nearest) / upper[:, i, i, None]
            w[:, :, i + 1 : stop] -= error[:, :, None] * upper[:, i, None, i + 1 : stop]
            errors[:, :, i - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    back = torch.argsort(order, dim=1)
    return rounded.gather(2, back[:, None, :].expand(-1, kernels, -1)).to(weight.dtype)
