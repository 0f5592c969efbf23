"""A policy as whole numbers, one per decision, so that searches can change, compare and cross policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ajpq.budget import Budget
from ajpq.draft import Draft
from ajpq.network import LayerSpec
from ajpq.policy import CompressionPolicy
from ajpq.space import SearchSpace


@dataclass(frozen=True, eq=False)
class Gene:
    """One decision. kind "sparsity" (of the spaces that `layer` is the first to write), "act" (of its input) or
    "width" (of its block number `block`). options: the answers, the cheapest first; the value of a gene is an index
    into them, so no cost falls when it grows."""

    kind: str
    layer: int  # place in `network.layers`
    options: tuple[float, ...]
    spaces: tuple[int, ...] = ()
    block: int = 0


class Genome:
    """The decisions of a `Draft` as genes, in the order in which the draft asks them, without those that have one
    answer only. Values, an int64 (n_genes,) with 0 <= values[i] < len(genes[i].options), are any policy of the space,
    within budget or not; where pruning leaves a layer fewer kernels than blocks, the genes of the last blocks rest."""

    def __init__(self, space: SearchSpace) -> None:
        self.space, self.network = space, space.network
        genes: list[Gene] = []
        self.first_width: list[int | None] = []  # per layer, its first gene of kind "width"
        self._act: list[int | None] = []  # per layer, its gene of kind "act"
        taken: set[int] = set()
        for at, layer in enumerate(self.network.layers):
            fresh = tuple(
                s
                for s in dict.fromkeys(self.network.space_of[layer.writes].tolist())
                if s not in taken and len(space.prune_order[s])
            )
            taken |= set(fresh)
            if len(sparsities := self._sparsities(fresh)) > 1:
                genes.append(Gene("sparsity", at, sparsities, fresh))
            acts, widths = space.acts(layer), space.widths(layer)
            self._act.append(len(genes) if len(acts) > 1 else None)
            if len(acts) > 1:
                genes.append(Gene("act", at, acts))
            self.first_width.append(len(genes) if len(widths) > 1 else None)
            if len(widths) > 1:
                n = layer.c_out if space.choices.blocks == "max" else min(int(space.choices.blocks), layer.c_out)
                genes += [Gene("width", at, widths, block=block) for block in range(n)]
        self._partitions: dict[int, tuple] = {}
        self.genes = tuple(genes)
        self.levels = np.array([len(gene.options) for gene in genes], np.int64)  # (n_genes,)
        self.touches = tuple(map(self._touched, genes))  # per gene, the layers whose cost it changes

    def _sparsities(self, spaces: tuple[int, ...]) -> tuple[float, ...]:
        """Descending; one for every distinct number of channels that can go."""
        size = max((self.network.spaces[s].size for s in spaces), default=0)
        top = self.space.choices.max_sparsity
        found: dict[tuple[int, ...], float] = {}
        for n in range(int(np.ceil(top * size)) + 1):
            sparsity = min(n / size, top) if size else 0.0
            found.setdefault(tuple(self.space.n_pruned(s, sparsity) for s in spaces), sparsity)
        return tuple(reversed(found.values()))

    def _touched(self, gene: Gene) -> tuple[int, ...]:
        names = {self.network.layers[gene.layer].name}
        for s in gene.spaces:
            names |= self.network.carriers[s]
        return tuple(sorted(self.network.index[name] for name in names))

    def __len__(self) -> int:
        return len(self.genes)

    def cheapest(self) -> np.ndarray:
        return np.zeros(len(self), np.int64)

    def homogeneous(self, width: int, sparsity: float = 0.0, act_bits: int | None = None) -> np.ndarray:
        """The values of `SearchSpace.homogeneous`."""
        act_bits = self.space.choices.act_bits[-1] if act_bits is None else act_bits
        values = self.cheapest()
        for i, gene in enumerate(self.genes):
            options = np.array(gene.options)
            if gene.kind == "sparsity":  # the largest that prunes no more
                values[i] = min(int((options > sparsity + 1e-9).sum()), len(options) - 1)
            else:
                values[i] = int(np.argmin(np.abs(options - (width if gene.kind == "width" else act_bits))))
        return values

    def alive(self, values: np.ndarray) -> np.ndarray:
        """bool (n_channels,)."""
        alive = np.ones(self.network.n_channels, bool)
        for gene, value in zip(self.genes, values, strict=True):
            for s in gene.spaces:
                alive[self.space.prune_order[s][: self.space.n_pruned(s, gene.options[value])]] = False
        return alive

    def act_bits(self, at: int, values: np.ndarray) -> int:
        """Width of the input of layer number `at`."""
        i = self._act[at]
        return int(self.space.acts(self.network.layers[at])[0] if i is None else self.genes[i].options[values[i]])

    def blocks(self, at: int, alive: np.ndarray) -> list[np.ndarray]:
        """`SearchSpace.blocks` of layer number `at`."""
        return self._partition(at, alive)[1]

    def _partition(self, at: int, alive: np.ndarray) -> tuple[bytes, list[np.ndarray], np.ndarray, np.ndarray]:
        """Which kernels survive, their blocks, these one after the other, and the block of each; found again where the
        same survive as the last time."""
        layer = self.network.layers[at]
        key = alive[layer.writes].tobytes()
        if at not in self._partitions or self._partitions[at][0] != key:
            blocks = self.space.blocks(layer, alive)
            owner = np.repeat(np.arange(len(blocks)), np.array([len(block) for block in blocks], int))
            self._partitions[at] = key, blocks, np.concatenate([np.zeros(0, np.int64), *blocks]), owner
        return self._partitions[at]

    def weight_bits(self, at: int, values: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """Widths of the kernels of layer number `at`, uint8 (c_out,)."""
        layer, i = self.network.layers[at], self.first_width[at]
        widths = np.array(self.space.widths(layer), np.uint8)
        if i is None:
            return np.where(alive[layer.writes], widths[0], 0).astype(np.uint8)
        _, _, kernels, owner = self._partition(at, alive)
        bits = np.zeros(layer.c_out, np.uint8)
        bits[kernels] = widths[values[i + owner]]
        return bits

    def values_of(self, policy: CompressionPolicy) -> np.ndarray:
        """The values whose policy is nearest to `policy`; exactly it, if it is one of this space."""
        alive = policy.alive(self.network)
        values = np.zeros(len(self), np.int64)
        for i, gene in enumerate(self.genes):
            layer = self.network.layers[gene.layer]
            if gene.kind == "sparsity":
                gone = sum(int((~alive[self.network.spaces[s].channels]).sum()) for s in gene.spaces)
                counts = [sum(self.space.n_pruned(s, option) for s in gene.spaces) for option in gene.options]
                values[i] = int(np.argmin(np.abs(np.array(counts) - gone)))
                continue
            wanted = float(policy.act_bits[layer.name])
            if gene.kind == "width":
                blocks = self.blocks(gene.layer, alive)
                if gene.block >= len(blocks):
                    continue
                wanted = float(policy.weight_bits[layer.name][blocks[gene.block]].mean())
            values[i] = int(np.argmin(np.abs(np.array(gene.options, float) - wanted)))
        return values

    def follow(self, draft: Draft, values: np.ndarray) -> CompressionPolicy:
        """The policy of a draft that is answered with these values, or with the nearest that it offers: `policy` itself
        wherever that is within budget."""
        wishes = {(g.kind, g.layer, g.block): g.options[v] for g, v in zip(self.genes, values, strict=True)}
        while (decision := draft.decision) is not None:
            key = decision.kind, self.network.index[decision.layer.name], decision.block
            wish = wishes.get(key, decision.options[0])
            if decision.kind == "sparsity":
                draft.take(float(np.clip(wish, decision.options[0], decision.options[-1])))
            else:
                draft.take(min(decision.options, key=lambda b: abs(b - wish)))  # noqa: B023
        return draft.policy()

    def policy(self, values: np.ndarray) -> CompressionPolicy:
        alive, layers = self.alive(values), self.network.layers
        return CompressionPolicy(
            {layer.name: self.weight_bits(at, values, alive) for at, layer in enumerate(layers)},
            {layer.name: self.act_bits(at, values) for at, layer in enumerate(layers)},
        )


Loss = Callable[[LayerSpec, np.ndarray, int], float]  # (layer, weight bits (c_out,), act bits) -> what it adds


class Account:
    """Values and what they cost, kept up to date while one gene after the other is changed.

    costs: float64 (n_layers, n limits); losses: float64 (n_layers,), of `loss` where one is given.
    """

    def __init__(self, genome: Genome, budget: Budget, values: np.ndarray, loss: Loss | None = None) -> None:
        self.genome, self.budget, self.loss = genome, budget, loss
        n = len(genome.network.layers)
        self.values, self.alive = values.copy(), genome.alive(values)
        self.costs, self.losses = np.zeros((n, len(budget.limits))), np.zeros(n)
        self._write(self._rows(range(n), self.values, self.alive))

    @property
    def total(self) -> np.ndarray:
        """float64 (n limits,)."""
        return self.costs.sum(axis=0)

    @property
    def fits(self) -> bool:
        return self.budget.fits(self.total)

    def _rows(self, layers: Iterable[int], values: np.ndarray, alive: np.ndarray) -> list:
        rows = []
        for at in layers:
            layer, act = self.genome.network.layers[at], self.genome.act_bits(at, values)
            bits = self.genome.weight_bits(at, values, alive)
            loss = self.loss(layer, bits, act) if self.loss else 0.0
            rows.append((at, self.budget.layer_costs(layer, bits, act, alive), loss))
        return rows

    def _write(self, rows: list) -> None:
        for at, costs, loss in rows:
            self.costs[at], self.losses[at] = costs, loss

    def look(self, i: int, value: int) -> tuple[np.ndarray, float, list]:
        """What gene i at a value would add: to every cost (n limits,), to the loss, and a note for `take`."""
        values = self.values.copy()
        values[i] = value
        alive = self.genome.alive(values) if self.genome.genes[i].kind == "sparsity" else self.alive
        rows = self._rows(self.genome.touches[i], values, alive)
        return (
            sum(costs - self.costs[at] for at, costs, _ in rows),
            float(sum(loss - self.losses[at] for at, _, loss in rows)),
            [i, value, alive, rows],
        )

    def take(self, note: list) -> None:
        i, self.values[i], self.alive, rows = note
        self._write(rows)

    def raised(self, i: int) -> bool:
        """One option higher if the budgets allow it; whether it was done."""
        if self.values[i] + 1 >= self.genome.levels[i]:
            return False
        costs, _, note = self.look(i, self.values[i] + 1)
        if allowed := self.budget.fits(self.total + costs):
            self.take(note)
        return allowed

    def fill(self, order: Iterable[int]) -> None:
        """Raise every gene of `order` by one option where that fits."""
        for i in order:
            self.raised(i)

    def trim(self, rng: np.random.Generator, spare: Sequence[int] = ()) -> None:
        """Lower genes by one option, in random order and again, until all budgets hold; those of `spare` only when
        all others are at their cheapest."""
        chosen = np.isin(np.arange(len(self.genome)), spare)
        for open_ in (~chosen, chosen):
            while not self.fits and self.values[open_].any():
                for i in rng.permutation(np.flatnonzero(open_ & (self.values > 0))):
                    self.take(self.look(i, self.values[i] - 1)[2])
                    if self.fits:
                        return
