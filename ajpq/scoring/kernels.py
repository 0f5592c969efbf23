"""The arithmetic that candidates are measured with: quantized activations as codes, layers as one kernel call.

`Int8` is exact: codes of up to 8 bits are multiplied and added as integers, where the processor can, several times
faster than float32. `Floats` computes the same numbers in float32, float64, or with convolutions in bfloat16.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ajpq import quantize
from ajpq.layers import Geometry


@dataclass(frozen=True)
class Grid:
    """The activation codes that a layer reads: ``step * {low..high}``; step is a float32 number."""

    bits: int
    signed: bool
    step: float

    @property
    def low(self) -> int:
        return quantize.act_range(self.bits, self.signed)[0]

    @property
    def high(self) -> int:
        return quantize.act_range(self.bits, self.signed)[1]

    @property
    def zero(self) -> int:
        """Where code 0 lies in a byte."""
        return 128 if self.signed else 0

    @property
    def inverse(self) -> float:
        """1 / step, rounded as torch's fake quantization rounds it."""
        return float(np.float32(1) / np.float32(self.step))


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The surviving kernels of one layer: container codes int8 (c_out, ...) and their step sizes float32 (c_out,);
    kernels of 32 bits have code 0, step 0 and lie in `raw` float32 at `rows`."""

    codes: Tensor
    step: Tensor
    bias: Tensor | None
    rows: Tensor | None
    raw: Tensor | None

    def floats(self, dtype: torch.dtype) -> Tensor:
        weight = self.codes.to(dtype) * _column(self.step.to(dtype), self.codes)
        if self.rows is not None:
            weight[self.rows] = self.raw.to(dtype)
        return weight


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


class Floats:
    """Codes held as floats. dtype: of activations and sums; conv_dtype: of the operands of convolutions."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, conv_dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> None:
        self.dtype, self.conv_dtype, self.device = dtype, conv_dtype or dtype, torch.device(device)

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """x of any shape -> codes of the same shape, a new tensor."""
        return torch.mul(x, grid.inverse).round_().clamp_(grid.low, grid.high)

    def layer(self, weights: LayerWeights, geometry: Geometry, grid: Grid | None) -> FloatLayer:
        return FloatLayer(self, weights, geometry, grid)


