"""A finished network as a graph of modules that the ONNX exporter writes as int8 layers between QuantizeLinear and
DequantizeLinear.

ONNX Runtime computes a convolution in integers only where its output goes straight into a quantizer. Where all that
reads the output is one quantizer, through operations that only move values, its twin is put behind the convolution,
which changes nothing. Elsewhere (residual sums, gates, means, several readers) the output is rounded to 8 bits over the
range seen on the images: the only rounding that the network itself does not have, half a step of that grid. (A step per
channel would round less, but ONNX Runtime 1.31 fuses a sum behind it into a node that it then refuses.)
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import ops
from ajpq.layers import FrozenLayer
from ajpq.onnx_layers import Grid, Layer, Quantizer
from ajpq.quantize import FLOAT

_RELUS = frozenset(("relu", "relu6", "hardtanh"))
_MOVES = (
    ops.MOVE
    | ops.CONCAT
    | ops.PAD
    | _RELUS
    | frozenset("identity maxpool2d max_pool2d adaptivemaxpool2d adaptive_max_pool2d boolean_dispatch".split())
)
_SIZES = frozenset(("size", "dim", "getattr"))


class _Ranges(fx.Interpreter):
    """Of the results of some nodes: the lowest value, the highest, and how many positions a channel has."""

    def __init__(self, network: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(network)
        self.wanted, self.found = wanted, {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.name in self.wanted:
            self.found[node.name] = result.min().item(), result.max().item(), result[0, 0].numel()
        return result


class _Rewriter:
    """Puts quantizers into a copy of a finished network."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.net = copy.deepcopy(network)
        self.inputs: dict[fx.Node, Grid] = {}  # layer -> grid of what it reads
        self.ends: dict[fx.Node, None] = {}  # what should come out of an integer convolution quantized
        self.grids: dict[fx.Node, Grid] = {}  # quantizers put in
        for name, layer in network.named_modules():
            if isinstance(layer, FrozenLayer):
                self.net.set_submodule(name, Layer(layer))
        for node in self.net.graph.nodes:
            layer = network.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(layer, FrozenLayer) and layer.act.bits != FLOAT:
                self.inputs[node] = Grid.of(layer.act)
                if layer.geometry.conv and self.net.get_submodule(node.target).integer:
                    reader = next(iter(node.users))
                    alone = len(node.users) == 1 and self.name(reader) in _RELUS
                    self.ends[reader if alone else node] = None

    def name(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output", "get_attr"):
            return node.op
        return ops.name_of(node, self.net.get_submodule(node.target) if node.op == "call_module" else None)

    def quantize_outputs(self, seen: dict[str, tuple[float, float, int]]) -> None:
        for end in self.ends:
            readers, (low, high, positions) = self.readers(end), seen[end.name]
            if "output" in readers or len(end.users) == 1 and next(iter(end.users)) in self.inputs:
                continue
            twins = [grid for grid in readers if isinstance(grid, Grid) and len(readers) == 1]
            if twins or positions > 1:
                self.put(twins[0] if twins else Grid.over(low, high), end, end.next, list(end.users))

    def quantize_inputs(self) -> None:
        for node, grid in self.inputs.items():
            self.put(grid, node.args[0], node, [node])

    def put(self, grid: Grid, source: fx.Node, before: fx.Node, users: list[fx.Node]) -> None:
        """A quantizer between the result of a node and some of its users."""
        target = f"quantizer_{len(self.grids)}"
        self.net.add_submodule(target, nn.Identity())
        with self.net.graph.inserting_before(before):
            made = self.net.graph.call_module(target, (source,))
        for user in users:
            user.replace_input_with(source, made)
        self.grids[made] = grid

    def readers(self, node: fx.Node) -> set[Grid | str]:
        """The grids that what moves the values of a node leads to, and the names of all else that reads them."""
        found: set[Grid | str] = set()
        for user in node.users:
            if user in self.inputs:
                found.add(self.inputs[user].whole)
            elif (name := self.name(user)) in _MOVES:
                found |= self.readers(user)
            elif name not in _SIZES:
                found.add(name)
        return found

    def clip_as_integers(self) -> None:
        """ReLU and ReLU6 before quantizers become limits of the codes: runtimes then see the convolution end in one."""
        for node in list(self.net.graph.nodes):
            top = self.top_of_relu(node)
            if top is None or not all(user in self.grids for user in node.users):
                continue
            for user in list(node.users):
                grid = self.grids[user]
                high = min(grid.high, grid.zero + round(min(float(np.float32(top) / np.float32(grid.step)), 255)))
                self.grids[user] = replace(grid, low=max(grid.low, grid.zero), high=high)
                user.replace_input_with(node, node.args[0])
            self.net.graph.erase_node(node)

    def top_of_relu(self, node: fx.Node) -> float | None:
        """The upper end of a ReLU, ReLU6 or Hardtanh from 0 that nothing else sees in place; None for others."""
        name, module = self.name(node), self.net.get_submodule(node.target) if node.op == "call_module" else None
        if name not in _RELUS or len(node.args[0].users) > 1:
            return None
        if name == "hardtanh" and (module is None or module.min_val != 0):
            return None
        return {"relu": math.inf, "relu6": 6.0}.get(name) or module.max_val

    def finished(self) -> fx.GraphModule:
        for node, grid in self.grids.items():
            self.net.set_submodule(node.target, Quantizer(grid))
        self.net.delete_all_unused_submodules()
        self.net.recompile()
        return self.net


@torch.no_grad()
def integer_graph(network: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """The network that runtimes compute: run, it gives their results up to the order of float sums.

    images (n, C, H, W): those that ranges are taken from.
    """
    rewriter = _Rewriter(network)
    ranges = _Ranges(network, {end.name for end in rewriter.ends})
    ranges.run(images)
    rewriter.quantize_outputs(ranges.found)
    rewriter.quantize_inputs()
    rewriter.clip_as_integers()
    return rewriter.finished()
