"""Residual branches: what can be left out of a network because a sum lives on by its shortcut. Found by graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ajpq import ops
from ajpq.bitstream import words_of

if TYPE_CHECKING:
    from ajpq.network import Network


@dataclass(frozen=True)
class Branch:
    """One of the two operands of a sum, `end`, with all that is computed for it alone; `shortcut` is the other one."""

    sum: str  # names of nodes
    end: str
    shortcut: str
    nodes: frozenset[str]
    layers: tuple[str, ...]  # in execution order


@dataclass(frozen=True, eq=False)
class Skipped:
    """What leaves the network with some of its branches."""

    nodes: frozenset[str]
    layers: frozenset[str]
    norms: frozenset[str]
    parameters: int  # floats of other modules
    dead: np.ndarray  # bool (n_channels,): channels that nothing else holds
    unwritten: np.ndarray  # bool (n_channels,): living channels that have lost all their writers
    becomes: Mapping[str, str]  # node of a sum -> node of its shortcut


def branches_of(network: Network) -> tuple[Branch, ...]:
    """The branches that may be skipped, in the order of their sums.

    Our choice: a branch is that operand of an addition of two tensors which has more layers of its own, those used by
    this addition alone; the shortcut is the other operand: the branch's input, moved, pooled, padded or projected. The
    shortcut must have the shape and channels of the sum, so that the sum can become it; no layer of the branch may
    also be called elsewhere, and no operation of it may write into a tensor from outside.
    """
    nodes, found = list(network.module.graph.nodes), []
    with torch.no_grad():
        shapes = _Shapes(network.module)
        shapes.run(network.example.clone())
    for node in nodes:
        if not _adds(node):
            continue
        alone = [_alone(nodes, arg, node) for arg in node.args]
        layers = [_layers(network, part) for part in alone]
        more = int(len(layers[1]) > len(layers[0]))
        end, shortcut, inside = node.args[more], node.args[1 - more], alone[more]
        names = [n.name for n in (node, shortcut)]
        if (
            len(layers[more]) > len(layers[1 - more])
            and all(name in network.values for name in names)
            and np.array_equal(*(network.values[name] for name in names))
            and shapes.seen[node.name] == shapes.seen[shortcut.name]
            and not any(n.op == "call_module" and n.target in layers[more] for n in nodes if n not in inside)
            and not any(ops.in_place(n, _module(network, n)) and _writes_outside(network, n, inside) for n in inside)
            and not (ops.in_place(node, None) and more == 1 and _shared(network, shortcut, inside))
        ):
            found.append(Branch(node.name, end.name, shortcut.name, frozenset(n.name for n in inside), layers[more]))
    return tuple(found)


def skip(network: Network, layers: Collection[str]) -> Skipped:
    """What goes when these layers are empty: every branch that has no other."""
    gone = [branch for branch in network.branches if set(branch.layers) <= set(layers)]
    nodes = frozenset().union(*(branch.nodes for branch in gone))
    names = frozenset(name for branch in gone for name in branch.layers)
    calls = {str(n.target) for n in network.module.graph.nodes if n.op == "call_module" and n.name not in nodes}
    norms = frozenset(norm.name for norm in network.norms if norm.name not in calls)
    held, written, ever = (np.zeros(network.n_channels, bool) for _ in range(3))
    for name, ids in network.values.items():
        held[ids] |= name not in nodes
    for layer in network.layers:
        held[layer.reads] |= layer.name not in names
        held[layer.writes] |= layer.name not in names
        written[layer.writes] |= layer.name not in names
        ever[layer.writes] = True
    for norm in network.norms:
        held[norm.channels] |= norm.name not in norms
    becomes = {branch.sum: branch.shortcut for branch in gone}
    dead = ~held if gone else np.zeros_like(held)
    return Skipped(nodes, names, norms, _other_parameters(network, nodes), dead, ever & ~written & ~dead, becomes)


def may_be_shared(network: Network, shortcut: str, skipped: Skipped) -> bool:
    """Whether somebody else may read, after a sum has become its shortcut, what is then written into it in place."""
    graph = network.module.graph
    if not any(ops.in_place(n, _module(network, n)) for n in graph.nodes if n.op not in _NO_CALL):
        return False
    gone = {n for n in graph.nodes if n.name in skipped.nodes}
    return _shared(network, next(n for n in graph.nodes if n.name == shortcut), gone)


_NO_CALL = ("placeholder", "output", "get_attr")


def _adds(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or ops.name_of(node, None) not in ("add", "iadd"):
        return False
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    return not node.kwargs and len(node.args) == len(set(tensors)) == 2


def _alone(nodes: list[fx.Node], end: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """The nodes that are computed for `end` alone, which `reader` alone reads."""
    found = {end} if set(end.users) == {reader} and end.op not in _NO_CALL else set()
    for node in reversed(nodes[: nodes.index(end)]):
        if node.op != "placeholder" and node.users and set(node.users) <= found:
            found.add(node)
    return found


def _layers(network: Network, nodes: set[fx.Node]) -> tuple[str, ...]:
    names = {str(n.target) for n in nodes if n.op == "call_module"}
    return tuple(layer.name for layer in network.layers if layer.name in names)


def _module(network: Network, node: fx.Node) -> Any:
    return network.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_fresh(network: Network, node: fx.Node) -> bool:
    """Whether a node certainly makes a tensor of its own."""
    if node.op == "call_module" and (node.target in network or any(n.name == node.target for n in network.norms)):
        return True
    return len(node.all_input_nodes) > 1 and not ops.in_place(node, _module(network, node))


def _shared(network: Network, node: fx.Node, gone: set[fx.Node]) -> bool:
    """Whether several nodes, beside those gone, may read the memory of a node's value, or the network's user may."""
    while node.op not in _NO_CALL and len(set(node.users) - gone) <= 1:
        if _is_fresh(network, node):
            return False
        node = node.all_input_nodes[0]
    return True


def _writes_outside(network: Network, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether what a node writes into may be a tensor from outside."""
    written = node.all_input_nodes[0]
    while written in inside and not _is_fresh(network, written) and written.all_input_nodes:
        written = written.all_input_nodes[0]
    return written not in inside


def _other_parameters(network: Network, gone: frozenset[str]) -> int:
    """32-bit words of modules that are neither layers nor norms and that only these nodes use."""
    used = {str(n.target) for n in network.module.graph.nodes if n.op in ("call_module", "get_attr")}
    staying = {
        str(n.target) for n in network.module.graph.nodes if n.op in ("call_module", "get_attr") and n.name not in gone
    }
    going = used - staying - set(network.index) - {norm.name for norm in network.norms}
    tensors: list[tuple[str, Tensor]] = [*network.module.named_parameters(), *network.module.named_buffers()]
    return sum(
        words_of(name, t)
        for name, t in tensors
        if any(name == target or name.startswith(f"{target}.") for target in going)
    )


class _Shapes(fx.Interpreter):
    """Shape and type of every tensor of the graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple] = {}

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        self.seen[node.name] = (tuple(out.shape), out.dtype) if isinstance(out, Tensor) else ()
        return out
