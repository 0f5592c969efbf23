"""Physical removal: a network and the channels that survive -> an ordinary, smaller module with the same graph."""

from __future__ import annotations

import copy
import operator
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import moves, ops
from ajpq.branches import Skipped, may_be_shared
from ajpq.network import LayerSpec, Network


def shrink(network: Network, alive: np.ndarray, skipped: Skipped | None = None) -> fx.GraphModule:
    """A float copy of the network without its dead channels, in eval mode; all its float parameters can learn.

    alive: bool (n_channels,). skipped: branches that go as a whole. Module names are those of the original; layers are
        plain Conv2d and Linear. Its outputs equal those of the original with every dead kernel, its bias and its norm
        entries set to zero, and every skipped branch multiplied by zero.
    """
    parts: dict[str, Any] = {}
    skipped = skipped or network.without(())
    calls = (n for n in network.module.graph.nodes if n.op == "call_module" and n.name not in skipped.nodes)
    for name in dict.fromkeys(str(n.target) for n in calls):
        module = network.module.get_submodule(name)
        if name in network:
            parts[name] = _smaller_layer(module, network[name], alive)
        elif (norm := next((n for n in network.norms if n.name == name), None)) is not None:
            parts[name] = _smaller_norm(module, np.flatnonzero(alive[norm.channels]))
            parts[name].folds_into = norm.folds_into  # for `freeze`; survives pickling, as a node's meta does not
        else:
            parts[name] = copy.deepcopy(module)
    graph = _Emitter(network, alive, skipped, parts).graph()
    parts |= {name: copy.deepcopy(part) for name, part in parts.items() if isinstance(part, Tensor)}
    small = fx.GraphModule(parts, graph, class_name="Compressed").eval()
    for parameter in small.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # the original is frozen
    return small


def smaller_graph(network: Network, alive: np.ndarray, skipped: Skipped) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of `shrink` without its modules, and the tensors that its get_attr nodes name."""
    tensors: dict[str, Any] = {}
    return _Emitter(network, alive, skipped, tensors).graph(), tensors


def _take(tensor: Tensor | None, rows: np.ndarray) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach()[torch.from_numpy(rows)].clone())


def kept_weights(layer: LayerSpec, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the surviving kernels, and of the surviving inputs of a kernel (dimension 1 of its weights)."""
    kernels = np.flatnonzero(alive[layer.writes])
    inputs = np.arange(1) if layer.kind == "depthwise" else np.flatnonzero(alive[layer.inputs_of_a_kernel])
    return kernels, inputs


def _smaller_layer(module: nn.Conv2d | nn.Linear, layer: LayerSpec, alive: np.ndarray) -> nn.Conv2d | nn.Linear:
    kernels, inputs = kept_weights(layer, alive)
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            small: Any = nn.Linear(len(inputs), len(kernels), bias=module.bias is not None)
        else:
            c_in = int(alive[layer.reads].sum())
            groups = c_in if layer.kind == "depthwise" else module.groups
            small = nn.Conv2d(
                c_in,
                len(kernels),
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                groups,
                module.bias is not None,
                module.padding_mode,
            )
    small.weight = nn.Parameter(
        module.weight.detach()[torch.from_numpy(kernels)][:, torch.from_numpy(inputs)].contiguous()
    )
    small.bias = _take(module.bias, kernels)
    return small


def _smaller_norm(module: nn.Module, kept: np.ndarray) -> nn.Module:
    with torch.device("meta"):
        small = type(module)(len(kept), module.eps, module.momentum, module.affine, True)
    small.weight, small.bias = _take(module.weight, kept), _take(module.bias, kept)
    rows = torch.from_numpy(kept)
    small.running_mean, small.running_var = module.running_mean[rows].clone(), module.running_var[rows].clone()
    small.num_batches_tracked = module.num_batches_tracked.clone()
    return small


