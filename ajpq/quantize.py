"""The one quantizer: search, fine-tuning and shipping all call these functions.

A kernel of b bits holds integers k and one scale s; its weights are ``(k + offset) * s``:

    b = 0           the kernel is pruned: all zero
    b = 1           k in {-1, 0},                offset 1/2: a real binary kernel, +-s/2
    b = 2, 3        k in {-2^(b-1), .., 2^(b-1)-1}, offset 1/2: 2^b levels, symmetric, no zero ("mid-rise")
    4 <= b <= 8     k in {-(2^(b-1)-1), .., 2^(b-1)-1}, offset 0: symmetric with zero ("mid-tread")
    b = 32          untouched float32

Mid-rise uses all 2^b levels; at 2 bits that is 4 levels instead of the 3 of a mid-tread grid (SAWB of Choi et al. 2019
uses the same 2-bit grid). ``2k+1`` fits int8, so every width runs in an int8 container with scale s/2 or s.
Activations are per-tensor uniform: unsigned where calibration saw no negative value, else signed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 32)  # bit-widths a kernel can have
FLOAT = 32
TINY = 1e-8  # least magnitude of a step size
MID_RISE = 3  # widths up to this one use the grid without zero


def grid(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bits (c_out,) -> lowest code, highest code, offset, each float32 (c_out,). 0 and 32 bits give a grid of zero."""
    b = bits.to(torch.float32)
    coded = (b >= 1) & (b < FLOAT)
    rise = coded & (b <= MID_RISE)
    half = torch.where(coded, 2.0 ** (b.clamp(max=8) - 1), torch.ones_like(b))
    return torch.where(rise, -half, 1 - half), half - 1, rise.to(torch.float32) / 2


def _per_kernel(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (weight.ndim - 1)))  # (c_out, 1, 1, 1)


def usable(scale: Tensor) -> Tensor:
    """A learned step size, kept away from zero: at least TINY in magnitude, with its sign and its gradient."""
    return torch.where(scale.abs() < TINY, torch.where(scale < 0, -TINY, TINY) + 0 * scale, scale)


