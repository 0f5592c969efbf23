"""What an int8 ONNX file is made of, as modules: `Quantizer` and `Layer`. Run, they give the values that a runtime
computes; exported, they are QuantizeLinear, DequantizeLinear and int8 weights.

Every quantized activation is in a uint8 container. Codes of a signed grid are stored plus 128: the same values as in
int8, and two to four times faster on ONNX Runtime (four 3x3 convolutions of 64 channels at 8x8 with sums between them,
one core with VNNI: 0.08 ms against 0.29). A grid of fewer than 8 bits is quantized to 8 and then clipped as integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ajpq import quantize
from ajpq.layers import ActQuant, FrozenLayer
from ajpq.quantize import FLOAT

NARROW = 8  # channels; depthwise layers with fewer take ONNX Runtime 2 to 3.5 times as long in int8 (c = 3 to 6)


@dataclass(frozen=True)
class Grid:
    """uint8 codes: values are ``(code - zero) * step``; codes low to high are used."""

    step: float
    zero: int
    low: int = 0
    high: int = 255

    @classmethod
    def of(cls, act: ActQuant) -> Grid:
        low, high = quantize.act_range(act.bits, act.signed)
        zero = 128 if act.signed else 0
        return cls(quantize.usable(act.scale.abs()).item(), zero, low + zero, high + zero)

    @property
    def whole(self) -> Grid:
        return Grid(self.step, self.zero)


class Quantizer(nn.Module):
    """x -> the nearest values of the grid.

    apart: a Clip stands behind QuantizeLinear even if it limits nothing. ONNX Runtime makes one quantizer of two in a
    row (its DoubleQDQPairsRemover), which rounds otherwise where their steps differ; this keeps them two.
    """

    def __init__(self, grid: Grid, apart: bool = False) -> None:
        super().__init__()
        self.grid, self.limited = grid, apart or grid != grid.whole
        self.register_buffer("step", torch.tensor(grid.step))
        for name in ("zero", "low", "high"):
            self.register_buffer(name, torch.tensor(getattr(grid, name), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero.int(), self.grid.low, self.grid.high)
        codes = _op("QuantizeLinear", (x, self.step, self.zero), torch.uint8, x.shape)
        if self.limited:
            codes = _op("Clip", (codes, self.low, self.high), torch.uint8, x.shape)
        return _op("DequantizeLinear", (codes, self.step, self.zero), torch.float32, x.shape)


class Layer(nn.Module):
    """A finished layer without the quantizer of its input; its weights are int8 where that is exact and not slower.

    ONNX Runtime gives float weights between quantizers 8 bits of its own accord, so a float layer limits its input to
    the ends of its grid first: the same values, but no longer those of a quantizer.
    """

    def __init__(self, layer: FrozenLayer) -> None:
        super().__init__()
        self.geometry = layer.geometry
        self.register_buffer("bias", layer.shift)
        whole, unit = layer.whole_bias, layer.unit
        self.integer = not (layer.bits == FLOAT).any() and (whole is not None or layer.bias is None or unit is None)
        if self.geometry.conv and 1 < self.geometry.groups == len(layer.codes) < NARROW:
            self.integer = False
        if not self.integer:
            self.register_buffer("weight", layer.weight)
            self.ends = None
            if layer.act.bits != FLOAT:
                grid = Grid.of(layer.act)
                self.ends = (grid.low - grid.zero) * grid.step, (grid.high - grid.zero) * grid.step
            return
        if whole is not None and not self.geometry.conv:  # there only a bias of integers keeps ONNX Runtime in integers
            self._keep("bias", whole.to(torch.int32), unit)
        codes, scale = layer.container
        self._keep("weight", codes if self.geometry.conv else codes.T.contiguous(), scale)

    def _keep(self, name: str, codes: Tensor, scale: Tensor) -> None:
        self.register_buffer(name, codes)
        self.register_buffer(f"{name}_scale", scale)
        self.register_buffer(f"{name}_zero", torch.zeros(len(scale), dtype=codes.dtype))

    def _values(self, name: str, axis: int) -> Tensor:
        codes, scale, zero = (getattr(self, f"{name}{part}") for part in ("", "_scale", "_zero"))
        if not torch.compiler.is_exporting():
            return codes * scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
        return _op("DequantizeLinear", (codes, scale, zero), torch.float32, codes.shape, axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        if not self.integer:
            return self.geometry.apply(x if self.ends is None else x.clamp(*self.ends), self.weight, self.bias)
        if self.geometry.conv:
            return self.geometry.apply(x, self._values("weight", 0), self.bias)
        product = x @ self._values("weight", 1)
        if self.bias is None:
            return product
        return product + (self.bias if self.bias.is_floating_point() else self._values("bias", 0))


def _op(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attrs=attributes, dtype=dtype, shape=shape)