class _Emitter:
    """Copies the graph node by node; nodes that name channels by number are re-emitted as their `Move` says, the sum of
    a skipped branch becomes its shortcut."""

    def __init__(self, network: Network, alive: np.ndarray, skipped: Skipped, parts: dict[str, Any]) -> None:
        self.network, self.alive, self.skipped, self.parts = network, alive, skipped, parts
        self.new = fx.Graph()
        self.env: dict[str, fx.Node] = {}

    def graph(self) -> fx.Graph:
        optional = set()
        for node in self.network.module.graph.nodes:
            if node.name in self.skipped.nodes:
                continue
            if node.name in self.skipped.becomes:
                self.env[node.name] = self._shortcut(self.skipped.becomes[node.name])
                continue
            if node.op == "get_attr" and node.target not in self.parts:
                self.parts[node.target] = attrgetter(node.target)(self.network.module)
            move = self.network.moves.get(node.name)
            if move is None:
                emitted = self.new.node_copy(node, lambda n: self.env[n.name])
            else:
                emitted = getattr(self, f"_{move.kind}")(node, move)
            self.env[node.name] = emitted
            module = self.network.module.get_submodule(node.target) if node.op == "call_module" else None
            if node.op not in ("placeholder", "output") and ops.name_of(node, module) in ops.MOVE:
                optional.add(emitted)
        for node in reversed(
            list(self.new.nodes)
        ):  # chunks and views that a gather made unnecessary, and sizes only they used
            if not node.users and (node in optional or node.op == "get_attr" or _is_size(node)):
                self.new.erase_node(node)
        self.new.lint()
        return self.new

    def _shortcut(self, name: str) -> fx.Node:
        copied = may_be_shared(self.network, name, self.skipped)
        return self.new.call_method("clone", (self.env[name],)) if copied else self.env[name]

    def _kept(self, ids: np.ndarray) -> np.ndarray:
        return np.flatnonzero(self.alive[ids])

    def _gather(self, node: fx.Node, move: Any) -> fx.Node:
        if self.alive[self.network.values[move.root]].all():
            return self.new.node_copy(node, lambda n: self.env[n.name])
        root = self.env[move.root]
        source = self._kept(self.network.values[move.root])  # old positions that the new root still has
        wanted = move.index[self._kept(self.network.values[node.name])]
        index = np.searchsorted(source, wanted)
        if len(index) == len(source) and (index == np.arange(len(source))).all():
            copied = node.op != "call_module" and ops.name_of(node, None) == "clone"  # what follows may write in place
            return self.new.call_method("clone", (root,)) if copied else root
        if len(index) and (np.diff(index) == 1).all():
            return self.new.call_function(torch.narrow, (root, 1, int(index[0]), len(index)))
        name = f"_channels_of_{node.name}"
        self.parts[name] = torch.from_numpy(index)
        return self.new.call_function(torch.index_select, (root, 1, self.new.get_attr(name)))

    def _flatten(self, node: fx.Node, move: Any) -> fx.Node:
        return self.new.call_function(torch.flatten, (self.env[move.root], 1))

    def _pad(self, node: fx.Node, move: Any) -> fx.Node:
        pads = [int(p) for p in move.index]  # two per dimension, from the last one backwards
        ids, at = self.network.values[node.name], len(pads) - 4
        before, after = pads[at : at + 2]
        pads[at : at + 2] = [int(self.alive[ids[:before]].sum()), int(self.alive[ids[len(ids) - after :]].sum())]
        return self.new.call_function(nn.functional.pad, (self.env[node.all_input_nodes[0].name], tuple(pads[:-2])))

    def _resize(self, node: fx.Node, move: Any) -> fx.Node:
        emitted = self.new.node_copy(node, lambda n: self.env[n.name])
        name = ops.name_of(node, None) if node.op != "call_module" else ""
        size, old = int(self.alive[move.channels].sum()), len(move.channels)
        emitted.args, emitted.kwargs = moves.with_size(emitted.args, emitted.kwargs, name, move.axis, size, old)
        return emitted


_SIZES = frozenset(
    (getattr, operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub, operator.truediv)
)


def _is_size(node: fx.Node) -> bool:
    """Whether the node may compute sizes: x.shape, x.size(), and arithmetic on what they give."""
    return node.target == "size" if node.op == "call_method" else node.op == "call_function" and node.target in _SIZES
