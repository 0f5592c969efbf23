"""What a differentiable search has not decided yet: logits of all candidates, their probabilities, expected costs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ajpq.blocks import blocks_of
from ajpq.branches import Branch
from ajpq.budget import Budget
from ajpq.cost import CostModel, Load
from ajpq.errors import AjpqError
from ajpq.network import LayerSpec
from ajpq.space import SearchSpace

GRANULARITIES = ("layer", "block", "kernel")
LIKELY = 2.0  # logit of keeping a channel or a branch at the start: 0.88; ours
PRUNING = 0.25  # how much of a tilt goes to pruning and skipping, where the widest weights get 1; ours
STEEPEST = 256.0  # tilt


@dataclass(frozen=True, eq=False)
class Parts:
    """How much of every candidate there is, a distribution per row."""

    widths: Tensor  # (n_widths, K)
    acts: Tensor  # (n_acts, J)
    kept: Tensor  # (n_channels,), in [0, 1]
    taken: Tensor = field(default_factory=lambda: torch.ones(0))  # (n_branches,), in [0, 1]: branches not skipped

    def detach(self) -> Parts:
        return Parts(self.widths.detach(), self.acts.detach(), self.kept.detach(), self.taken.detach())

    def to(self, device: torch.device) -> Parts:
        return Parts(self.widths.to(device), self.acts.to(device), self.kept.to(device), self.taken.to(device))


class Architecture(nn.Module):
    """The logits of all decisions of a search space; on the CPU.

    widths (n, K): of kernels, a row for every layer, for every block (`blocks_of`), or, at granularity "kernel", for
        every block of kernels of a layer as `Choices.blocks` says; among the widths above 0
    acts (n, J): of inputs, a row for every layer or, at granularity "block", for every block
    keeping (n, 2): prune or keep, at every granularity a row for every block of channels of a space that may go, again
        in `Choices.blocks` blocks. A policy prunes channels for all who write them, so there 0 bits is no width.
    skipping (n, 2): skip or take, at granularity "layer" and "block" a row for every branch (`Network.branches`) that
        lies in one layer or block, where 0 is among the widths; all its kernels have 0 bits then. In `branches`.
    Layers with a single candidate have no row.

    A layer's pair (width of weights, width of input) is drawn as two independent choices, not as one among all pairs:
    the mixture of pairs is then one convolution, ``conv(sum_j q_j A_j(x), sum_k p_k Q_k(w))``, where a joint
    distribution needs one for every width of the input, each with weights of its own; and there are K + J logits
    instead of K J. Every pair can still be the outcome. What is lost is that the search cannot hold two pairs likely
    and their crossings unlikely. Expected costs stay exact where they are products of both widths: expected
    bit operations, ``E[w] E[a]``, are the sum over pairs, and each width's gradient knows the other's.
    """

    def __init__(self, space: SearchSpace, granularity: str = "layer") -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise AjpqError(f"granularity must be one of {', '.join(GRANULARITIES)}, but it is {granularity!r}")
        self.space, self.network, self.granularity = space, space.network, granularity
        choices, layers = space.choices, space.network.layers
        self.options = tuple(b for b in choices.weight_bits if b), choices.act_bits
        units = blocks_of(space.network) if granularity == "block" else [[layer.name] for layer in layers]
        self.width_rows: dict[str, np.ndarray] = {}  # layer name -> (c_out,)
        self.act_rows: dict[str, int] = {}
        n_widths = 0
        for i, names in enumerate(units):
            free = [space.network[name] for name in names if len(space.widths(space.network[name])) > 1]
            for layer in free:
                blocks = [np.arange(layer.c_out)]
                if granularity == "kernel":
                    blocks = space.blocks(layer, np.ones(space.network.n_channels, bool))
                self.width_rows[layer.name] = np.empty(layer.c_out, np.int64)
                for j, block in enumerate(blocks):
                    self.width_rows[layer.name][block] = n_widths + j
                n_widths += len(blocks) if granularity == "kernel" else 0
            n_widths += 1 if free and granularity != "kernel" else 0
            self.act_rows |= {name: i for name in names if len(space.acts(space.network[name])) > 1}
        used = {row: i for i, row in enumerate(dict.fromkeys(self.act_rows.values()))}
        self.act_rows = {name: used[row] for name, row in self.act_rows.items()}
        self.keep_rows = np.full(space.network.n_channels, -1)  # -1: always kept
        n_keep = 0
        for s, order in enumerate(space.prune_order):
            going = order[: space.n_pruned(s, choices.max_sparsity)]
            blocks = len(going) if choices.blocks == "max" else min(int(choices.blocks), len(going))
            for block in np.array_split(going, blocks) if blocks else ():
                self.keep_rows[block] = n_keep
                n_keep += 1
        self.branches: tuple[Branch, ...] = ()
        if 0 in choices.weight_bits and granularity != "kernel":
            free_layers = [{name for name in names if self._is_free(name)} for names in units]
            self.branches = tuple(b for b in space.network.branches if any(set(b.layers) <= x for x in free_layers))
        self.widths = nn.Parameter(torch.zeros(n_widths, len(self.options[0])))
        self.acts = nn.Parameter(torch.zeros(len(used), len(self.options[1])))
        self.keeping = nn.Parameter(torch.tensor([0.0, LIKELY]).repeat(n_keep, 1))
        self.skipping = nn.Parameter(torch.tensor([0.0, LIKELY]).repeat(len(self.branches), 1))
        rows = {name: torch.from_numpy(row) for name, row in self.width_rows.items()}
        for i, layer in enumerate(layers):
            if layer.name in rows:
                self.register_buffer(f"rows{i}", rows[layer.name], persistent=False)
        self.register_buffer("kept_rows", torch.from_numpy(self.keep_rows) % (n_keep + 1), persistent=False)
        for what in range(2):
            bits = torch.tensor(self.options[what], dtype=torch.float64)
            self.register_buffer(f"bits{what}", bits, persistent=False)

    def __len__(self) -> int:
        """How many decisions there are."""
        return sum(map(len, self.parameters()))

    def _is_free(self, name: str) -> bool:
        """Whether the layer has the widths that were chosen, not those of a first or last layer."""
        return self.space.widths(self.network[name]) == self.options[0]

    def probabilities(self) -> Parts:
        return self._parts(*(torch.softmax(logits, 1) for logits in self.parameters()))

    def sample(self, temperature: float, generator: torch.Generator) -> Parts:
        """Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144): softmax((logits + Gumbel noise) / temperature)."""

        def drawn(logits: Tensor) -> Tensor:
            u = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
            return torch.softmax((logits - torch.log(-torch.log(u))) / temperature, 1)

        return self._parts(*map(drawn, self.parameters()))

    def _parts(self, widths: Tensor, acts: Tensor, keeping: Tensor, skipping: Tensor) -> Parts:
        kept = torch.cat([keeping[:, 1], keeping.new_ones(1)])
        return Parts(widths, acts, kept[self.kept_rows], skipping[:, 1])

    def of_kernels(self, layer: LayerSpec, parts: Parts) -> Tensor:
        """(K, c_out) of a layer."""
        if layer.name not in self.width_rows:
            return parts.kept.new_ones(1, layer.c_out)
        return parts.widths[getattr(self, f"rows{self.network.index[layer.name]}")].T

    def of_input(self, layer: LayerSpec, parts: Parts) -> Tensor:
        """(J,) of a layer."""
        if layer.name not in self.act_rows:
            return parts.kept.new_ones(1)
        return parts.acts[self.act_rows[layer.name]]

    def _there(self, name: str, parts: Parts) -> Tensor:
        """The probability that a layer, batch-norm or node is not skipped, (); branches may lie in each other."""
        inside = [i for i, members in enumerate(self._members) if name in members]
        return parts.taken.double()[inside].prod()

    @cached_property
    def _members(self) -> list[frozenset[str]]:
        """Layers, batch-norms and nodes of every branch."""
        gone = [self.network.without(branch.layers) for branch in self.branches]
        return [skipped.layers | skipped.norms | skipped.nodes for skipped in gone]

    def loads(self, parts: Parts) -> list[Load]:
        """Every layer's expected load: widths, surviving inputs and kernels in expectation, which is exact for costs
        that are linear in each of them. Parameters beside layers and norms count as if no branch were skipped."""
        kept, found = parts.kept.double(), []
        for layer in self.network.layers:
            free, decided = layer.name in self.width_rows, layer.name in self.act_rows
            width = self.bits0 @ self.of_kernels(layer, parts).double() if free else kept.new_full(
                (layer.c_out,), self.space.widths(layer)[0]
            )  # fmt: skip
            act = self.bits1 @ self.of_input(layer, parts).double() if decided else kept.new_tensor(
                float(self.space.acts(layer)[0])
            )  # fmt: skip
            inputs = kept.new_ones(()) if layer.kind == "depthwise" else kept[layer.inputs_of_a_kernel].sum()
            first = layer is self.network.layers[0]
            side = kept.new_tensor(float(self.network.other_parameters if first else 0))
            for norm in self.network.unfolded.get(layer.name, ()):
                side = side + kept[norm.channels].sum() * self._there(norm.name, parts)
            for node, each in self.network.gathers.get(layer.name, {}).items():
                side = side + kept[self.network.values[node]].sum() * self._there(node, parts) * each / 4
            written = kept[layer.writes] * self._there(layer.name, parts)
            found.append(Load(layer, inputs, written, width, act, side, first))
        return found

    def excess(self, parts: Parts, budget: Budget) -> Tensor:
        """log(expected cost / largest allowed) of every limited cost, float64 (n limits,)."""
        loads = self.loads(parts)
        costs = torch.stack([budget.costs[name](loads).sum() for name in budget.names])
        return torch.log(costs / torch.as_tensor(budget.caps))

    @property
    def slopes(self) -> tuple[Tensor, ...]:
        """For every table, how dear each of its options is, in [0, 1]: what a tilt towards the cheap multiplies."""
        widths, acts = (getattr(self, f"bits{i}").float() / self.options[i][-1] for i in range(2))
        return widths, acts, torch.tensor([0.0, PRUNING]), torch.tensor([0.0, PRUNING])

    def concerned(self, budget: Budget) -> list[tuple[int, tuple[int, ...]]]:
        """Every limited cost (its place) and the tables that it depends on; the fewest tables first."""
        tables, found = list(self.parameters()), []
        for i, excess in enumerate(self.excess(self.probabilities(), budget)):
            grads = [None] * len(tables)
            if excess.requires_grad:
                grads = torch.autograd.grad(excess, tables, retain_graph=True, allow_unused=True)
            found.append((i, tuple(j for j, g in enumerate(grads) if g is not None and bool((g != 0).any()))))
        return sorted(found, key=lambda pair: len(pair[1]))

    def meet(self, budget: Budget) -> None:
        """Tilt logits towards the cheap until the expected costs are within budget: for every cost that is not, the
        tables that it depends on, by the least common slope that does, or the steepest. Ours: a short search has no
        time to come down from uniform probabilities."""

        def too_much(i: int) -> bool:
            return bool(self.excess(self.probabilities(), budget)[i] > 0)

        for i, which in self.concerned(budget):
            start = [table.detach().clone() for table in self.parameters()]
            low, high = 0.0, STEEPEST if too_much(i) else 0.0
            for _ in range(24):
                slope = (low + high) / 2
                self._tilt(start, which, slope)
                low, high = (slope, high) if too_much(i) else (low, slope)
            self._tilt(start, which, high)

    @torch.no_grad()
    def _tilt(self, start: Sequence[Tensor], which: Sequence[int], by: float) -> None:
        for j, (table, slopes) in enumerate(zip(self.parameters(), self.slopes, strict=True)):
            table.copy_(start[j] - (by if j in which else 0.0) * slopes)


def check_differentiable(name: str, cost: CostModel, loads: Sequence[Load]) -> None:
    """Raise AjpqError unless a cost model has a gradient."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(True)

    parts = [[leaf(t) for t in (x.inputs, x.kept, x.weight_bits, x.act_bits, x.side)] for x in loads]
    fresh = [Load(x.layer, *tensors, x.first) for x, tensors in zip(loads, parts, strict=True)]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            leaves = [tensor for tensors in parts for tensor in tensors]
            grads = torch.autograd.grad(cost(fresh).sum(), leaves, allow_unused=True)
        flows = any(grad is not None and bool((grad != 0).any()) for grad in grads)
    except (RuntimeError, TypeError, AttributeError, ValueError):  # a number, or what has left torch
        flows = False
    if not flows:
        raise AjpqError(
            f"a differentiable search needs cost models with a gradient, but that of {name!r} carries none; write it "
            "as torch arithmetic over its loads, or take a search that only scores, such as search=lp"
        )
