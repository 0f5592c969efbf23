"""A traced module as plain parts that pickle, and back, exactly.

torch pickles a `fx.GraphModule` as source code and traces that again, which renames nodes and forgets what was noted
on them. All that tracing proved is keyed by the names of nodes, so here the nodes themselves are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ajpq.graph_json import FUNCTIONS

_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
_PLAIN = (str, bool, int, float, type(None))


@dataclass(frozen=True)
class _Result:
    """Stands for a node among the arguments of a later one."""

    place: int


@dataclass(frozen=True)
class _Function:
    """Stands for a function of torch; some, as F.max_pool2d, have no name by which pickle would find them."""

    name: str


@dataclass(frozen=True)
class PackedGraph:
    """name: of the class. state: parameters, buffers and submodules. nodes: rows (op, name, target, args, kwargs, type,
    notes), in order; of a node's `meta` the notes keep what is plain."""

    name: str
    state: dict[str, Any]
    nodes: tuple[tuple[Any, ...], ...]


def pack(module: fx.GraphModule) -> PackedGraph:
    place = {node: i for i, node in enumerate(module.graph.nodes)}

    def row(node: fx.Node) -> tuple[Any, ...]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _Result(place[n]))
        target = _Function(_NAMES[node.target]) if node.target in _NAMES else node.target
        notes = {key: value for key, value in node.meta.items() if isinstance(value, _PLAIN)}
        return node.op, node.name, target, args, kwargs, node.type, notes

    state = {key: value for key, value in vars(module).items() if key != "_graph"}
    return PackedGraph(type(module).__name__, state, tuple(map(row, place)))


def unpack(packed: PackedGraph) -> fx.GraphModule:
    graph, nodes = fx.Graph(), []

    def filled(value: Any) -> Any:
        return nodes[value.place] if isinstance(value, _Result) else value

    for op, name, target, args, kwargs, of_type, notes in packed.nodes:
        args, kwargs = fx.node.map_aggregate((args, kwargs), filled)
        target = FUNCTIONS[target.name] if isinstance(target, _Function) else target
        nodes.append(graph.create_node(op, target, args, kwargs, name, of_type))
        nodes[-1].meta.update(notes)
    module = fx.GraphModule(nn.Module(), fx.Graph(), packed.name)
    vars(module).update(packed.state)
    module.graph = graph
    return module
