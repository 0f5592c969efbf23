"""Inputs of int8 convolutions in fours, where nothing was pruned that `ajpq.padding` could give back: images of three
colours, say.

ONNX Runtime 1.31 multiplies four inputs at once; with three, a convolution of integers takes two to three times as long
as with four (docs/onnx.md).
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ajpq.onnx_layers import NARROW
from ajpq.onnx_nodes import Nodes, settings

FOUR = 4


def fill_fours(model: ModelProto) -> None:
    """Give every int8 convolution without groups a multiple of four inputs, in place.

    What is added are zeros that meet zero weights, so integer sums stay equal to the bit. They come from kernels of
    zeros, where the input is made by a narrow float depthwise layer (which then has a weight for all pairs, and may add
    up in another order), else from a padding of the codes.
    """
    graph = Nodes(model.graph)
    for number, conv in enumerate([node for node in graph.proto.node if node.op_type == "Conv"]):
        weight = graph.made.get(conv.input[1])
        if settings(conv).get("group", 1) > 1 or weight is None or weight.op_type != "DequantizeLinear":
            continue
        codes = graph.known[weight.input[0]]
        more = -codes.dims[1] % FOUR
        source = _quantizer_alone_before(graph, conv)
        alone = graph.readers(weight.input[0]) == [weight] and graph.readers(weight.output[0]) == [conv]
        if not more or source is None or not alone:
            continue
        _grow(codes, more, 1)
        quantizer, values = source
        maker = graph.made.get(quantizer.input[0])
        if maker is not None and _narrow(graph, maker) and graph.inner(maker, quantizer):
            _make_dense(graph, maker, more)
        else:
            _pad_codes(graph, values, more, f"fours_{number}")
    del model.graph.value_info[:]  # shapes of inner tensors, some of which are no longer true


def _quantizer_alone_before(graph: Nodes, conv: NodeProto) -> tuple[NodeProto, NodeProto] | None:
    """QuantizeLinear and DequantizeLinear whose values nothing but this convolution reads: of two alike in a row
    the first. A Clip of the codes may stand between them."""
    found, reader = None, conv
    while True:
        values = graph.made.get(reader.input[0])
        codes = None if values is None else graph.made.get(values.input[0])
        inner = [values, codes]
        if codes is not None and codes.op_type == "Clip":
            codes = graph.made.get(codes.input[0])
            inner.append(codes)
        if codes is None or (values.op_type, codes.op_type) != ("DequantizeLinear", "QuantizeLinear"):
            return found
        if any(len(graph.readers(node.output[0])) != 1 or node.output[0] in graph.ends for node in inner):
            return found
        if found is not None and found[0].input[1:] != codes.input[1:]:
            return found
        found, reader = (codes, values), codes


def _narrow(graph: Nodes, node: NodeProto) -> bool:
    """A depthwise convolution of float weights, with as many kernels as inputs, fewer than `NARROW`."""
    if node.op_type != "Conv" or node.input[1] not in graph.known:
        return False
    tensors = [name for name in node.input[1:] if name]
    kernels, of_one = graph.known[node.input[1]].dims[:2]
    alone = all(name in graph.known and graph.readers(name) == [node] for name in tensors)
    return alone and settings(node).get("group", 1) == kernels < NARROW and of_one == 1


def _make_dense(graph: Nodes, node: NodeProto, more: int) -> None:
    weight = numpy_helper.to_array(graph.known[node.input[1]])  # (c, 1, kh, kw)
    c = len(weight)
    dense = np.zeros((c + more, c, *weight.shape[2:]), weight.dtype)
    dense[np.arange(c), np.arange(c)] = weight[:, 0]
    graph.known[node.input[1]].CopyFrom(numpy_helper.from_array(dense, node.input[1]))
    if len(node.input) > 2 and node.input[2]:
        _grow(graph.known[node.input[2]], more, 0)
    next(a for a in node.attribute if a.name == "group").i = 1


def _pad_codes(graph: Nodes, values: NodeProto, more: int, name: str) -> None:
    """In front of a DequantizeLinear."""
    amounts = np.array([0, 0, 0, 0, 0, more, 0, 0])  # before (N, C, H, W), then behind
    graph.proto.initializer.append(numpy_helper.from_array(amounts, name))
    made = helper.make_node("Pad", [values.input[0], name, values.input[2]], [f"{name}_codes"], mode="constant")
    values.input[0] = made.output[0]
    graph.proto.node.insert(list(graph.proto.node).index(values), made)


def _grow(tensor: TensorProto, more: int, axis: int) -> None:
    """Zeros behind the last entries of an axis."""
    values = numpy_helper.to_array(tensor)
    room = [(0, more if i == axis else 0) for i in range(values.ndim)]
    tensor.CopyFrom(numpy_helper.from_array(np.pad(values, room), tensor.name))
