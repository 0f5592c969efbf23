"""Who makes and who reads a tensor of an ONNX graph, for the passes over a written model."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


class Nodes:
    """made: name of a tensor -> the node that makes it. known: name -> weights and other constants. ends: names of the
    outputs. All as the graph was when this was made; readers as it is."""

    def __init__(self, proto: GraphProto) -> None:
        self.proto = proto
        self.known: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self.made = {name: node for node in proto.node for name in node.output}
        self.ends = {end.name for end in proto.output}

    def readers(self, name: str) -> list[NodeProto]:
        return [node for node in self.proto.node if name in node.input]

    def inner(self, maker: NodeProto, reader: NodeProto) -> bool:
        """Whether nothing else reads what the one makes for the other."""
        name = maker.output[0]
        return self.readers(name) == [reader] and name not in self.ends

    def values(self, name: str) -> np.ndarray | None:
        """Of a constant; None for what is computed."""
        return numpy_helper.to_array(self.known[name]) if name in self.known else None


def settings(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def drop_unread(graph: GraphProto) -> None:
    """Remove constants that no node reads, in place."""
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
