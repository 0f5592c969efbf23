"""A finished network as a graph of modules that the ONNX exporter writes as int8 layers between QuantizeLinear and
DequantizeLinear.

ONNX Runtime computes a convolution in integers only where its output goes straight into a quantizer. Where all that
reads the output is one quantizer, through operations that only move values, its twin is put behind the convolution,
which changes nothing; elsewhere the network has a quantizer there (`ajpq.outputs`). (A step per channel would round
less, but ONNX Runtime 1.31 fuses a sum behind it into a node that it then refuses.)
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import quantize
from ajpq.layers import ActQuant, FrozenLayer
from ajpq.onnx_layers import Grid, Layer, Quantizer
from ajpq.outputs import MAX_POOLS, RELUS, ends, module_of, name_of, put, quantize_outputs, quantized_by, quantizer_of


class _Rewriter:
    """Puts the quantizers of a copy of a finished network where a runtime wants to see them."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.net = network
        self.grids: dict[fx.Node, Grid] = {}  # of the quantizers in the graph

    def make_explicit(self) -> None:
        """Every layer without its quantizer, every quantizer a node of its own, and twins behind convolutions."""
        net, integer = self.net, []
        layers = {node: module_of(net, node) for node in net.graph.nodes if node.op == "call_module"}
        for node, module in layers.items():
            if isinstance(module, ActQuant):
                self.grids[node] = Grid.of(module)
        for end in ends(net):
            act = quantized_by(net, end)
            if act is not None and quantizer_of(net, next(iter(end.users))) is None:
                integer.append((end, Grid.of(act).whole))
        for end, grid in integer:
            self.put(grid, end)
        for node, layer in layers.items():
            if isinstance(layer, FrozenLayer):
                if layer.act.bits != quantize.FLOAT:
                    self.put(Grid.of(layer.act), node.args[0], node)
                net.set_submodule(node.target, Layer(layer))
        self.pool_codes()

    def pool_codes(self) -> None:
        """The largest of some codes is one of them: behind a pooling of quantized values the same quantizer changes
        nothing, and runtimes then pool codes, not floats."""
        for node in list(self.net.graph.nodes):
            if name_of(self.net, node) not in MAX_POOLS or getattr(module_of(self.net, node), "return_indices", False):
                continue
            source = node.all_input_nodes[0]
            if source in self.grids:
                grid = self.grids[source].whole
                if any(user not in self.grids or self.grids[user].whole != grid for user in node.users):
                    self.put(grid, node)

    def put(self, grid: Grid, source: fx.Node, reader: fx.Node | None = None) -> None:
        name = f"quantizer_{len(self.grids)}"
        self.net.add_submodule(name, nn.Identity())
        self.grids[put(self.net, name, source, reader)] = grid

    def clip_as_integers(self) -> None:
        """ReLU and ReLU6 before quantizers become limits of the codes: runtimes then see the convolution end in one."""
        for node in list(self.net.graph.nodes):
            top = self.top_of_relu(node)
            if top is None or not node.users or not all(user in self.grids for user in node.users):
                continue
            for user in list(node.users):
                grid = self.grids[user]
                high = min(grid.high, grid.zero + round(min(float(np.float32(top) / np.float32(grid.step)), 255)))
                self.grids[user] = replace(grid, low=max(grid.low, grid.zero), high=high)
                user.replace_input_with(node, node.args[0])
            self.net.graph.erase_node(node)

    def top_of_relu(self, node: fx.Node) -> float | None:
        """The upper end of a ReLU, ReLU6 or Hardtanh from 0 that nothing else sees in place; None for others."""
        name, module = name_of(self.net, node), module_of(self.net, node)
        if name not in RELUS or len(node.args[0].users) > 1:
            return None
        if name == "hardtanh" and (module is None or module.min_val != 0):
            return None
        return {"relu": math.inf, "relu6": 6.0}.get(name) or module.max_val

    def finished(self) -> fx.GraphModule:
        for node, grid in self.grids.items():
            before = self.grids.get(node.args[0])
            apart = before is not None and (before.step, before.zero) != (grid.step, grid.zero)
            self.net.set_submodule(node.target, Quantizer(grid, apart))
        self.net.delete_all_unused_submodules()
        self.net.recompile()
        return self.net


@torch.no_grad()
def integer_graph(network: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """The network that runtimes compute: run, it gives their results up to the order of float sums.

    images (n, C, H, W): for the steps of outputs that the network leaves unrounded, see `outputs.quantize_outputs`.
    """
    network = copy.deepcopy(network)
    quantize_outputs(network, images)
    rewriter = _Rewriter(network)
    rewriter.make_explicit()
    rewriter.clip_as_integers()
    return rewriter.finished()
