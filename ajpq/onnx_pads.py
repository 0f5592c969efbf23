"""Zeros that a network puts around its activations: given to the convolutions behind them, kept from max-poolings.

A convolution of PyTorch pads both sides alike, so TensorFlow's SAME is a padding of its own before it: one more tensor
to move, and in front of a quantizer one that runtimes keep in float. A convolution of ONNX has a number for every side.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ajpq.onnx_nodes import Nodes, drop_unread


def fold_pads(model: ModelProto) -> None:
    """Move paddings by zeros of rows and columns into the convolutions behind them, in place, where all that reads them
    are convolutions, directly or behind quantizers: the same outputs, for a grid has its zero."""
    graph = Nodes(model.graph)
    for pad in [node for node in model.graph.node if node.op_type == "Pad"]:
        sides = _sides(graph, pad)
        convs = _convolutions(graph, pad.output[0]) if sides else None
        if not convs or _between_grids(graph, pad):
            continue
        for conv in convs:
            pads = next(a for a in conv.attribute if a.name == "pads")
            pads.CopyFrom(helper.make_attribute("pads", [a + b for a, b in zip(pads.ints, sides, strict=True)]))
        for node in graph.readers(pad.output[0]):
            for i, name in enumerate(node.input):
                if name == pad.output[0]:
                    node.input[i] = pad.input[0]
        model.graph.node.remove(pad)
        del model.graph.value_info[:]  # shapes of inner tensors, some of which are no longer true
    _keep_from_pools(graph)
    drop_unread(model.graph)


def _keep_from_pools(graph: Nodes) -> None:
    """ONNX Runtime (1.31) makes pads of a MaxPool of zeros in front of it, though those of a MaxPool are less than any
    number: where all that a window sees is negative it gives that, not zero. It leaves a smallest number alone."""
    for pad in [node for node in graph.proto.node if node.op_type == "Pad" and _sides(graph, node)]:
        if any(node.op_type == "MaxPool" for node in graph.readers(pad.output[0])):
            name = pad.output[0] + "_nearly_zero"
            graph.proto.initializer.append(numpy_helper.from_array(np.float32(1e-30), name))
            pad.input[2:] = [name]


def _sides(graph: Nodes, pad: NodeProto) -> list[int] | None:
    """Top, left, bottom, right of zeros around (N, C, H, W); None for any other padding."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    _, amounts, value, axes, *_ = [*pad.input, "", "", ""]
    filled = value and (value not in graph.known or np.any(graph.values(value)))
    if mode != b"constant" or amounts not in graph.known or axes or filled:
        return None
    found = graph.values(amounts).tolist()
    inner = [n for i, n in enumerate(found) if i % 4 >= 2]
    return inner if len(found) == 8 and sum(map(abs, found)) == sum(inner) and min(inner) >= 0 else None


def _convolutions(graph: Nodes, name: str, zero: float = 0.0) -> list[NodeProto] | None:
    """The convolutions that read a tensor, directly or through quantizers and limits that keep its zeros; None if
    anything else does, or it is an output of the graph. zero: what they are in this tensor."""
    found: list[NodeProto] = []
    if name in graph.ends:
        return None
    for node in graph.readers(name):
        if node.input[0] != name or name in node.input[1:]:
            return None
        if node.op_type == "Conv":
            behind = [node] if any(a.name == "pads" for a in node.attribute) else None
        else:
            here = _passed(graph, node, zero)
            behind = None if here is None else _convolutions(graph, node.output[0], here)
        if behind is None:
            return None
        found += behind
    return found


def _between_grids(graph: Nodes, pad: NodeProto) -> bool:
    """Whether the padding keeps two quantizers of different steps apart, which ONNX Runtime would make one of."""
    before = graph.made.get(pad.input[0])
    if before is None or before.op_type != "DequantizeLinear":
        return False
    behind = [node for node in graph.readers(pad.output[0]) if node.op_type == "QuantizeLinear"]
    return any(before.input[1:] != node.input[1:] for node in behind)


def _passed(graph: Nodes, node: NodeProto, zero: float) -> float | None:
    """What becomes of the zeros; None where they do not stay zeros, or nobody knows."""
    _, first, second, *_ = [*map(graph.values, node.input), None, None]
    if node.op_type == "QuantizeLinear" and second is not None and second.size == 1:
        return float(second)
    if node.op_type == "DequantizeLinear" and second is not None and second.size == 1 and float(second) == zero:
        return 0.0
    if node.op_type == "Clip" and first is not None and second is not None and first <= zero <= second:
        return zero
    return None
