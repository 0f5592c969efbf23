"""Zeros that a network puts around its activations, given to the convolutions that read them.

A convolution of PyTorch pads both sides alike, so TensorFlow's SAME is a padding of its own before it: one more tensor
to move, and in front of a quantizer one that runtimes keep in float. A convolution of ONNX has a number for every side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper


def fold_pads(model: ModelProto) -> None:
    """Move paddings by zeros of rows and columns into the convolutions behind them, in place, where all that reads them
    are convolutions, directly or behind quantizers: the same outputs, for a grid has its zero."""
    graph = model.graph
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ends = {end.name for end in graph.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        sides = _sides(pad, known)
        convs = _convolutions(graph.node, pad.output[0], known, ends) if sides else None
        if not convs or _between_grids(pad, graph.node):
            continue
        for conv in convs:
            pads = next(a for a in conv.attribute if a.name == "pads")
            pads.CopyFrom(helper.make_attribute("pads", [a + b for a, b in zip(pads.ints, sides, strict=True)]))
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == pad.output[0]:
                    node.input[i] = pad.input[0]
        graph.node.remove(pad)
        del graph.value_info[:]  # shapes of inner tensors, some of which are no longer true
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _sides(pad: NodeProto, known: Mapping[str, np.ndarray]) -> list[int] | None:
    """Top, left, bottom, right of zeros around (N, C, H, W); None for any other padding."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    _, amounts, value, axes, *_ = [*pad.input, "", "", ""]
    if mode != b"constant" or amounts not in known or axes or (value and np.any(known.get(value, 1))):
        return None
    found = known[amounts].tolist()
    inner = [n for i, n in enumerate(found) if i % 4 >= 2]
    return inner if len(found) == 8 and sum(map(abs, found)) == sum(inner) and min(inner) >= 0 else None


def _convolutions(
    nodes: Sequence[NodeProto], name: str, known: Mapping[str, np.ndarray], ends: Collection[str], zero: float = 0.0
) -> list[NodeProto] | None:
    """The convolutions that read a tensor, directly or through quantizers and limits that keep its zeros; None if
    anything else does, or it is among `ends`. zero: what they are in this tensor."""
    found: list[NodeProto] = []
    if name in ends:
        return None
    for node in (node for node in nodes if name in node.input):
        if node.input[0] != name or name in node.input[1:]:
            return None
        if node.op_type == "Conv":
            behind = [node] if any(a.name == "pads" for a in node.attribute) else None
        else:
            here = _passed(node, zero, known)
            behind = None if here is None else _convolutions(nodes, node.output[0], known, ends, here)
        if behind is None:
            return None
        found += behind
    return found


def _between_grids(pad: NodeProto, nodes: Sequence[NodeProto]) -> bool:
    """Whether the padding keeps two quantizers of different steps apart, which ONNX Runtime would make one of."""
    before = [node for node in nodes if pad.input[0] in node.output and node.op_type == "DequantizeLinear"]
    behind = [node for node in nodes if pad.output[0] in node.input and node.op_type == "QuantizeLinear"]
    return any(a.input[1:] != b.input[1:] for a in before for b in behind)


def _passed(node: NodeProto, zero: float, known: Mapping[str, np.ndarray]) -> float | None:
    """What becomes of the zeros; None where they do not stay zeros, or nobody knows."""
    _, first, second, *_ = [*(known.get(name) for name in node.input), None, None]
    if node.op_type == "QuantizeLinear" and second is not None and second.size == 1:
        return float(second)
    if node.op_type == "DequantizeLinear" and second is not None and second.size == 1 and float(second) == zero:
        return 0.0
    if node.op_type == "Clip" and first is not None and second is not None and first <= zero <= second:
        return zero
    return None
