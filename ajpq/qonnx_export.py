"""QONNX files: a finished network whose kernels and activations keep their widths, as `Quant` nodes on float tensors.

QONNX (Pappalardo et al. 2022, arXiv 2206.07527) adds the domain `qonnx.custom_op.general` to ONNX. Its

    Quant(x, scale, zero_point, bit_width) = (round(clip(x / scale + zero_point, low, high)) - zero_point) * scale

has codes of `bit_width` bits from low to high, by the attributes signed and narrow (which leaves out -2^(b-1)), and
`BipolarQuant(x, scale)` is `scale` where x >= 0, else `-scale`. Our grids (see `ajpq.quantize`) are among these, and
the weights that such a node is given lie on its grid, so that they come out as they went in, bit by bit:

    1 bit        BipolarQuant of scale s/2
    2, 3 bits    signed, zero_point -1/2
    4 to 8 bits  signed, narrow
    activations  signed or not, not narrow; the signed ones of 1 bit, {-1, 0}, unsigned with zero_point 1

A `bit_width` per kernel is more than the executor of qonnx 1.0 takes, which wants a scalar. So a layer has one node for
each width, and its kernels are joined by Concat and put into their order by Gather.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from ajpq import quantize
from ajpq.layers import ActQuant, FrozenLayer
from ajpq.onnx_export import float_onnx
from ajpq.quantize import FLOAT, MID_RISE

DOMAIN, VERSION = "qonnx.custom_op.general", 1


@torch.no_grad()
def to_qonnx(network: fx.GraphModule, images: Tensor, *, per_kernel: bool = True) -> bytes:
    """A finished network as a QONNX model of float32 "images" and "outputs", for one image at a time.

    images (n, C, H, W): as the network reads them; only their shape is used.
    per_kernel: every kernel has its own width. False: a layer has one Quant node straight before it, as wide as its
        widest kernel needs, and no zero point, which is what FINN takes. The weights are the same; kernels of up to
        three bits are the odd codes of a grid through zero with one bit more, so that their layers are told wider.
    Kernels of 32 bits, or of zeros, have no node. Raises AjpqError if the network has an operation that ONNX lacks.
    """
    net = copy.deepcopy(network)
    for name, module in network.named_modules():
        if isinstance(module, FrozenLayer):
            net.set_submodule(name, _Layer(module, per_kernel))
    for name, module in list(net.named_modules()):
        if isinstance(module, ActQuant):
            net.set_submodule(name, _of_activations(module))
    return float_onnx(net, images, batch=1)


class _Quant(nn.Module):
    """A Quant node, or BipolarQuant for signed codes of 1 bit; made to be exported, not to be run.

    scale: positive, of a shape that x can be broadcast with.
    """

    def __init__(self, scale: Tensor, bits: int, *, signed: bool, narrow: bool = False, zero: float = 0.0) -> None:
        super().__init__()
        self.bipolar = signed and bits == 1
        self.attributes = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        for name, value in (("scale", scale), ("zero", torch.tensor(zero)), ("bits", torch.tensor(float(bits)))):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.bipolar:
            return _op("BipolarQuant", (x, self.scale), x, {})
        return _op("Quant", (x, self.scale, self.zero, self.bits), x, self.attributes)


def _op(name: str, inputs: tuple[Tensor, ...], like: Tensor, attributes: dict[str, int | str]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attrs=attributes, dtype=torch.float32, shape=like.shape, version=VERSION
    )


def _of_activations(act: ActQuant) -> nn.Module:
    if act.bits == FLOAT:
        return nn.Identity()
    scale = quantize.usable(act.scale.abs())
    if act.signed and act.bits == 1:
        return _Quant(scale, 1, signed=False, zero=1.0)
    return _Quant(scale, act.bits, signed=act.signed)


def _groups(layer: FrozenLayer, per_kernel: bool) -> list[tuple[Tensor, _Quant | None]]:
    """Numbers of kernels, and the node that has their grid: none for 32 bits and for kernels of zeros."""
    scale = layer.scale.float().abs()
    bits = torch.where(scale == 0, FLOAT, layer.bits.int())  # (c_out,)
    coded = bits != FLOAT
    if not per_kernel and (bits[coded] > 1).any():
        steps, width = quantize.container_scale(bits, scale), (bits + (bits <= MID_RISE))[coded].max().item()
        node = _Quant(_along(layer, steps[coded]), width, signed=True, narrow=True)
        return [(torch.nonzero(part)[:, 0], made) for part, made in ((coded, node), (~coded, None)) if part.any()]
    found = []
    for width in bits.unique().tolist():
        numbers = torch.nonzero(bits == width)[:, 0]
        step = _along(layer, scale[numbers])
        if width == FLOAT:
            node = None
        elif width == 1:
            node = _Quant(step / 2, 1, signed=True)
        elif width <= MID_RISE:
            node = _Quant(step, width, signed=True, zero=-0.5)
        else:
            node = _Quant(step, width, signed=True, narrow=True)
        found.append((numbers, node))
    return found


def _along(layer: FrozenLayer, scale: Tensor) -> Tensor:
    """Scales of kernels in the shape that their weights are broadcast with: (n, 1, 1, 1), or (1, n) for (c_in, n)."""
    return scale.reshape(-1, 1, 1, 1) if layer.geometry.conv else scale[None]


class _Layer(nn.Module):
    """A finished layer with its weights behind nodes: (c_out, c_in / groups, kh, kw), or (c_in, c_out) if linear."""

    def __init__(self, layer: FrozenLayer, per_kernel: bool) -> None:
        super().__init__()
        self.geometry, self.act, self.axis = layer.geometry, layer.act, 0 if layer.geometry.conv else 1
        self.register_buffer("bias", layer.shift)
        weight = layer.weight if layer.geometry.conv else layer.weight.T
        groups = _groups(layer, per_kernel)
        self.nodes = nn.ModuleList([nn.Identity() if node is None else node for _, node in groups])
        for i, (numbers, _) in enumerate(groups):
            self.register_buffer(f"weight_{i}", weight.index_select(self.axis, numbers).contiguous())
        order = torch.cat([numbers for numbers, _ in groups]).argsort()
        self.register_buffer("order", None if torch.equal(order, torch.arange(len(order))) else order)

    def forward(self, x: Tensor) -> Tensor:
        x, parts = self.act(x), [node(getattr(self, f"weight_{i}")) for i, node in enumerate(self.nodes)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)
        if self.order is not None:
            weight = weight.index_select(self.axis, self.order)
        if self.geometry.conv:
            return self.geometry.apply(x, weight, self.bias)
        return x @ weight if self.bias is None else x @ weight + self.bias
