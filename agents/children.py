"""Children of a super net: policies within budget, drawn from the probabilities of its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from agents.genes import Account, Gene, Genome
from agents.linear_program import settle
from agents.sensitivity import Sensitivity
from ajpq.architecture import STEEPEST, Architecture
from ajpq.branches import Skipped
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.space import SearchSpace

BISECTIONS = 20


class TiedGenome:
    """A `Genome` in which some genes always have the same value: one gene for every group. Everything that
    `agents.genes.Account` asks of a genome."""

    def __init__(self, genome: Genome, groups: Sequence[Sequence[int]], skipped: Skipped) -> None:
        """groups: the genes of every group, of one kind and with the same options. skipped: what no policy has."""
        self.genome, self.network, self.groups, self.skipped = genome, genome.network, groups, skipped
        self.genes: tuple[Gene, ...] = tuple(genome.genes[group[0]] for group in groups)
        self.levels = genome.levels[[group[0] for group in groups]]
        self.touches = tuple(tuple(sorted({at for i in group for at in genome.touches[i]})) for group in groups)
        self.owner = np.empty(len(genome), np.int64)  # gene -> group
        for i, group in enumerate(groups):
            self.owner[list(group)] = i

    def __len__(self) -> int:
        return len(self.groups)

    def without(self, skipped: Skipped) -> TiedGenome:
        """The same genes, of the policies without these branches; genes of their layers alone change nothing."""
        return TiedGenome(self.genome, self.groups, skipped)

    def alive(self, values: np.ndarray) -> np.ndarray:
        return (self.genome.alive(values[self.owner]) | self.skipped.unwritten) & ~self.skipped.dead

    def act_bits(self, at: int, values: np.ndarray) -> int:
        if self._is_skipped(at):
            return self.genome.space.acts(self.network.layers[at])[0]
        return self.genome.act_bits(at, values[self.owner])

    def weight_bits(self, at: int, values: np.ndarray, alive: np.ndarray) -> np.ndarray:
        if self._is_skipped(at):
            return np.zeros(self.network.layers[at].c_out, np.uint8)
        return self.genome.weight_bits(at, values[self.owner], alive)

    def blocks(self, at: int, alive: np.ndarray) -> list[np.ndarray]:
        return [] if self._is_skipped(at) else self.genome.blocks(at, alive)

    def _is_skipped(self, at: int) -> bool:
        return self.network.layers[at].name in self.skipped.layers

    def policy(self, values: np.ndarray) -> CompressionPolicy:
        alive, layers = self.alive(values), self.network.layers
        return CompressionPolicy(
            {layer.name: self.weight_bits(at, values, alive) for at, layer in enumerate(layers)},
            {layer.name: self.act_bits(at, values) for at, layer in enumerate(layers)},
        )


class Children:
    """Draws policies by perturb-and-MAP (Papandreou and Yuille 2011): Gumbel noise is added to the log-probabilities,
    and the most probable policy that spends the budgets is taken.

    That policy is found by Lagrangian relaxation: every decision takes the best option of its log-probability minus
    t * cost (`Architecture.slopes`), t being the least, of either sign, from which a cost is within budget; costs that
    depend on the fewest tables of decisions come first, and each has the tilt of those that are left. What then still
    breaks a budget is lowered, least log-probability per cost first (`agents.linear_program.settle`), and what is left
    over is spent in random order. Which branches are skipped is settled with the tilts. So none is outside of a budget,
    and none is edited after it was drawn."""

    def __init__(self, problem: Problem, architecture: Architecture) -> None:
        self.architecture, self.budget = architecture, problem.budget
        space: SearchSpace = problem.space
        if architecture.granularity != "kernel":
            space = SearchSpace(space.network, replace(space.choices, blocks=1), space.scores)
        full = Genome(space)
        self.genome = TiedGenome(full, _groups(full, architecture), space.network.without(()))
        self._shares = _shares(architecture)
        self._slopes = [slopes.double().numpy() for slopes in architecture.slopes]
        taken: set[int] = set()
        self._tilts: list[tuple[int, list[int]]] = []  # of every limited cost, the tables that its tilt is about
        for i, tables in architecture.concerned(problem.budget):
            self._tilts.append((i, [j for j in tables if j not in taken]))
            taken |= set(tables)

    def draw(self, rng: np.random.Generator, noise: float) -> CompressionPolicy:
        """noise: factor of the Gumbel noise. 0 gives the most probable policy, 1 a sample."""
        logs = [torch.log_softmax(table.detach().double(), 1).numpy() for table in self.architecture.parameters()]
        logs = [table + noise * rng.gumbel(size=table.shape) for table in logs]
        for i, tables in self._tilts:
            low, high = -STEEPEST, STEEPEST  # at high the cost is within budget, or cannot be made so
            for _ in range(BISECTIONS if tables else 0):
                middle = (low + high) / 2
                tilted = self._tilted(logs, tables, middle)
                genome = self.genome.without(self._skipped(tilted))
                costs = self._costs(genome, self._best(genome, self.sensitivity(tilted)))
                low, high = (low, middle) if costs[i] <= self.budget.caps[i] else (middle, high)
            logs = self._tilted(logs, tables, high)
        account = self._settled(self.genome.without(self._skipped(logs)), logs)
        if not account.fits:  # channels that have lost all their writers cannot be pruned
            account = self._settled(self.genome, logs)
        order = rng.permutation(len(self.genome))
        while any([account.raised(i) for i in order]):
            pass
        return account.genome.policy(account.values)

    def _settled(self, genome: TiedGenome, logs: Sequence[np.ndarray]) -> Account:
        sensitivity = self.sensitivity(logs)
        account = Account(genome, self.budget, self._best(genome, sensitivity), sensitivity.of_layer)
        settle(account, np.ones(len(genome)), np.ones(len(genome)))
        return account

    def _skipped(self, logs: Sequence[np.ndarray]) -> Skipped:
        """What goes with the branches that are rather skipped than taken."""
        rather = logs[3][:, 0] > logs[3][:, 1]
        branches = [branch for branch, gone in zip(self.architecture.branches, rather, strict=True) if gone]
        return self.architecture.network.without([name for branch in branches for name in branch.layers])

    def _tilted(self, logs: Sequence[np.ndarray], tables: Sequence[int], by: float) -> list[np.ndarray]:
        return [x - by * self._slopes[j] if j in tables else x for j, x in enumerate(logs)]

    def _costs(self, genome: TiedGenome, values: np.ndarray) -> np.ndarray:
        """float64 (n limits,)."""
        alive = genome.alive(values)
        return sum(
            self.budget.layer_costs(layer, genome.weight_bits(at, values, alive), genome.act_bits(at, values), alive)
            for at, layer in enumerate(genome.network.layers)
        )

    def sensitivity(self, logs: Sequence[np.ndarray]) -> Sensitivity:
        """By how much each option's log-probability is below that of the best, shared out among the kernels that the
        decision is about. logs: of widths (n_widths, K), acts (n_acts, J), keeping (n_keep, 2), and of skipping, which
        is not looked at."""
        architecture = self.architecture
        widths, inputs, keeping = (table.max(1, keepdims=True) - table for table in logs[:3])
        of_widths, of_channels = self._shares
        channels = np.zeros((2, architecture.network.n_channels))
        ruled = architecture.keep_rows >= 0
        channels[:, ruled] = keeping[architecture.keep_rows[ruled]].T * of_channels[ruled]
        weights, acts = {}, {}
        for layer in architecture.network.layers:
            pruned, kept = channels[:, layer.writes]
            rows = architecture.width_rows.get(layer.name)
            options = architecture.space.widths(layer) if rows is None else architecture.options[0]
            losses = np.zeros((len(options), layer.c_out))
            if rows is not None:
                losses = (widths[rows] * of_widths[rows][:, None]).T
            weights[layer.name] = {0: pruned} | {b: kept + loss for b, loss in zip(options, losses, strict=True)}
            row = architecture.act_rows.get(layer.name)
            shared = 1.0 if row is None else list(architecture.act_rows.values()).count(row)
            acts[layer.name] = dict(
                zip(architecture.space.acts(layer), [0.0] if row is None else inputs[row] / shared, strict=True)
            )
        return Sensitivity(weights, acts)

    def _best(self, tied: TiedGenome, sensitivity: Sensitivity) -> np.ndarray:
        """The value of every gene with the least loss, those of sparsity first."""
        full = tied.genome
        order = sorted(range(len(tied)), key=lambda i: tied.genes[i].kind != "sparsity")
        values, alive = np.zeros(len(tied), np.int64), None
        for i in order:
            gene = tied.genes[i]
            if gene.kind == "sparsity":
                values[i] = int(np.argmin(self._of_sparsities(gene, sensitivity)))
                continue
            alive = tied.alive(values) if alive is None else alive
            losses = sum(self._of_options(tied, full.genes[j], sensitivity, alive) for j in tied.groups[i])
            values[i] = int(np.argmin(losses))
        return values

    def _of_options(self, tied: TiedGenome, gene: Gene, sensitivity: Sensitivity, alive: np.ndarray) -> np.ndarray:
        name = self.genome.network.layers[gene.layer].name
        if gene.kind == "act":
            return np.array([sensitivity.acts[name][b] for b in gene.options])
        blocks = tied.blocks(gene.layer, alive)
        kernels = blocks[gene.block] if gene.block < len(blocks) else []
        return np.array([sensitivity.weights[name][b][kernels].sum() for b in gene.options])

    def _of_sparsities(self, gene: Gene, sensitivity: Sensitivity) -> np.ndarray:
        """Of every option: what pruning adds, the width of what stays being free to choose."""
        network, space = self.genome.network, self.genome.genome.space
        change = np.zeros(network.n_channels)
        for name in dict.fromkeys(name for s in gene.spaces for name in network.spaces[s].writers):
            table = sensitivity.weights[name]
            kept = np.min([losses for b, losses in table.items() if b], axis=0)
            np.add.at(change, network[name].writes, table[0] - kept)
        total = np.zeros(len(gene.options))
        for s in gene.spaces:
            sums = np.concatenate([[0.0], np.cumsum(change[space.prune_order[s]])])
            total += sums[[space.n_pruned(s, option) for option in gene.options]]
        return total


def _groups(genome: Genome, architecture: Architecture) -> list[list[int]]:
    """Genes that one row of the architecture decides; a gene whose kernels have rows of their own stays alone."""
    groups: dict[tuple, list[int]] = {}
    for i, gene in enumerate(genome.genes):
        name = architecture.network.layers[gene.layer].name
        key: tuple = (i,)
        if gene.kind == "act":
            key = "act", architecture.act_rows[name]
        elif gene.kind == "width" and architecture.granularity != "kernel":
            key = "width", int(architecture.width_rows[name][0])
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _shares(architecture: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """1 / the number of kernels that a row of widths is about, (n_widths,); 1 / the number of kernels that the row of
    a channel is about, (n_channels,)."""
    network: Network = architecture.network
    rows: Iterable[np.ndarray] = architecture.width_rows.values()
    widths = sum((np.bincount(r, minlength=len(architecture.widths)) for r in rows), np.zeros(len(architecture.widths)))
    keeping = np.zeros(len(architecture.keeping) + 1)  # the last: always kept
    for layer in network.layers:
        np.add.at(keeping, architecture.keep_rows[layer.writes], 1)
    return 1 / np.maximum(widths, 1), 1 / np.maximum(keeping, 1)[architecture.keep_rows]
