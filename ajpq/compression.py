"""`compress`: network and policy -> a smaller module that can learn. `freeze`: that module -> the finished network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from ajpq import ops, quantize
from ajpq.bank import WeightBank
from ajpq.calibration import Calibration, range_of
from ajpq.errors import AjpqError
from ajpq.layers import ActQuant, ChannelAffine, FrozenLayer, Geometry, QuantLayer
from ajpq.network import Network
from ajpq.outputs import module_of, name_of, round_as_read
from ajpq.policy import CompressionPolicy
from ajpq.quantize import FLOAT
from ajpq.surgery import shrink

_HALF_MAX = torch.finfo(torch.float16).max
_LEAST_STEP = 2.0**-18  # float16 rounds it by 1/128 at most


def compress(
    network: Network,
    policy: CompressionPolicy,
    calibration: Calibration | None = None,
    bank: WeightBank | None = None,
) -> fx.GraphModule:
    """The network without its pruned channels and skipped branches, every other kernel quantized to its width; in eval
    mode, trainable.

    Layers whose kernels and input all have 32 bits stay plain Conv2d or Linear. `calibration` gives the activation
    steps and may be None only where all act_bits are 32; `bank` keeps step sizes of kernels for the next call. Raises
    AjpqError if the policy does not fit the network.
    """
    policy.validate(network)
    alive, skipped = policy.alive(network), policy.skipped(network)
    small, bank = shrink(network, alive, skipped), bank or WeightBank(network)
    for layer in network.layers:
        if layer.name in skipped.layers:
            continue
        kept = alive[layer.writes]
        bits = policy.weight_bits[layer.name][kept]
        act_bits = policy.act_bits[layer.name]
        if act_bits == FLOAT and (bits == FLOAT).all():
            continue
        if act_bits == FLOAT:
            act = ActQuant(FLOAT, True, torch.ones(()), learned=True)
        else:
            seen = range_of(layer.name, act_bits, calibration)
            act = ActQuant(act_bits, seen.signed, torch.tensor(seen.step(act_bits)), learned=True)
        plain = small.get_submodule(layer.name)
        scale = bank.scales(layer, policy.weight_bits[layer.name])[torch.from_numpy(kept)]
        small.set_submodule(
            layer.name, QuantLayer(plain.weight, plain.bias, torch.from_numpy(bits), scale, Geometry.of(plain), act)
        )
    return small.eval()


def check_scales(network: Network, calibration: Calibration) -> None:
    """Raises AjpqError for numbers that `freeze` could not finish in float16, before anything is spent: batch-norms of
    their own, layers with a bias or a step that is too large, and layers all of whose steps would be hardly more than
    the smallest there are, unless what they put out is as good as nothing."""
    folded = {norm.folds_into: norm.name for norm in network.norms}
    for layer in network.layers:
        module = network.module.get_submodule(layer.name)
        top, bias = module.weight.abs().flatten(1).amax(1), module.bias
        if layer.name in folded:
            gain, shift = _affine(network.module.get_submodule(folded[layer.name]))
            top, bias = top * gain.abs(), shift if bias is None else bias * gain + shift
        _half(top / 127, "steps of weights", layer.name)  # at 8 bits
        if bias is not None:
            _half(bias, "biases", layer.name)
        largest, seen = top.max().item(), calibration[layer.name]
        if largest / 127 < _LEAST_STEP and largest * max(seen.high, -seen.low) > 0.01:
            raise AjpqError(
                f"steps of weights must be at least {_LEAST_STEP:.1g} for float16, but the largest of {layer.name!r} "
                f"at 8 bits is {largest / 127:.1g}; divide the network's inputs by their deviation"
            )
    for norm in network.norms:
        if norm.folds_into is None:
            try:
                ChannelAffine(*_affine(network.module.get_submodule(norm.name)))
            except AjpqError as error:
                raise AjpqError(f"{norm.name}: {error}") from error


@torch.no_grad()
def freeze(student: fx.GraphModule) -> fx.GraphModule:
    """The finished network: integers, a float16 scale and bias per kernel, batch-norms folded away. A new module.

    A batch-norm that alone reads a layer's output goes into that layer's scales and bias (exact up to the rounding to
    float16, because scales are per kernel); any other becomes a `ChannelAffine`. Dropout disappears.
    """
    old = copy.deepcopy(student).eval()
    names = {str(node.target) for node in old.graph.nodes if node.op == "call_module"}
    for node in list(old.graph.nodes):
        module = old.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.running_mean is not None:
            gain, shift = _affine(module)
            source = node.args[0]
            layer = old.get_submodule(source.target) if source.op == "call_module" else None
            if isinstance(layer, _LAYERS) and getattr(module, "folds_into", None) == source.target:
                old.set_submodule(source.target, _frozen(source.target, layer, gain, shift))
                _bypass(old.graph, node, source)
            else:
                old.set_submodule(node.target, ChannelAffine(gain, shift))
        elif node.op not in ("placeholder", "output", "get_attr") and "dropout" in ops.name_of(node, module):
            _bypass(old.graph, node, node.all_input_nodes[0])
    for name in names:
        module = old.get_submodule(name)
        if isinstance(module, _LAYERS):
            old.set_submodule(name, _frozen(name, module, None, None))
        elif isinstance(module, ActQuant):
            old.set_submodule(name, _fixed(module))
    _silence(old)
    for tensor in old.parameters():
        tensor.requires_grad_(False)
    old.delete_all_unused_submodules()
    old.recompile()
    round_as_read(old)
    return old


_LAYERS = (nn.Conv2d, nn.Linear, QuantLayer)


def _bypass(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    gain = (norm.running_var + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight
    return gain, (0 if norm.bias is None else norm.bias) - norm.running_mean * gain


def _fixed(act: nn.Module) -> ActQuant:
    return ActQuant(act.bits, act.signed, act.scale, learned=False)


def _half(values: Tensor, what: str, name: str) -> Tensor:
    """`values` as float16, none of which may be too large for it."""
    largest = values.abs().max().item()
    if largest > _HALF_MAX:
        raise AjpqError(
            f"{what} must be at most {_HALF_MAX:,.0f} for float16, but the largest of {name!r} is {largest:,.0f}; "
            "train on targets that are divided by their deviation, or on inputs that are"
        )
    return values.to(torch.float16)


def _frozen(name: str, layer: nn.Module, gain: Tensor | None, shift: Tensor | None) -> FrozenLayer:
    """Codes of the layer's weights; gain and shift (c_out,) of a norm behind it multiplied into scales and bias."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, QuantLayer):
        bits, scale, geometry = layer.bits, quantize.usable(layer.scale), layer.geometry
        act = _fixed(layer.act)
    else:
        bits, scale = (
            torch.full((len(weight),), FLOAT, dtype=torch.uint8, device=weight.device),
            torch.ones_like(weight[:, 0].reshape(len(weight), -1)[:, 0]),
        )
        geometry, act = Geometry.of(layer), ActQuant(FLOAT, True, torch.ones(()), learned=False)
    codes = quantize.encode(weight, bits, scale)
    raw = weight[bits == FLOAT]
    if gain is not None:
        scale = scale * gain
        raw = raw * gain[bits == FLOAT].reshape(-1, *([1] * (weight.ndim - 1)))
        bias = shift if bias is None else bias * gain + shift
    coded = bits != FLOAT
    half = _half(torch.where(coded, scale, torch.zeros_like(scale)), "steps of weights", name)
    if bias is not None:
        bias = torch.where(coded, _half(torch.where(coded, bias, 0), "biases", name).float(), bias)
    return FrozenLayer(codes, bits.clone(), half, raw.clone(), bias, geometry, act)


def _silence(network: fx.GraphModule) -> None:
    """Make kernels zero, in place, that are so fine that their bias is no 32-bit integer of their steps, where their
    sums stay below half a step of it in float16, as trained networks have where a batch-norm has switched a channel
    off: they would keep their whole layer in float. Not where a norm might take the bias away again."""
    nodes = [(node, module_of(network, node)) for node in network.graph.nodes]
    if any(isinstance(part, ChannelAffine) or "norm" in name_of(network, node) for node, part in nodes):
        return
    for node, old in nodes:
        if not isinstance(old, FrozenLayer) or old.bias is None or old.unit is None or old.whole_bias is not None:
            continue
        top = max(map(abs, quantize.act_range(old.act.bits, old.act.signed))) * quantize.usable(old.act.scale.abs())
        largest = top * old.weight.flatten(1).abs().sum(1)
        gone = ~FrozenLayer.fits(old.bias / old.unit) & (largest < 2**-12 * old.bias.abs())
        codes = old.codes.clone()
        codes[gone] = 0
        scale = torch.where(gone, 0, old.scale)
        made = FrozenLayer(codes, old.bits, scale, old.raw, old.bias, old.geometry, old.act)
        network.set_submodule(node.target, made)
