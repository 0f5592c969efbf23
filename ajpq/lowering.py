"""Progressive lowering of widths: kernels begin a training wider than their policy says and get there in steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ajpq.layers import QuantLayer
from ajpq.step_sizes import fit_scale

_WIDEST = 8


class Lowering:
    """Every kernel of 1 to 7 bits gets up to `lift` bits more (8 at most), one bit less after each of `lift` equal
    parts of the first `share` of all steps, and after these the width that it had when this was made (our choice;
    Zhuang et al. 2018, arXiv 1711.00205, lower whole networks: 32, 16, 4, 2). A kernel whose width changes has its
    step size fitted anew.
    """

    def __init__(self, student: nn.Module, share: float, lift: int) -> None:
        self.share, self.lift = share, lift
        layers = [module for module in student.modules() if isinstance(module, QuantLayer)]
        self._layers = [(layer, layer.bits.clone()) for layer in layers]

    def __call__(self, step: int, steps: int) -> list[Tensor]:
        """Set the widths for `step`, counted from 0; returns the step sizes of layers whose widths changed."""
        span = round(self.share * steps)
        return self._set(self.lift - self.lift * step // span if step < span else 0)

    def finish(self) -> None:
        """Set the final widths."""
        self._set(0)

    @torch.no_grad()
    def _set(self, lift: int) -> list[Tensor]:
        found = []
        for layer, final in self._layers:
            bits = torch.where(final < _WIDEST, (final + lift).clamp(max=_WIDEST), final)
            changed = bits != layer.bits
            if changed.any():
                layer.bits.copy_(bits)
                layer.scale.copy_(torch.where(changed, fit_scale(layer.weight, bits), layer.scale))
                found.append(layer.scale)
        return found