class FloatLayer:
    """One layer in floating point."""

    fused = False  # cannot write codes itself

    def __init__(self, arithmetic: Floats, weights: LayerWeights, geometry: Geometry, grid: Grid | None) -> None:
        self.arithmetic, self.geometry, self.grid = arithmetic, geometry, grid
        step = 1.0 if grid is None else grid.step
        self.weight = weights.floats(arithmetic.dtype).to(arithmetic.device) * step
        self.bias = None if weights.bias is None else weights.bias.to(arithmetic.device, arithmetic.dtype)
        self.bare = self.folded = self._operands(self.weight, self.bias)

    def _operands(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dtype = self.arithmetic.conv_dtype
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        return weight.to(dtype).contiguous(memory_format=layout), None if bias is None else bias.to(dtype)

    def affine(self, gain: Tensor, shift: Tensor) -> None:
        """Fold a batch-norm, (c_out,) each, into what `__call__` computes."""
        bias = shift if self.bias is None else self.bias * gain + shift
        self.folded = self._operands(self.weight * _column(gain, self.weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Codes, or floats where there is no grid -> floats (N, c_out, H, W)."""
        return self._apply(x, self.folded)

    def plain(self, x: Tensor) -> Tensor:
        """The same without the batch-norm."""
        return self._apply(x, self.bare)

    def _apply(self, x: Tensor, operands: tuple[Tensor, Tensor | None]) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.to(self.arithmetic.dtype).sub_(self.grid.zero)
        return self.geometry.apply(x.to(self.arithmetic.conv_dtype), *operands).to(self.arithmetic.dtype)


class Int8(Floats):
    """Codes held as bytes. Convolutions whose kernels and input all have codes run on integers (oneDNN), all other
    layers in float32."""

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        if x.numel() == 0 or not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        coded = torch.quantize_per_tensor(x, grid.step, grid.zero, torch.quint8)
        found = torch.empty(0, dtype=torch.uint8).set_(coded.untyped_storage(), 0, coded.shape, coded.stride())
        return _clip(found, grid)

    def layer(self, weights: LayerWeights, geometry: Geometry, grid: Grid | None) -> FloatLayer | Int8Conv:
        fits = geometry.conv and geometry.padding_mode == "zeros" and not isinstance(geometry.padding, str)
        if grid is None or weights.rows is not None or not fits:
            return FloatLayer(self, weights, geometry, grid)
        return Int8Conv(weights, geometry, grid)


def _clip(codes: Tensor, grid: Grid) -> Tensor:
    return codes if grid.bits == 8 else codes.clamp_(grid.zero + grid.low, grid.zero + grid.high)


class Int8Conv:
    """One convolution on integers, with scale, bias, ReLU and the rounding to the next layer's codes in its kernel."""

    fused = True

    def __init__(self, weights: LayerWeights, geometry: Geometry, grid: Grid) -> None:
        self.geometry, self.grid = geometry, grid
        self.step, self.bias = weights.step, weights.bias
        self.zeros = torch.zeros(len(weights.step), dtype=torch.int64)
        self.packed = torch.ops.onednn.qconv_prepack(
            weights.codes.contiguous(), self.step, grid.step, grid.zero,
            geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
        )  # fmt: skip
        self.folded = self.step, self.bias

    def affine(self, gain: Tensor, shift: Tensor) -> None:
        """Fold a batch-norm, (c_out,) each, into what `__call__` computes."""
        self.folded = self.step * gain, shift if self.bias is None else self.bias * gain + shift

    def __call__(self, x: Tensor, out: Grid | None = None, relu: bool = False) -> Tensor:
        """Codes (N, c_in, H, W) -> floats (N, c_out, H, W), or codes on the grid `out`."""
        return self._apply(x, *self.folded, out, relu)

    def plain(self, x: Tensor) -> Tensor:
        """The same without the batch-norm, in floats."""
        return self._apply(x, self.step, self.bias, None, False)

    def _apply(self, x: Tensor, scale: Tensor, bias: Tensor | None, out: Grid | None, relu: bool) -> Tensor:
        geometry = self.geometry
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        y = torch.ops.onednn.qconv2d_pointwise(
            x, self.grid.step, self.grid.zero, self.packed, scale, self.zeros, bias,
            geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
            1.0 if out is None else out.step, 0 if out is None else out.zero,
            torch.float32 if out is None else torch.uint8, "relu" if relu else "none", [], "",
        )  # fmt: skip
        return y if out is None else _clip(y, out)


@functools.cache
def integers_are_exact() -> bool:
    """Whether this build of torch and this processor convolve bytes, and get every sum right."""
    random = torch.Generator().manual_seed(0)
    grid = Grid(8, False, 0.5)
    codes = torch.randint(-127, 128, (8, 32, 3, 3), generator=random, dtype=torch.int8)
    weights = LayerWeights(codes, torch.linspace(0.1, 0.2, 8), None, None, None)
    x = torch.full((2, 32, 6, 6), 127.5).contiguous(memory_format=torch.channels_last)  # where 16-bit sums overflow
    x[1] = torch.rand(32, 6, 6, generator=random) * 127.5
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated; told once per process
            q = Int8().quantize(x, grid)
            y = Int8Conv(weights, Geometry(True, padding=(1, 1)), grid)(q)
            expected = F.conv2d(q.double() * 0.5, weights.floats(torch.float64), None, 1, 1)
            right = (
                torch.equal(q.float(), (x * 2).round().clamp(0, 255))
                and (y - expected).abs().max() < 1e-6 * expected.abs().max()
            )
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
    return bool(right)
