"""The layers a compressed network is made of: `QuantLayer` while it learns, `FrozenLayer` once it is finished.

Both stand for one convolution or linear layer whose kernels have widths of their own. A `FrozenLayer` holds exactly
what the packed file holds (integers, a float16 scale and bias per kernel), so a network that was shipped and loaded
again computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq import quantize
from ajpq.errors import AjpqError
from ajpq.quantize import FLOAT


@dataclass(frozen=True)
class Geometry:
    """How weights meet the input. `conv` False: a linear layer, and the other fields are ignored."""

    conv: bool
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> Geometry:
        if isinstance(module, nn.Linear):
            return cls(conv=False)
        return cls(True, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.conv:
            return F.linear(x, weight, bias)
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self.pads(weight.shape[2:]), mode=self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def pads(self, kernel: Sequence[int]) -> list[int]:
        """What is put around the images of a convolution: left, right, top, bottom."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            return [p for t in reversed(total) for p in (t // 2, t - t // 2)]
        top, left = (0, 0) if self.padding == "valid" else self.padding
        return [left, left, top, top]


class ActQuant(nn.Module):
    """Per-tensor fake quantization of a layer's input. `bits` 32 passes the input on.

    The step size is a parameter (learned by fine-tuning, LSQ) or, in a finished network, a buffer. inner: whether a
    layer of ours alone reads what it gives; activations, which others may read, may overwrite it.
    """

    parameter_kinds = {"scale": "steps"}  # for `ajpq.optimizer`

    def __init__(self, bits: int, signed: bool, scale: Tensor, learned: bool, inner: bool = True) -> None:
        super().__init__()
        self.bits, self.signed, self.inner = bits, signed, inner
        scale = scale.detach().to(torch.float32).reshape(())
        if learned and bits != FLOAT:
            self.scale = nn.Parameter(scale.clone())
        else:
            self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return quantize.fake_quantize_act(x, self.scale, self.bits, self.signed, keep=self.inner)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, scale={self.scale.item():.4g}"


