"""Operations in floats that stand between quantizers and must stay what they are.

ONNX Runtime (1.31) gives float weights of a convolution or matrix product between two quantizers 8 bits of its own
accord, and counts what hangs over the edge where it averages codes with `ceil_mode`.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ajpq.onnx_nodes import Nodes, settings

WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm"))


def keep_floats(model: ModelProto) -> None:
    """Limit what such operations read to the ends of its grid, in place: the same values, but no longer those of a
    quantizer."""
    graph = Nodes(model.graph)
    for node in list(model.graph.node):
        source = graph.made.get(node.input[0]) if node.input else None
        if source is None or source.op_type != "DequantizeLinear" or not _in_floats(graph, node):
            continue
        step, zero = (graph.values(name) for name in source.input[1:3])
        if step is None or zero is None or step.size != 1:
            continue
        limits = np.iinfo(zero.dtype)
        ends = [f"{source.output[0]}_{end}" for end in ("low", "high")]
        for name, code in zip(ends, (limits.min, limits.max), strict=True):
            if name not in graph.known:
                value = np.float32(code - int(zero)) * step.reshape(()).astype(np.float32)
                graph.known[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
                model.graph.initializer.append(graph.known[name])
        limited = f"{node.output[0]}_input"
        model.graph.node.insert(
            list(model.graph.node).index(node), helper.make_node("Clip", [node.input[0], *ends], [limited])
        )
        node.input[0] = limited


def _in_floats(graph: Nodes, node: NodeProto) -> bool:
    if node.op_type == "AveragePool":
        return bool(settings(node).get("ceil_mode"))
    return node.op_type in WEIGHTED and node.input[1] in graph.known
