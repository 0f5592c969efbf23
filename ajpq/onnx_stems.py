"""Blocks of pixels as channels, from the image to the first max-pooling, where there are few channels at each pixel.

A runtime pays for every pixel of the first layers whatever they compute there: its vectors hold 16 channels or more, an
image has three. So a convolution that makes few channels, the 1x1 convolutions behind it and a 2x2 max-pooling are
written for blocks of 2 x 4 pixels: the first has a larger kernel and a stride, the others the same weights once per
pixel of a block, and the pooling is over four groups of channels. Sums of integers stay equal to the bit; float
layers may add up in another order (docs/onnx.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ajpq.onnx_nodes import Nodes, drop_unread, settings

FEW = 4  # channels: so many in a block of 8 pixels are what an int8 kernel multiplies at once
MOST = 128  # kernels: with more the 1x1 convolution's own work, eight times what it was, is what takes long
PAIRS = (2, 1)  # pairs of columns in a block: the first that divides the width
POINTWISE = frozenset(("QuantizeLinear", "DequantizeLinear", "Clip", "Relu"))


def fold_stems(model: ModelProto) -> None:
    """Rewrite every such beginning in place."""
    graph = Nodes(model.graph)
    pools = [node for node in model.graph.node if node.op_type == "MaxPool" and _halves(node)]
    found = [(pool, _stem(graph, pool)) for pool in pools]
    if not any(convs for _, convs in found):
        return
    sizes = _sizes(model)
    for pool, convs in found:
        rows, columns = sizes.get(convs[0].output[0], (0, 0)) if convs else (0, 0)
        pairs = next((n for n in PAIRS if columns % (2 * n) == 0), 0)
        if convs and rows and columns and rows % 2 == 0 and pairs:
            _fold(graph, pool, convs, _Blocks(rows, columns, pairs))
    drop_unread(model.graph)
    del model.graph.value_info[:]  # shapes of inner tensors, some of which are no longer true


@dataclass(frozen=True)
class _Blocks:
    """Images of so many rows and columns in blocks of 2 x 2 pairs pixels. The channels of a block are in the order
    (row and column within the pooling's window, pair of columns, channel of the pixel)."""

    rows: int
    columns: int
    pairs: int

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """Row and column within the block."""
        return [(row, 2 * pair + column) for row in (0, 1) for column in (0, 1) for pair in range(self.pairs)]

    def window(self, weight: np.ndarray) -> np.ndarray:
        """Kernels (o, i, kh, kw) for a pixel -> (pixels * o, i, kh + 1, kw + 2 pairs - 1) for a block."""
        o, i, kh, kw = weight.shape
        wide = np.zeros((len(self.pixels), o, i, kh + 1, kw + 2 * self.pairs - 1), weight.dtype)
        for n, (row, column) in enumerate(self.pixels):
            wide[n, :, :, row : row + kh, column : column + kw] = weight
        return wide.reshape(-1, *wide.shape[2:])

    def alike(self, weight: np.ndarray) -> np.ndarray:
        """Kernels (o, i, 1, 1) for a pixel -> (pixels * o, pixels * i, 1, 1): each pixel's by itself."""
        return np.kron(np.eye(len(self.pixels), dtype=weight.dtype), weight[..., 0, 0])[..., None, None]


def _halves(pool: NodeProto) -> bool:
    told = settings(pool)
    return (
        (told["kernel_shape"], told.get("strides")) == ([2, 2], [2, 2])
        and not any(told.get("pads", ()))
        and all(n == 1 for n in told.get("dilations", ()))
        and len(pool.output) == 1
    )


def _stem(graph: Nodes, pool: NodeProto) -> list[NodeProto]:
    """The convolutions in front of it that can be written for blocks, the first of them first; else none."""
    convs: list[NodeProto] = []
    node, reader = graph.made.get(pool.input[0]), pool
    while node is not None and graph.inner(node, reader):
        if node.op_type == "Conv":
            told = settings(node)
            if not _few(graph, node, told):
                break
            convs.insert(0, node)
            if any(n > 1 for n in told["kernel_shape"]):
                return convs if len(convs) > 1 else []
        elif node.op_type not in POINTWISE or not all(_one(graph, name) for name in node.input[1:] if name):
            break
        node, reader = graph.made.get(node.input[0]), node
    return []


def _few(graph: Nodes, conv: NodeProto, told: dict) -> bool:
    """Whether a convolution keeps the grid of pixels, reads few channels and has constant weights, float or int8
    around zero."""
    weight = _codes(graph, conv)
    few = weight is not None and weight.ndim == 4 and weight.shape[1] <= FEW and weight.shape[0] <= MOST
    if not few or told.get("group", 1) != 1:
        return False
    plain = all(n == 1 for key in ("strides", "dilations") for n in told.get(key, ()))
    if told.get("auto_pad", b"NOTSET") != b"NOTSET" or not plain:
        return False
    point = all(n == 1 for n in told["kernel_shape"])
    return not (point and any(told.get("pads", ()))) and all(name in graph.known for name in conv.input[2:] if name)


def _codes(graph: Nodes, conv: NodeProto) -> np.ndarray | None:
    """Weights of a convolution, or their codes; None where these are computed, or zero is no code."""
    made = graph.made.get(conv.input[1])
    if made is None:
        return graph.values(conv.input[1])
    constant = made.op_type == "DequantizeLinear" and all(name in graph.known for name in made.input)
    zero = np.any(graph.values(made.input[2])) if constant and len(made.input) > 2 else not constant
    return None if zero or settings(made).get("axis", 1) != 0 else graph.values(made.input[0])


def _one(graph: Nodes, name: str) -> bool:
    return name in graph.known and graph.values(name).size == 1


def _fold(graph: Nodes, pool: NodeProto, convs: list[NodeProto], blocks: _Blocks) -> None:
    for conv in convs:
        first, told = conv is convs[0], settings(conv)
        weight = _codes(graph, conv)
        wide = blocks.window(weight) if first else blocks.alike(weight)
        source = graph.made.get(conv.input[1])
        holder = conv if source is None else _own(graph, conv, source)
        place = 1 if source is None else 0
        holder.input[place] = _keep(graph, f"{conv.output[0]}_blocks", wide)
        for node, i in [(conv, 2)] if source is None else [(conv, 2), (holder, 1), (holder, 2)]:
            if len(node.input) > i and node.input[i]:
                values = np.tile(graph.values(node.input[i]), len(blocks.pixels))
                node.input[i] = _keep(graph, f"{conv.output[0]}_{node.op_type}{i}", values)
        if first:
            told |= {"strides": [2, 2 * blocks.pairs]}
        told |= {"kernel_shape": list(wide.shape[2:])}
        del conv.attribute[:]
        conv.attribute.extend(helper.make_attribute(key, value) for key, value in told.items())
    channels = len(_codes(graph, convs[-1])) // len(blocks.pixels)
    _pool_groups(graph, pool, blocks, channels)


def _own(graph: Nodes, conv: NodeProto, source: NodeProto) -> NodeProto:
    """A DequantizeLinear for this convolution alone."""
    here, values = list(graph.proto.node).index(conv), f"{conv.output[0]}_values"
    graph.proto.node.insert(here, helper.make_node("DequantizeLinear", list(source.input), [values], axis=0))
    made = graph.made[values] = graph.proto.node[here]  # inserted as a copy
    conv.input[1] = made.output[0]
    if not graph.readers(source.output[0]):
        graph.proto.node.remove(source)
    return made


def _pool_groups(graph: Nodes, pool: NodeProto, blocks: _Blocks, channels: int) -> None:
    """The larger of four groups of channels, as a pooling of pixels: runtimes that keep channels last move nothing."""
    name, here = pool.output[0], list(graph.proto.node).index(pool)
    pixels = blocks.rows // 2 * blocks.columns // (2 * blocks.pairs)
    groups = _keep(graph, f"{name}_groups", np.array([-1, pixels, 4, blocks.pairs * channels]))
    image = _keep(graph, f"{name}_image", np.array([-1, blocks.rows // 2, blocks.columns // 2, channels]))
    steps = [
        ("Transpose", [], {"perm": [0, 2, 3, 1]}),
        ("Reshape", [groups], {}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        ("MaxPool", [], {"kernel_shape": [1, 4], "strides": [1, 4]}),
        ("Transpose", [], {"perm": [0, 2, 3, 1]}),
        ("Reshape", [image], {}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
    ]
    read = pool.input[0]
    graph.proto.node.remove(pool)
    for n, (kind, more, told) in enumerate(steps):
        made = name if n == len(steps) - 1 else f"{name}_blocks_{n}"
        graph.proto.node.insert(here + n, helper.make_node(kind, [read, *more], [made], **told))
        read = made


def _keep(graph: Nodes, name: str, values: np.ndarray) -> str:
    graph.known[name] = numpy_helper.from_array(values, name)
    graph.proto.initializer.append(graph.known[name])
    return name


def _sizes(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Rows and columns of inner tensors; 0 where they are not fixed."""
    shaped = onnx.shape_inference.infer_shapes(model)
    dims = {info.name: info.type.tensor_type.shape.dim for info in shaped.graph.value_info}
    return {name: (dim[2].dim_value, dim[3].dim_value) for name, dim in dims.items() if len(dim) == 4}