class QuantLayer(nn.Module):
    """A layer that learns while quantized: float weights, a learned scale per kernel, a learned activation step."""

    parameter_kinds = {"scale": "steps"}

    def __init__(
        self, weight: Tensor, bias: Tensor | None, bits: Tensor, scale: Tensor, geometry: Geometry, act: ActQuant
    ) -> None:
        super().__init__()
        self.geometry, self.act = geometry, act
        self.weight = nn.Parameter(weight.detach().clone())  # (c_out, c_in / groups, kh, kw)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # (c_out,)
        self.register_buffer("bits", bits.to(torch.uint8))  # (c_out,)
        self.scale = nn.Parameter(scale.detach().clone())  # (c_out,)

    def forward(self, x: Tensor) -> Tensor:
        weight = quantize.fake_quantize(self.weight, self.bits, self.scale)
        return self.geometry.apply(self.act(x), weight, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, mean bits={self.bits.float().mean().item():.2f}"


class FrozenLayer(nn.Module):
    """A finished layer. Everything the file stores is a buffer; the float32 weight is rebuilt from it, never stored.

    codes: int8 (c_out, c_in / groups, kh, kw), zero for kernels of 32 bits
    bits:  uint8 (c_out,), 1 to 8 or 32
    scale: float16 (c_out,), may be negative (a folded batch-norm); 0 for kernels of 32 bits
    raw:   float32 (number of kernels of 32 bits, c_in / groups, kh, kw)
    bias:  float32 (c_out,) or None; representable in float16 for kernels of up to 8 bits

    Where kernels and input are integers, so is what is added up, the bias too, rounded to `unit`: as in runtimes. Such
    sums are exact (below 2^24) in any order, so they do not depend on the batch, on threads or on the processor.

    unit:  the step of an integer sum, float32 (c_out,): that of the kernel times that of the input; None where one of
           them is float
    whole_bias: the bias in units, whole float32 (c_out,); None without one, and where it and a sum do not fit an int32
    reader: the quantizer that alone reads the output, if one does, set by `ajpq.outputs.round_as_read`. The sum goes to
            its grid by one factor, ``round(sum * (unit / step))``, as in runtimes: by two, some codes in a million are
            others, and a deep network ends elsewhere.
    """

    def __init__(
        self,
        codes: Tensor,
        bits: Tensor,
        scale: Tensor,
        raw: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        act: ActQuant,
    ) -> None:
        super().__init__()
        self.geometry, self.act = geometry, act
        self.reader: tuple[ActQuant, ...] = ()  # none or one; a tuple, as it is a part of another module
        for name, value in (("codes", codes), ("bits", bits), ("scale", scale), ("raw", raw), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.contiguous())
        weight = quantize.decode(self.codes, bits, scale)
        weight[bits == FLOAT] = raw
        self.register_buffer("weight", weight, persistent=False)
        unit = whole = integers = None
        if act.bits != FLOAT and not (bits == FLOAT).any():
            contained, step = self.container
            unit = step * quantize.usable(act.scale.detach().abs())
            whole = None if bias is None else (bias / unit).round()
            if whole is not None and not self.fits(whole).all():
                whole = None
            if bias is None or whole is not None:
                integers = contained.float()
        shift = self.bias if whole is None else whole * unit
        for name, value in (("unit", unit), ("whole_bias", whole), ("shift", shift), ("_codes", integers)):
            self.register_buffer(name, value, persistent=False)

    @staticmethod
    def fits(whole: Tensor) -> Tensor:
        """Whether a bias in units leaves room for a sum in 32 bits."""
        return whole.abs() < 2**30

    @property
    def container(self) -> tuple[Tensor, Tensor]:
        """Codes int8 (c_out, ...) and positive steps float32 (c_out,) of the same weights; 32-bit kernels give zero.

        Codes of fewer than 7 bits are shifted up to 7: `unit` becomes finer, and the sum of two products still fits
        int16, where processors without VNNI saturate.
        """
        scale = quantize.container_scale(self.bits, self.scale.float())
        rise = self.bits <= quantize.MID_RISE
        shift = 2 ** (7 - self.bits.int() - rise.int()).clamp(0)  # (c_out,)
        sign = torch.where(self.bits == FLOAT, 0, torch.sign(scale)).to(torch.int8)
        codes = quantize.contain(self.codes, self.bits) * (sign * shift).reshape(-1, *[1] * (self.codes.ndim - 1))
        some = scale.abs().max()
        some = torch.where(some > 0, some.clamp(min=quantize.TINY), 1)  # no step at all: any
        return codes.to(torch.int8), torch.where(scale == 0, some, scale.abs()) / shift

    def forward(self, x: Tensor) -> Tensor:
        if self._codes is None:
            return self.geometry.apply(self.act(x), self.weight, self.shift)
        codes = quantize.act_codes(x, self.act.scale, self.act.bits, self.act.signed)
        unit = self.unit.reshape(-1, 1, 1) if self.geometry.conv else self.unit
        sums = self.geometry.apply(codes, self._codes, self.whole_bias)
        if not self.reader:
            return sums * unit
        step = quantize.usable(self.reader[0].scale.abs())
        return (sums * (unit / step)).round() * step

    def extra_repr(self) -> str:
        return f"{tuple(self.codes.shape)}, mean bits={self.bits.float().mean().item():.2f}"


class ChannelAffine(nn.Module):
    """A finished batch-norm that no layer could absorb: ``x * scale + shift``, float16 (C,) each. Raises AjpqError for
    values that float16 does not hold."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        for name, values in (("scale", scale), ("shift", shift)):
            half = values.to(torch.float16)
            if not half.isfinite().all():
                raise AjpqError(
                    f"a batch-norm that no layer absorbs is stored as float16, at most 65,504, but one has a {name} of "
                    f"{values.abs().max().item():g}; its channel hardly varies: bring inputs to mean 0 and deviation 1 "
                    "before, or leave the norm out"
                )
            self.register_buffer(name, half)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *([1] * (x.ndim - 2)))
        return x * self.scale.float().reshape(shape) + self.shift.float().reshape(shape)
