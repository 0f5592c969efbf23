"""Dead channels put back: a finished network whose channels come in whole blocks, with the same outputs.

Runtimes compute channels in blocks (16 on ONNX Runtime with AVX-512): a layer of 25 kernels takes longer than one of
32, so a network that was pruned to odd counts is smaller but not faster. `pad` gives back some of the pruned channels,
with zero kernels, and zero columns in all layers that read them. Only model.onnx is made from such a network; the
packed file and the cost of everything but time are those of the network as it was pruned.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq.compression import freeze
from ajpq.errors import AjpqError
from ajpq.layers import ActQuant, ChannelAffine, FrozenLayer
from ajpq.network import Network
from ajpq.outputs import module_of, put, round_as_read
from ajpq.policy import CompressionPolicy
from ajpq.quantize import FLOAT
from ajpq.surgery import kept_weights, shrink

INT8 = 8  # bits that every quantized kernel has in a padded network


def check_multiple(multiple: int) -> None:
    """Raises AjpqError unless it is a whole number of at least 1."""
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise AjpqError(
            f"onnx_multiple must be a whole number of at least 1, but it is {multiple!r}; write onnx_multiple=16, or 1 "
            "for no padding"
        )


def padded(kept: float, size: float, multiple: int) -> float:
    """How many channels `kept` of `size` become: the next multiple, or all there are where these are fewer.

    Even one channel becomes a whole block: ONNX Runtime's int8 convolutions take longer for 1 to 15 kernels than for
    16, and for numbers of inputs that 4 does not divide longer than for 16 inputs (docs/onnx.md). Expected numbers of
    channels are rounded up, too. Never falls when `kept` grows.
    """
    return max(min(math.ceil(kept / multiple - 1e-6) * multiple, size), kept)


def padded_alive(network: Network, policy: CompressionPolicy, multiple: int) -> np.ndarray:
    """bool (n_channels,): the channels that survive, and in every space as many dead ones as `padded` wants, the first.

    Channels of a space are counted, not those of a tensor: a grouped convolution has them once per group, as its
    groups are computed one by one. Nothing is added where a space has lost all its channels, or with skipped branches.
    """
    alive, skipped = policy.alive(network), policy.skipped(network)
    wide = alive.copy()
    for space in network.spaces:
        there = space.channels[~skipped.dead[space.channels]]
        kept, dead = int(alive[there].sum()), there[~alive[there]]
        wide[dead[: int(padded(kept, len(there), multiple)) - kept]] = True
    return wide


@torch.no_grad()
def pad(final: fx.GraphModule, network: Network, policy: CompressionPolicy, multiple: int = 16) -> fx.GraphModule:
    """A finished network with the same outputs whose numbers of channels are multiples, see `padded_alive`. A new
    module, on the device of `final`; `final` itself where nothing is added.

    final: of `freeze`, or of `finetune`, which `network` and `policy` were compressed to.
    Kernels of fewer bits have 8 here, with their very values, as grids of 1 to 3 bits have no zero. Sums of integers
    stay equal to the bit; float ones may add up in another order. Raises AjpqError for a multiple below 1.
    """
    check_multiple(multiple)
    alive, wide = policy.alive(network), padded_alive(network, policy, multiple)
    if (alive == wide).all():
        return final
    made = freeze(shrink(network, wide, policy.skipped(network)))
    norms = {norm.name: norm.channels for norm in network.norms}
    for name in sorted(_called(final) & _called(made)):
        old = final.get_submodule(name)
        if isinstance(old, FrozenLayer):
            there = kept_weights(network[name], wide)
            kernels, inputs = map(_places, there, kept_weights(network[name], alive))
            part: nn.Module = _wider(old, made.get_submodule(name), kernels, inputs)
        elif isinstance(old, ChannelAffine):
            places = _places(*(np.flatnonzero(there[norms[name]]) for there in (wide, alive)))
            n = int(wide[norms[name]].sum())
            part = ChannelAffine(_spread(old.scale, n, places), _spread(old.shift, n, places))
        else:
            part = copy.deepcopy(old)
        made.set_submodule(name, part)
    _copy_tensors(final, made, network)
    _copy_output_quantizers(final, made)
    made.recompile()
    round_as_read(made)
    return made.to(next(final.buffers()).device).eval()


def _places(there: np.ndarray, kept: np.ndarray) -> Tensor:
    """Where the kept indices are among those that are there, both ascending; int64 (n kept,)."""
    return torch.from_numpy(np.searchsorted(there, kept))


def _spread(values: Tensor, n: int, places: Tensor, axis: int = 0) -> Tensor:
    """Values at these places of an axis of length n, zeros at the others."""
    out = values.new_zeros([n if i == axis else size for i, size in enumerate(values.shape)])
    return out.index_copy_(axis, places.to(values.device), values)


def _wider(old: FrozenLayer, plain: FrozenLayer, kernels: Tensor, inputs: Tensor) -> FrozenLayer:
    """The layer with its weights at these kernels and inputs of a layer `plain` of the new size, zeros elsewhere."""
    n, m = plain.codes.shape[:2]
    codes, step = old.container
    coded = old.bits != FLOAT
    bits = torch.full((n,), INT8, dtype=torch.uint8, device=old.bits.device)
    bits[kernels.to(bits.device)] = torch.where(coded, INT8, FLOAT).to(torch.uint8)
    return FrozenLayer(
        _spread(_spread(codes, m, inputs, 1), n, kernels),
        bits,
        _spread(torch.where(coded, step, 0), n, kernels),  # float32: half of a float16 may be none
        _spread(old.raw, m, inputs, 1),
        None if old.bias is None else _spread(old.bias, n, kernels),
        replace(old.geometry, groups=plain.geometry.groups),
        copy.deepcopy(old.act),
    )


def _copy_tensors(final: fx.GraphModule, made: fx.GraphModule, network: Network) -> None:
    """Tensors that the graph of the original reads by itself may have learned, too."""
    theirs = {str(node.target) for node in network.module.graph.nodes if node.op == "get_attr"}
    theirs &= {str(node.target) for node in final.graph.nodes if node.op == "get_attr"}
    for node in made.graph.nodes:
        if node.op == "get_attr" and node.target in theirs:
            old, new = (_tensor(module, node.target) for module in (final, made))
            new.copy_(old)


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _copy_output_quantizers(final: fx.GraphModule, made: fx.GraphModule) -> None:
    """Quantizers stand behind modules, which are called in the same order in both, or behind a ReLU behind one."""
    both = _called(final) & _called(made)
    twins = dict(zip(*([n for n in net.graph.nodes if n.target in both] for net in (final, made)), strict=True))
    for node in final.graph.nodes:
        act = module_of(final, node)
        if isinstance(act, ActQuant):
            source = node.args[0]
            place = twins[source] if source in twins else next(iter(twins[source.args[0]].users))
            made.add_submodule(str(node.target), copy.deepcopy(act))
            put(made, str(node.target), place)


def _called(network: fx.GraphModule) -> set[str]:
    """Modules that a finished network calls. Where all channels are there, a shuffle is the module that it was; where
    some are missing it is an index, and not among them."""
    calls = (node for node in network.graph.nodes if node.op == "call_module")
    return {str(node.target) for node in calls if not isinstance(module_of(network, node), ActQuant)}
