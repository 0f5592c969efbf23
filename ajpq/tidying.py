"""A traced graph in one form: what forwards write in several ways is written in the way that all later steps know."""

from __future__ import annotations

import torch
from torch import fx, nn

from ajpq import ops


def tidy(module: fx.GraphModule) -> None:
    """Rewrite the graph in place; the outputs stay."""
    for node in list(module.graph.nodes):
        node.type = None  # annotations tell nothing, and some torch cannot pickle one that is a string
        _copy_out(module.graph, node)
        _name_no_input(node)
        _drop_identity(module, node)
    for node in module.graph.nodes:
        _reshape(module, node)
    module.recompile()


def _name_no_input(node: fx.Node) -> None:
    """The input of a module or function that is called as ``conv(input=x)`` becomes its first argument, where all look
    for it."""
    if node.op not in ("call_module", "call_function") or node.args or len(node.all_input_nodes) != 1:
        return
    name, value = next(iter(node.kwargs.items()), ("", None))
    if value is node.all_input_nodes[0] and (node.op == "call_module" and len(node.kwargs) == 1 or name == "input"):
        node.args, node.kwargs = (value,), {key: v for key, v in node.kwargs.items() if key != name}


def _copy_out(graph: fx.Graph, node: fx.Node) -> None:
    """``torch.clamp(x, out=y)`` becomes ``y.copy_(torch.clamp(x))``: what writes in place writes into its first
    input."""
    into = node.kwargs.get("out")
    if node.op != "call_function" or not isinstance(into, fx.Node):
        return
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    with graph.inserting_after(node):
        copied = graph.call_method("copy_", (into,))
    node.replace_all_uses_with(copied)
    copied.args = (into, node)


def _drop_identity(module: fx.GraphModule, node: fx.Node) -> None:
    """What stands where a batch-norm was folded or dropout left out would hide that a ReLU follows a layer."""
    if node.op != "call_module" or not isinstance(module.get_submodule(node.target), nn.Identity):
        return
    if [*node.args, *node.kwargs.values()] == node.all_input_nodes:  # of one value, and no more
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)


def _reshape(module: fx.GraphModule, node: fx.Node) -> None:
    """Views that nobody writes into, because images may come in channels-last order."""
    if node.op == "call_method" and node.target == "view" and not any(isinstance(a, torch.dtype) for a in node.args):
        if not _is_written(module, node):
            node.target = "reshape"


def _is_written(module: fx.GraphModule, node: fx.Node) -> bool:
    for user in node.users:
        if user.op not in ("call_module", "call_function", "call_method"):
            continue
        part = module.get_submodule(user.target) if user.op == "call_module" else None
        if ops.in_place(user, part) or ops.name_of(user, part) in ops.MOVE and _is_written(module, user):
            return True
    return False