def encode(weight: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes. weight (c_out, ...), bits, scale (c_out,) -> int8 (c_out, ...); 0 for kernels of 0 or 32 bits."""
    lo, hi, offset = (_per_kernel(t, weight) for t in grid(bits))
    return torch.round(torch.clamp(weight / _per_kernel(usable(scale), weight) - offset, lo, hi)).to(torch.int8)


def decode(codes: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """Weights of codes: ``(k + offset) * scale``, float32 (c_out, ...); kernels of 0 or 32 bits give 0."""
    coded = (bits > 0) & (bits < FLOAT)
    _, _, offset = grid(bits)
    values = (codes.to(torch.float32) + _per_kernel(offset, codes)) * _per_kernel(scale.to(torch.float32), codes)
    return torch.where(_per_kernel(coded, codes), values, torch.zeros_like(values))


def contain(codes: Tensor, bits: Tensor) -> Tensor:
    """The codes of every width on one grid through zero, int8: ``2 k + 1`` up to 3 bits, ``k`` above; weights are then
    these times `container_scale`."""
    rise = _per_kernel(grid(bits)[2] > 0, codes)
    return torch.where(rise, 2 * codes + 1, codes)


def container_scale(bits: Tensor, scale: Tensor) -> Tensor:
    """Step size of the codes that `contain` gives, float32 (c_out,): half of the scale up to 3 bits."""
    return torch.where(grid(bits)[2] > 0, scale / 2, scale)


class _RoundSTE(torch.autograd.Function):
    """round with the straight-through gradient (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _DampGrad(torch.autograd.Function):
    """x, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def fake_quantize(weight: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    """``decode(encode(weight))`` with a gradient: straight-through to the weights inside the grid, and to the scale the
    step-size gradient of LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3), damped by ``1 / sqrt(n * levels)`` (its
    section 2.2). 0 bits -> zero, 32 bits -> weight."""
    lo, hi, offset = (_per_kernel(t, weight) for t in grid(bits))
    damp = (weight[0].numel() * (hi + 1).clamp(min=1)).rsqrt()  # (c_out, 1, 1, 1)
    s = _DampGrad.apply(_per_kernel(usable(scale), weight), damp)
    codes = _RoundSTE.apply(torch.clamp(weight / s - offset, lo, hi))
    return torch.where(_per_kernel(bits == FLOAT, weight), weight, (codes + offset) * s)


def on_grid(weight: Tensor, lo: Tensor, hi: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """``decode(encode(weight))`` for a grid that is at hand, in the shape that these broadcast to."""
    return (torch.round(torch.clamp(weight / scale - offset, lo, hi)) + offset) * scale


def act_range(bits: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest activation code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _ActSTE(torch.autograd.Function):
    """Per-tensor fake quantization; straight-through to x, LSQ's step-size gradient to the scale, for which the result
    is kept, or made again."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, lo: int, hi: int, keep: bool) -> Tensor:
        out = _act(x, scale, lo, hi)
        ctx.save_for_backward(x, scale, *([out] if keep else []))
        ctx.range = lo, hi
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale, *kept = ctx.saved_tensors
        lo, hi = ctx.range
        to_x, to_scale = within(grad, x, scale, lo, hi), None
        if ctx.needs_input_grad[1]:  # d out / d scale: (out - x) / scale inside, out / scale outside
            out = kept[0] if kept else _act(x, scale, lo, hi)
            apart = out - x
            total = inner(to_x, apart)
            total = total + inner(torch.sub(grad, to_x, out=apart), out)
            to_scale = total / (scale * (x.numel() * max(hi, 1)) ** 0.5)
        return to_x, to_scale, None, None, None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of two tensors of one shape, ()."""
    if not _fast(a):
        return (a * b).sum()
    if a.ndim == 4 and not (a.is_contiguous() or b.is_contiguous()):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)  # channels last: copied below if it is not
    return torch.dot(a.reshape(-1), b.reshape(-1))


def within(grad: Tensor, x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """`grad` where ``lo <= x / scale <= hi``, 0 elsewhere: the straight-through gradient."""
    if _fast(x):
        return torch.ops.aten.hardtanh_backward(grad, x, *_just_outside(scale.item(), lo, hi))
    t = x / scale
    return grad * ((t >= lo) & (t <= hi))


def _just_outside(scale: float, lo: int, hi: int) -> tuple[float, float]:
    """The float32 numbers next to the x with ``lo <= x / scale <= hi`` in float32; next to 0 where an end is 0."""
    down, up = np.float32(-np.inf), np.float32(np.inf)
    with np.errstate(all="ignore"):
        step = np.float32(scale)
        low, high = (end * step if end else np.nextafter(np.float32(0), to) for end, to in ((lo, down), (hi, up)))
        while lo and low / step >= lo and low > down:
            low = np.nextafter(low, down)
        while hi and high / step <= hi and high < up:
            high = np.nextafter(high, up)
    return float(low), float(high)


def _fast(x: Tensor) -> bool:
    """Whether plain vectorized passes are quicker than torch's own quantizer and masks, as on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _act(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    if _fast(x):
        return _codes(x, scale, lo, hi).mul_(scale)
    return torch.fake_quantize_per_tensor_affine(x, scale, torch.zeros((), dtype=torch.int32, device=x.device), lo, hi)


def _codes(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    return (x * (1 / scale)).round_().clamp_(lo, hi)


def act_codes(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """The whole numbers of `fake_quantize_act`, as floats; bits below 32."""
    return _codes(x, usable(scale.abs()), *act_range(bits, signed))


def fake_quantize_act(x: Tensor, scale: Tensor, bits: int, signed: bool, keep: bool = True) -> Tensor:
    """Activations of any shape on ``scale * {lo..hi}``; scale is a scalar tensor. 32 bits -> x itself. keep: whether
    the result stays as it is until the gradient; false where somebody may overwrite it, which takes longer."""
    if bits == FLOAT:
        return x
    lo, hi = act_range(bits, signed)
    scale = usable(scale.abs())
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _ActSTE.apply(x, scale, lo, hi, keep)
    return _act(x, scale, lo, hi)
