"""A finished network as the flat tensors of the packed file, and back. The format is described in `ajpq.shipping`."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ajpq import graph_json, module_json
from ajpq.bitstream import VERSION, Reader, Writer
from ajpq.errors import AjpqError
from ajpq.layers import ActQuant, ChannelAffine, FrozenLayer, Geometry, QuantLayer
from ajpq.network import Network
from ajpq.outputs import round_as_read
from ajpq.quantize import FLOAT, grid


def _put_layer(out: Writer, name: str, layer: FrozenLayer) -> list[Any]:
    coded = layer.bits != FLOAT
    types = {"codes": torch.int8, "bits": torch.uint8, "scale": torch.float16}
    types |= {name: torch.float32 for name in ("raw", "weight", "bias") if getattr(layer, name) is not None}
    for buffer, dtype in types.items():
        values = getattr(layer, buffer)
        if values.dtype != dtype or not values.is_contiguous() or not values.isfinite().all():
            raise AjpqError(
                f"{buffer} of a finished layer must be {dtype}, contiguous and finite, but that of {name} "
                "is not; finish the network again"
            )
    if ((layer.bits < 1) | (layer.bits > 8) & coded).any():
        raise AjpqError(
            f"kernels of a finished layer must have 1 to 8 or 32 bits, but {name} has "
            f"{layer.bits.unique().tolist()}; remove pruned kernels first"
        )
    low, high, _ = (t[:, None] for t in grid(layer.bits))
    codes = layer.codes.flatten(1)
    if ((codes < low) | (codes > high)).any() or layer.scale[~coded].any():
        raise AjpqError(
            f"codes of a finished layer must lie on the grid of their width, but those of {name} do not; "
            f"finish the network again"
        )
    half = None if layer.bias is None else layer.bias[coded].half()
    if half is not None and not torch.equal(half.float(), layer.bias[coded]):
        raise AjpqError(
            f"biases of kernels of up to 8 bits must be float16 numbers, but {name} has others; round them "
            "with .half().float() when finishing the layer"
        )
    twin = FrozenLayer(layer.codes, layer.bits, layer.scale, layer.raw, layer.bias, layer.geometry, layer.act)
    if not torch.equal(twin.weight, layer.weight):
        raise AjpqError(
            f"the weight of a finished layer must be what its codes say, but that of {name} was changed; "
            "finish the network again"
        )
    out.put("widths", layer.bits)
    out.kernels.append(((codes - low).to(torch.uint8)[coded].cpu().numpy(), layer.bits[coded].cpu().numpy()))
    out.put("scale", layer.scale[coded])
    out.put("raw", layer.raw)
    if half is not None:
        out.put("bias", half)
        out.put("raw", layer.bias[~coded])
    g = layer.geometry
    return [
        "FrozenLayer",
        list(layer.codes.shape),
        [g.stride, g.padding, g.dilation, g.groups, g.padding_mode] if g.conv else None,
        _put_act(layer.act),
        int(half is not None),
    ]


def _take_layer(
    parts: Reader, shape: list[int], geometry: list[Any] | None, act: list[Any], has_bias: int
) -> FrozenLayer:
    bits = parts.take("widths", shape[0])
    coded = bits != FLOAT
    if ((bits < 1) | (bits > 8) & coded).any():
        raise AjpqError(
            f"widths in a packed network must be 1 to 9, but there are {bits.unique().tolist()}; ship it again"
        )
    widths, n = bits[coded].numpy(), int(coded.sum())
    low, high, _ = grid(bits[coded])
    kernels = torch.from_numpy(parts.take_codes(widths, math.prod(shape[1:]))) + low[:, None]
    if (kernels > high[:, None]).any():
        raise AjpqError("codes in a packed network must lie on the grid of their width, but some do not; ship it again")
    codes, scale = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0], dtype=torch.float16)
    codes[coded] = kernels.to(torch.int8).reshape(n, *shape[1:])
    scale[coded] = parts.take("scale", n)
    raw = parts.take("raw", shape[0] - n, *shape[1:])
    bias = None
    if has_bias:
        bias = torch.zeros(shape[0])
        bias[coded] = parts.take("bias", n).float()
        bias[~coded] = parts.take("raw", shape[0] - n)
    place = Geometry(conv=False)
    if geometry is not None:
        stride, padding, dilation, groups, mode = geometry
        padding = padding if isinstance(padding, str) else tuple(padding)
        place = Geometry(True, tuple(stride), padding, tuple(dilation), groups, mode)
    return FrozenLayer(codes, bits, scale, raw, bias, place, _take_act(*act))


def _put_act(act: ActQuant) -> list[Any]:
    return [act.bits, int(act.signed), struct.pack(">f", act.scale.item()).hex()]


def _take_act(bits: int, signed: int, scale: str) -> ActQuant:
    step = torch.tensor(struct.unpack(">f", bytes.fromhex(scale))[0], dtype=torch.float32)
    return ActQuant(bits, bool(signed), step, learned=False)


def _put_module(out: Writer, name: str, module: nn.Module) -> list[Any]:
    if isinstance(module, FrozenLayer):
        return _put_layer(out, name, module)
    if isinstance(module, QuantLayer):
        raise AjpqError(f"a shipped network must be finished, but {name} still learns; freeze the network first")
    if isinstance(module, ActQuant):
        return ["ActQuant", *_put_act(module)]
    if isinstance(module, ChannelAffine):
        out.put("affine", module.scale)
        out.put("affine", module.shift)
        return ["ChannelAffine", len(module.scale)]
    row = module_json.module_to_json(name, module)
    for path, values in module_json.tensors_of(module):
        out.put_any(f"{name}.{path}", values)
    return row


def _take_module(parts: Reader, row: list[Any]) -> nn.Module:
    if row[0] == "FrozenLayer":
        return _take_layer(parts, *row[1:])
    if row[0] == "ActQuant":
        return _take_act(*row[1:])
    if row[0] == "ChannelAffine":
        return ChannelAffine(parts.take("affine", row[1]), parts.take("affine", row[1]))
    module = module_json.module_from_json(row)
    module_json.set_tensors(
        module, {path: parts.take_any(values.dtype, values.shape) for path, values in module_json.tensors_of(module)}
    )
    return module


def pack(network: fx.GraphModule, extra: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """A finished network as the flat tensors of the file. `extra`: JSON data that `read_header` gives back."""
    if not isinstance(network, fx.GraphModule):
        raise AjpqError(
            "what is shipped must be a finished torch.fx.GraphModule, but this is a "
            f"{type(network).__name__}; compress it first"
        )
    graph, out = graph_json.graph_to_json(network), Writer()
    modules, paths = graph_json.targets(graph)
    rows = [_put_module(out, name, network.get_submodule(name)) for name in modules]
    tensors = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        values = getattr(network.get_submodule(owner), name)
        if not isinstance(values, Tensor):
            raise AjpqError(
                f"a value that a shipped network reads must be a tensor, but {path} is a "
                f"{type(values).__name__}; make it a buffer"
            )
        out.put_any(path, values)
        tensors.append([str(values.dtype).removeprefix("torch."), list(values.shape)])
    try:
        return out.finish(
            {
                "format": "ajpq",
                "version": VERSION,
                **graph,
                "modules": rows,
                "tensors": tensors,
                "extra": dict(extra or {}),
            }
        )
    except (TypeError, ValueError) as error:
        raise AjpqError(f"`extra` must be JSON data, but it is not ({error}); convert it first") from error


def check(network: Network) -> None:
    """Raises AjpqError where a finished network could not be packed, whatever the policy: for its operations, or for
    modules that are neither layers nor batch-norms. For callers that want to know before they spend time."""
    names, _ = graph_json.targets(graph_json.graph_to_json(network.module))
    ours = {layer.name for layer in network.layers} | {norm.name for norm in network.norms}
    for name in names:
        if name not in ours:
            module_json.module_to_json(name, network.module.get_submodule(name))


def unpack(parts: Mapping[str, Tensor]) -> fx.GraphModule:
    """The inverse of `pack`: a network in eval mode on the CPU, without gradients. AjpqError if it is malformed."""
    try:
        reader = Reader(parts)
        names, paths = graph_json.targets(reader.header)
        modules = {n: _take_module(reader, row) for n, row in zip(names, reader.header["modules"], strict=True)}
        tensors = {
            p: reader.take_any(getattr(torch, dtype), shape)
            for p, (dtype, shape) in zip(paths, reader.header["tensors"], strict=True)
        }
        reader.finish()
        network = graph_json.graph_from_json(reader.header, modules, tensors).eval().requires_grad_(False)
        round_as_read(network)
        return network
    except AjpqError:
        raise
    except Exception as error:  # the data may come from anyone, and then anything can be wrong with it
        raise AjpqError(
            f"a packed network must be well formed, but this is not ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); ship it again"
        ) from error
