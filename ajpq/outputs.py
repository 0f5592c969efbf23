"""What integer convolutions put out, and who reads it: where hardware rounds to 8 bits, the network does so itself.

A processor computes a convolution in integers only where its sums go straight into a quantizer. Where one layer alone
reads the output, perhaps through operations that only move values, that layer's quantizer is the one. Elsewhere
(residual sums, gates, means, several readers) there is none: `quantize_outputs` puts one of 8 bits there, whose step
size fine-tuning learns like any other (LSQ), so that the finished network is what an int8 runtime computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ajpq import ops
from ajpq.calibration import BINS, InputRange
from ajpq.layers import ActQuant, FrozenLayer, QuantLayer
from ajpq.quantize import FLOAT

BITS = 8
RELUS = frozenset(("relu", "relu6", "hardtanh"))
MAX_POOLS = frozenset("maxpool2d max_pool2d adaptivemaxpool2d adaptive_max_pool2d boolean_dispatch".split())
_MOVES = ops.MOVE | ops.CONCAT | ops.PAD | RELUS | MAX_POOLS | {"identity"}
_SIZES = frozenset(("size", "dim", "getattr"))


def module_of(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(node.target) if node.op == "call_module" else None


def name_of(network: fx.GraphModule, node: fx.Node) -> str:
    """Of the operation of any node."""
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    return ops.name_of(node, module_of(network, node))


def quantizer_of(network: fx.GraphModule, node: fx.Node) -> ActQuant | None:
    """What a node quantizes its input with, if it does."""
    module = module_of(network, node)
    act = module.act if isinstance(module, QuantLayer | FrozenLayer) else module
    bits = FLOAT if module is None else getattr(act, "bits", FLOAT)
    return act if isinstance(bits, int) and bits != FLOAT else None


def ends(network: fx.GraphModule) -> list[fx.Node]:
    """What comes out of every convolution of integers: behind its batch-norm and ReLU where these alone read it."""
    found = []
    for node in network.graph.nodes:
        layer = module_of(network, node)
        if not isinstance(layer, QuantLayer | FrozenLayer) or quantizer_of(network, node) is None:
            continue
        if not layer.geometry.conv or (layer.bits == FLOAT).any():
            continue
        end = node
        if (norm := _alone(end)) and getattr(module_of(network, norm), "folds_into", None) == node.target:
            end = norm
        if (relu := _alone(end)) and name_of(network, relu) in RELUS:
            end = relu
        found.append(end)
    return found


def _alone(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def readers(network: fx.GraphModule, node: fx.Node) -> dict[fx.Node, None]:
    """Everything that computes with the values of a node, as they are or after they were moved."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        name = name_of(network, user)
        if quantizer_of(network, user) is None and name in _MOVES:
            found |= readers(network, user)
        elif name not in _SIZES:
            found[user] = None
    return found


def quantized_by(network: fx.GraphModule, node: fx.Node) -> ActQuant | None:
    """The quantizer that alone reads the values of a node."""
    found = readers(network, node)
    return quantizer_of(network, next(iter(found))) if len(found) == 1 else None


def round_as_read(network: fx.GraphModule) -> None:
    """Tell every integer convolution of a finished network which quantizer alone reads it, in place; see
    `FrozenLayer.reader`. To be called when layers or their readers are others than before."""
    found: dict[FrozenLayer, list[ActQuant | None]] = {
        layer: [] for layer in network.modules() if isinstance(layer, FrozenLayer)
    }
    for end in ends(network):
        node = end
        while not isinstance(layer := module_of(network, node), FrozenLayer):
            node = node.args[0]
        found[layer].append(quantized_by(network, end))
    for layer, acts in found.items():
        layer.reader = (acts[0],) if acts and acts[0] is not None and all(act is acts[0] for act in acts) else ()


@torch.no_grad()
def quantize_outputs(network: fx.GraphModule, images: Tensor) -> None:
    """Put an 8-bit quantizer behind every integer convolution that has none, in place.

    network: of `compress` or `freeze`. images (n, C, H, W): training images, a hundred or so, for the first step sizes
    (those of least squared error). Left as they are: the outputs of the network, and those with one position per image
    (gates, pooled features), where rounding costs more than it gains.
    """
    wanted = [end for end in ends(network) if quantized_by(network, end) is None]
    wanted = [end for end in wanted if all(reader.op != "output" for reader in readers(network, end))]
    if not wanted:
        return
    training, device = network.training, next((p.device for p in network.parameters()), images.device)
    seen = _Ranges(network.eval(), {end.name for end in wanted})
    seen.run(images.to(device))
    network.train(training)
    names = {name for name, _ in network.named_modules()}
    for end in wanted:
        if end.name not in seen.found:
            continue
        found = seen.found[end.name]
        number = next(i for i in range(len(names) + 1) if f"output_quantizer_{i}" not in names)
        name = f"output_quantizer_{number}"
        names.add(name)
        scale = torch.tensor(found.step(BITS), device=device)
        network.add_submodule(name, ActQuant(BITS, found.signed, scale, learned=True, inner=False).train(training))
        put(network, name, end)
    network.recompile()


def put(network: fx.GraphModule, name: str, source: fx.Node, reader: fx.Node | None = None) -> fx.Node:
    """A call of a submodule between a node and one of its readers, or all of them."""
    users = list(source.users) if reader is None else [reader]
    with network.graph.inserting_before(source.next if reader is None else reader):
        made = network.graph.call_module(name, (source,))
    for user in users:
        user.replace_input_with(source, made)
    return made


class _Ranges(fx.Interpreter):
    """Histograms of the results of some nodes that have several positions per channel."""

    def __init__(self, network: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(network)
        self.wanted = wanted
        self.found: dict[str, InputRange] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.name in self.wanted and result[0, 0].numel() > 1:
            low, high = min(result.min().item(), 0.0), max(result.max().item(), 1e-6)
            counts = torch.histc(result.float(), BINS, low, high)
            self.found[node.name] = InputRange(low, high, counts.double().cpu().numpy())
        return result
