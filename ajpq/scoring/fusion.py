"""The graph of a candidate as steps: a layer together with the batch-norm, the addition and the activation functions
that follow it, or any other operation by itself. No step writes into a tensor that another one made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ajpq import ops
from ajpq.network import Network

UNARY = frozenset(
    "relu relu6 hardtanh hardswish silu gelu leakyrelu leaky_relu elu selu celu mish tanh softplus softsign sigmoid "
    "hardsigmoid logsigmoid dropout dropout1d dropout2d identity".split()
)
FRESH = frozenset("add sub mul cat concat concatenate mean".split())  # out of place: a new tensor


class Unfit(Exception):
    """This graph cannot be run in steps; the reference module must be."""


@dataclass(eq=False)
class Group:
    """Nodes that run together. head: the first of them; other: what an absorbed addition adds; tail: the rest."""

    head: fx.Node
    layer: str | None = None
    norm: str | None = None
    other: fx.Node | None = None
    tail: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What all candidates with the same surviving channels have in common."""

    groups: tuple[Group, ...]  # in an order in which they can run
    tensors: Mapping[str, Tensor]  # of get_attr nodes
    input: fx.Node
    output: Any  # argument of the output node
    modules: Mapping[str, nn.Module]


def skeleton(network: Network, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Skeleton:
    """Raises Unfit where an operation writes in place what is read again."""
    modules = {str(n.target): network.module.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}
    place = {node: i for i, node in enumerate(graph.nodes)}
    _check_writes(graph, modules, place)
    norms = {norm.name: norm.folds_into for norm in network.norms}
    absorbed: set[fx.Node] = set()
    ends: dict[fx.Node, Group] = {}
    inputs, output = [], None
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(node)
        elif node.op == "output":
            output = node.args[0]
        elif node.op != "get_attr" and node not in absorbed:
            group = _grow(node, network, modules, norms, absorbed)
            absorbed.update(group.nodes)
            ends[group.last] = group
    return Skeleton(tuple(ends[node] for node in graph.nodes if node in ends), tensors, inputs[0], output, modules)


def _grow(node: fx.Node, network: Network, modules: Mapping, norms: Mapping[str, str | None], absorbed: set) -> Group:
    group = Group(node, nodes=[node])
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if node.op == "call_module" and node.target in network:
        group.layer = str(node.target)
    elif node.op == "call_module" and node.target in norms:
        group.norm = str(node.target)
    elif ops.name_of(node, module) not in FRESH or ops.in_place(node, module):
        return group
    while len(group.last.users) == 1:
        last, follower = group.last, next(iter(group.last.users))
        module = modules.get(str(follower.target)) if follower.op == "call_module" else None
        name = ops.name_of(follower, module) if follower.op not in ("output", "get_attr") else ""
        if follower in absorbed:
            break
        if group.layer and len(group.nodes) == 1 and norms.get(str(follower.target)) == group.layer:
            group.norm = str(follower.target)
        elif group.layer and not group.tail and group.other is None and _adds(follower, name, last):
            group.other = next(n for n in follower.all_input_nodes if n is not last)
        elif name in UNARY and follower.all_input_nodes == [last] and follower.args[:1] == (last,):
            group.tail.append(follower)
        else:
            break
        group.nodes.append(follower)
    return group


def _adds(node: fx.Node, name: str, last: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs and len(node.all_input_nodes) == 2
    both = all(isinstance(arg, fx.Node) for arg in node.args)
    return name in ("add", "iadd") and plain and both and (node.args[0] is last or not ops.in_place(node, None))


def _check_writes(graph: fx.Graph, modules: Mapping, place: Mapping[fx.Node, int]) -> None:
    alias: dict[fx.Node, set[fx.Node]] = {}  # nodes that may share memory
    writes = []
    for node in graph.nodes:
        alias[node] = {node}
        if node.op in ("placeholder", "output", "get_attr") or not node.all_input_nodes:
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        written = ops.in_place(node, module)
        if written or ops.name_of(node, module) in ops.MOVE:
            shared = alias[node.all_input_nodes[0]]
            shared.add(node)
            alias[node] = shared
        if written:
            writes.append(node)
    for node in writes:
        for member in alias[node]:
            late = [user for user in member.users if place[user] > place[node]]
            if place[member] < place[node] and late:
                raise Unfit(f"{node.name} writes into {member.name}, which {late[0].name} reads")


def caller(node: fx.Node, modules: Mapping[str, nn.Module], tensors: Mapping[str, Any]) -> Callable[..., Any]:
    """The operation of a node as a function of its input values, in the order of `inputs_of(node)`."""
    names = inputs_of(node)

    def call(*values: Any) -> Any:
        found = dict(zip(names, values, strict=True))

        def value(n: fx.Node) -> Any:
            return tensors[n.target] if n.op == "get_attr" else found[n]

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return modules[node.target](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        receiver, *rest = args
        if node.target == "view" and not any(not isinstance(a, (int, tuple, list)) for a in rest):
            return receiver.reshape(*rest)  # the tensor may have another memory format than the model was written for
        return getattr(receiver, node.target)(*rest, **kwargs)

    return call


def inputs_of(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr"]
