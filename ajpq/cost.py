"""What a policy costs. A cost model sees `Load`s, layers with all coupling resolved, and answers per layer, in
tensors: the same model gives a number to a search and a gradient to a differentiable one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ajpq.branches import Skipped
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy
from ajpq.quantize import FLOAT


@dataclass(frozen=True, eq=False)
class Load:
    """One layer's work under a policy. All tensors float64. A layer that keeps no kernel is skipped: it is not in the
    network any more, but what it carries for others, `side` and what `first` is charged with, is."""

    layer: LayerSpec
    inputs: Tensor  # (), surviving input channels of one kernel (features for linear; 1 for depthwise)
    kept: Tensor  # (c_out,), 1 where the kernel survives, 0 where it is pruned
    weight_bits: Tensor  # (c_out,)
    act_bits: Tensor  # (), of the layer's input
    side: Tensor  # (), 32-bit words of other parameters that the shipped file stores with this layer
    first: bool  # whether it is the network's first layer, which carries what is paid once

    @property
    def weights_per_kernel(self) -> Tensor:
        return self.inputs * (self.layer.kernel[0] * self.layer.kernel[1])

    @property
    def macs_per_kernel(self) -> Tensor:
        return self.weights_per_kernel * self.layer.positions


class CostModel(Protocol):
    """`cost(loads)` -> (n_layers,) per image; the total is the sum. Entry i may depend on loads[i] only, and must not
    fall when
    a width or a number of channels grows: budgets are kept reachable by this rule."""

    unit: str

    def __call__(self, loads: Sequence[Load]) -> Tensor: ...


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


class Size:
    """Bits of the packed file, header included: for a surviving kernel of b <= 8 bits and n weights ``b n + 16 (scale)
    + 16 (bias, if the layer has one) + 4 (its width)``, for one of 32 bits ``32 n + 32 (bias) + 4``; 32 per channel of
    a batch-norm that cannot be folded and per other parameter; 8 or 16 per channel that is picked by its number
    (shuffles, see `Network.gathers`), though these are compressed; for the header (graph and geometry) 48 bytes per
    layer and 1,024 bytes once. Of a layer that keeps no kernel nothing is left but 12 bytes of header, for what stays
    of its block: activation functions, paddings, slices.

    The header is compressed, so its share is a bound, not a count. Once come 350 to 560 bytes of the file format, a
    row for every part that is not empty (see `ajpq.shipping`), and what belongs to no layer: inputs and outputs,
    operations on their own, modules and norms that cannot be folded, and their arguments. Measured on 50 networks of
    1 to 151 layers, CNNs have at most 834 bytes beside the 48 per layer; a graph with much more than layers may have
    more (a transformer of one block: 1,027)."""

    unit = "bit"
    header_per_layer, header_of_skipped, header_once = 48 * 8, 12 * 8, 1024 * 8

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([self._layer(load) for load in loads])

    def _layer(self, load: Load) -> Tensor:
        words = 1.0 if load.layer.bias else 0.0
        overhead = torch.where(load.weight_bits < FLOAT, 16.0 + 16.0 * words, 32.0 * words) + 4.0
        there, own = load.kept.sum().clamp(max=1), self.header_per_layer - self.header_of_skipped
        header = self.header_of_skipped + own * there + (self.header_once if load.first else 0)
        return (load.kept * (load.weight_bits * load.weights_per_kernel + overhead)).sum() + 32.0 * load.side + header


class MACs:
    """Multiply-accumulates of the physically smaller network, one image; convolutions and linear layers only."""

    unit = "MAC"

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([load.macs_per_kernel * load.kept.sum() for load in loads])


class BOPs:
    """Bit operations, the plain rule: every multiply-accumulate counts weight bits x activation bits (32 x 32 for
    float).
    """

    unit = "BOP"

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([load.macs_per_kernel * load.act_bits * (load.kept * load.weight_bits).sum() for load in loads])


class UniqBOPs:
    """Bit operations as Zur et al. (arXiv 1904.09872) count them in their code, after UNIQ (Baskin et al., arXiv
    1804.10969).

    Per kernel: ``mults (b_w - 1) b_a + adds ceil(log2(n (2^b_a - 1) (2^(b_w - 1) - 1)))`` with n weights, P output
    pixels, ``mults = P n``, ``adds = P (n - 1)``. A 1-bit weight has magnitude 1, so its last factor is taken as 1.
    """

    unit = "BOP"

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        return _stack([self._layer(load) for load in loads])

    @staticmethod
    def _layer(load: Load) -> Tensor:
        n, w, a = load.weights_per_kernel, load.weight_bits, load.act_bits
        magnitude = (torch.exp2(w - 1) - 1).clamp(min=1)
        width = torch.ceil(torch.log2((n * (torch.exp2(a) - 1) * magnitude).clamp(min=1)))
        per_position = n * (w - 1).clamp(min=0) * a + (n - 1).clamp(min=0) * width
        return load.layer.positions * (load.kept * per_position).sum()


def side_words(network: Network, alive: np.ndarray, layer: LayerSpec, skipped: Skipped | None = None) -> float:
    """32-bit words stored beside a layer: norms that cannot be folded, the places of channels that are picked by their
    numbers, and with the first layer all other parameters; without those of skipped branches.
    """
    skipped = skipped or network.without(())
    norms = [norm for norm in network.unfolded.get(layer.name, ()) if norm.name not in skipped.norms]
    others = network.other_parameters - skipped.parameters if layer is network.layers[0] else 0
    gathers = network.gathers.get(layer.name, {}).items()
    picked = sum(n * int(alive[network.values[node]].sum()) for node, n in gathers if node not in skipped.nodes)
    return sum(int(alive[norm.channels].sum()) for norm in norms) + picked / 4 + others


def inputs_per_kernel(layer: LayerSpec, alive: np.ndarray) -> int:
    """Surviving input channels that one kernel meets."""
    return 1 if layer.kind == "depthwise" else int(alive[layer.inputs_of_a_kernel].sum())


def load_of(
    network: Network, layer: LayerSpec, weight_bits: np.ndarray, act_bits: int, alive: np.ndarray,
    skipped: Skipped | None = None,
) -> Load:  # fmt: skip
    """The load of one layer; weight_bits (c_out,), alive (n_channels,)."""
    bits = torch.as_tensor(weight_bits, dtype=torch.float64)
    return Load(
        layer,
        torch.tensor(float(inputs_per_kernel(layer, alive)), dtype=torch.float64),
        (bits > 0).double(),
        bits,
        torch.tensor(float(act_bits), dtype=torch.float64),
        torch.tensor(side_words(network, alive, layer, skipped), dtype=torch.float64),
        layer is network.layers[0],
    )


def loads_of(network: Network, policy: CompressionPolicy) -> tuple[Load, ...]:
    """Every layer's load under a policy, in execution order."""
    alive, skipped = policy.alive(network), policy.skipped(network)
    return tuple(
        load_of(network, layer, policy.weight_bits[layer.name], policy.act_bits[layer.name], alive, skipped)
        for layer in network.layers
    )


def total(cost: CostModel, network: Network, policy: CompressionPolicy) -> float:
    """The cost of a policy, in the model's unit."""
    return float(cost(loads_of(network, policy)).double().sum())  # as `Budget` adds up
