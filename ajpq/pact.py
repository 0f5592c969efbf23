"""PACT: activations with a learned clipping value instead of a learned step size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ajpq import quantize
from ajpq.layers import ActQuant, QuantLayer
from ajpq.quantize import FLOAT


class PactQuant(nn.Module):
    """The same values as an `ActQuant`, with the gradients of PACT (Choi et al. 2018, arXiv 1805.06085, eq. 3): the
    clipping value learns from what it clips only, and needs weight decay to come down (its section 3.1).

    It starts at the highest value of the `ActQuant` (the paper: at a large constant). Signed inputs, which the paper
    does not treat, have their lowest value in proportion.
    """

    parameter_kinds = {"clip": "decayed"}

    def __init__(self, act: ActQuant) -> None:
        super().__init__()
        self.bits, self.signed = act.bits, act.signed
        self.clip = nn.Parameter(act.scale.detach().abs() * self._top)  # ()

    @property
    def _top(self) -> int:
        return max(quantize.act_range(self.bits, self.signed)[1], 1)

    @property
    def scale(self) -> Tensor:
        """Step size, ()."""
        return self.clip.abs() / self._top

    def forward(self, x: Tensor) -> Tensor:
        return _Pact.apply(x, self.scale, self.bits, self.signed)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, clip={self.clip.item():.4g}"


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        scale = quantize.usable(scale)
        ctx.save_for_backward(x, scale)
        ctx.range = quantize.act_range(bits, signed)
        return quantize.fake_quantize_act(x, scale, bits, signed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        lo, hi = ctx.range
        t = x / scale
        ends = torch.where(t > hi, hi, torch.where(t < lo, lo, 0))  # d out / d scale
        return grad * ((t >= lo) & (t <= hi)), (grad * ends).sum(dtype=scale.dtype), None, None


def use_pact(student: nn.Module) -> None:
    """Give every quantized input of a student (from `compress`) a PACT clipping value, in place."""
    for layer in [module for module in student.modules() if isinstance(module, QuantLayer)]:
        if isinstance(layer.act, ActQuant) and layer.act.bits != FLOAT:
            layer.act = PactQuant(layer.act)
