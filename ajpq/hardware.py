"""What a policy costs on a device that one has no table for: analytic models of time and energy, over `Load`s.

Every tensor of a layer moves between memory and chip once: each weight, the inputs and the outputs. A load does not
know who reads its outputs, so they count as wide as the inputs. Where a device has steps, a value is exact and its
gradient that of a line through the steps (a straight-through estimator; ours), so that a differentiable search sees
beyond the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ajpq.cost import Load
from ajpq.errors import AjpqError
from ajpq.quantize import FLOAT

OPERANDS = (2, 4, 8, 16, 32)  # bits that a BitFusion operand can have; a brick has 2


@dataclass(frozen=True)
class Roofline:
    """Milliseconds per image on a device with a peak of compute and one of memory: a layer takes as long as the slower
    of the two (Williams et al. 2009, CACM 52(4)).

    A multiply-accumulate is two operations. It runs, kernel by kernel, at the peak of the narrowest width that holds
    its weight and its input. In memory a tensor has the narrowest width of `peak` that holds it: 3 bits move as 4 on a
    device that has 4, as 8 on one that has not.

    peak: width in bits -> operations per second; no wider one is faster, and one holds 32 bits. bandwidth: bytes per
    second. The default is an NVIDIA T4: 260, 130 and 8.1 tera-operations per second, 320 GB/s (NVIDIA, data sheet).
    Raises AjpqError for other numbers.
    """

    peak: Mapping[int, float] = field(default_factory=lambda: {4: 260e12, 8: 130e12, 32: 8.1e12})
    bandwidth: float = 320e9

    unit = "ms"

    def __post_init__(self) -> None:
        _must_be_positive(self, "bandwidth")
        peak = sorted((int(width), float(rate)) for width, rate in self.peak.items())
        rates = [rate for _, rate in peak]
        if not peak or peak[0][0] < 1 or peak[-1][0] < FLOAT or not rates[-1] > 0:
            raise AjpqError(
                f"peak must give operations per second above 0 for widths up to {FLOAT} bits, as the uncompressed "
                f"network has them, but it is {dict(self.peak)}; add {FLOAT}"
            )
        if rates != sorted(rates, reverse=True) or not all(map(math.isfinite, rates)):
            raise AjpqError(
                f"peak must not grow with the width, as no cost may fall when a kernel gets wider, but it is "
                f"{dict(self.peak)}; leave out the widths that are slower than a wider one"
            )
        object.__setattr__(self, "peak", dict(peak))

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([self._layer(load) for load in loads])

    def _layer(self, load: Load) -> Tensor:
        widths = list(self.peak)
        seconds = _stepped(
            torch.maximum(load.weight_bits, load.act_bits), widths, [1 / rate for rate in self.peak.values()]
        )
        compute = 2 * load.macs_per_kernel * (load.kept * seconds).sum()
        moved = _moved(load, _stepped(load.weight_bits, widths, widths), _stepped(load.act_bits, widths, widths))
        return 1e3 * torch.maximum(compute, moved / 8 / self.bandwidth)


@dataclass(frozen=True)
class BitFusion:
    """Milliseconds per image on BitFusion, a bit-serial spatial accelerator (Sharma et al. 2018, arXiv 1712.01507), for
    which HAQ (Wang et al. 2019, arXiv 1811.08886) searches widths.

    A systolic array of rows x columns fusion units, each of `bricks` multipliers of 2 x 2 bits. A product of w x a bits
    takes w a / 4 bricks, w and a being rounded up to 2, 4, 8, 16 or 32; a unit does several narrow products in a cycle,
    or a wide one in several cycles. Rows share the n products of an output, columns the kernels. One output pixel of a
    tile of kernels takes, as the authors' simulator counts it, ``ceil(n / (rows * products per cycle))`` cycles.

    Ours: a tile runs as its widest kernel, and kernels are put into tiles in the order of their widths; kernels that
    read other channels (of another group, and all of a depthwise convolution) share no tile; 32 bits count as fixed
    point of 32 bits; memory works meanwhile, at the exact widths, and the slower of the two tells.

    rows, columns: of the array. bricks: per unit. frequency: Hz. bandwidth: bits per cycle. The defaults are the
    authors' for comparison with Eyeriss (bf_e_conf.ini in their code). Raises AjpqError for numbers not above 0.
    """

    rows: int = 16
    columns: int = 32
    bricks: int = 16
    frequency: float = 500e6
    bandwidth: float = 192.0

    unit = "ms"

    def __post_init__(self) -> None:
        _must_be_positive(self, *(f.name for f in fields(self)))

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([self._layer(load) for load in loads])

    def _layer(self, load: Load) -> Tensor:
        moved = _moved(load, load.weight_bits, load.act_bits)
        return torch.maximum(self.compute_cycles(load), moved / self.bandwidth) * (1e3 / self.frequency)

    def compute_cycles(self, load: Load) -> Tensor:
        """() cycles of the array for one image."""
        n, groups = load.weights_per_kernel, load.layer.groups
        units = _stepped(load.weight_bits, OPERANDS, OPERANDS) * _stepped(load.act_bits, OPERANDS, OPERANDS) / 4
        units = units / self.bricks  # that one product takes, (c_out,)
        passes = torch.ceil(n * units.clamp(max=1) / self.rows) * units.clamp(min=1)
        cycles = load.kept * _straight(passes, n * units / self.rows)
        per_group = load.layer.c_out // groups
        heads = cycles.reshape(groups, per_group).sort(dim=1, descending=True).values[:, :: self.columns]
        return load.layer.positions * _straight(heads.sum(), cycles.sum() / min(self.columns, per_group))


@dataclass(frozen=True)
class Energy:
    """Microjoules per image: of arithmetic, of the on-chip buffer and of DRAM.

    For w-bit weights and a-bit inputs, a multiply-accumulate takes ``multiply w a + add 32`` (the sum has 32 bits) and
    reads ``(w + a) / reuse`` bits from the buffer; every tensor moves between DRAM and chip once.

    multiply: pJ per bit operation, w a of them in a product. add: pJ per bit of a sum. buffer, dram: pJ per bit moved.
    reuse: multiply-accumulates that one read of the buffer serves; 16 is ours, the side of a small array.
    The other defaults are of 45 nm at 0.9 V (Horowitz, ISSCC 2014, figure 1.1.9): an 8-bit product 0.2 pJ, a 32-bit
    integer sum 0.1 pJ, 64 bits from 32 KB of SRAM 20 pJ, 64 bits from DRAM 1.3 nJ (the lower end). By this rule a
    32-bit product takes 3.2 pJ; he gives 3.1 for integers and 3.7 for floats.
    Raises AjpqError for numbers that are not above 0.
    """

    multiply: float = 0.2 / 64
    add: float = 0.1 / 32
    buffer: float = 20 / 64
    dram: float = 1300 / 64
    reuse: float = 16.0

    unit = "uJ"

    def __post_init__(self) -> None:
        _must_be_positive(self, *(f.name for f in fields(self)))

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([self._layer(load) for load in loads])

    def _layer(self, load: Load) -> Tensor:
        w, a = load.weight_bits, load.act_bits
        mac = self.multiply * w * a + self.add * 32 + self.buffer * (w + a) / self.reuse  # (c_out,)
        return 1e-6 * (load.macs_per_kernel * (load.kept * mac).sum() + self.dram * _moved(load, w, a))


def _moved(load: Load, weight_bits: Tensor, act_bits: Tensor) -> Tensor:
    """() bits of all weights (c_out,), inputs and outputs of a layer at these widths; 0 for one that is skipped. The
    input of a convolution is taken to have as many pixels as its strided kernel can meet: positions x min(stride,
    kernel) on either axis."""
    layer, kernels = load.layer, load.kept.sum()
    groups = kernels * (layer.groups / layer.c_out) if layer.kind == "depthwise" else layer.groups
    pixels = layer.positions * math.prod(map(min, layer.stride, layer.kernel))
    features = load.inputs * groups * pixels * kernels.clamp(max=1) + kernels * layer.positions
    return load.weights_per_kernel * (load.kept * weight_bits).sum() + features * act_bits


def _stepped(bits: Tensor, grid: Sequence[int], values: Sequence[float]) -> Tensor:
    """The value at the first width of an ascending grid that is not below `bits`, the last one beyond it. The gradient
    is that of the line between two widths of the grid, 0 below and beyond it. bits: any shape."""
    at, told = torch.tensor(grid, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    place = torch.searchsorted(at, bits.detach())
    slopes = torch.cat([at.new_zeros(1), told.diff() / at.diff(), at.new_zeros(1)])
    value = told[place.clamp(max=len(grid) - 1)]
    return _straight(value, slopes.to(bits.device)[place] * bits)


def _straight(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, with the gradient of `smooth`."""
    return value.detach() + (smooth - smooth.detach())


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def _must_be_positive(model: object, *names: str) -> None:
    for name in names:
        value = getattr(model, name)
        if not 0 < value < math.inf:
            raise AjpqError(
                f"{name} of {type(model).__name__} must be a number above 0, but it is {value!r}; change it"
            )
