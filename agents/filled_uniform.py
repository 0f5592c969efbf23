"""The same width and sparsity everywhere, and one width higher where that still fits."""

from __future__ import annotations

import numpy as np

from agents.genes import Account, Genome
from agents.uniform import Uniform, homogeneous_within, spread
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem


class FilledUniform(Uniform):
    """From every policy of `Uniform`, blocks of kernels are raised by one width, one after the other, each where that
    keeps all budgets; inputs, where their width is a choice, come after all blocks. Three orders of the blocks are
    tried: by importance per cost (summed importance of a block's kernels over the part of the scarcest budget that
    raising it takes), from the first layer to the last, from the last to the first. The best policy of all.

    evaluations: at most so many policies are scored, of every order evenly spaced between the widest and the
    narrowest. step: of sparsity.
    """

    def _few(self, problem: Problem, n: int) -> list[CompressionPolicy] | None:
        genome, found = Genome(problem.space), homogeneous_within(problem, self.step)
        if not found:
            return None
        orders = (_by_importance, _forwards, _backwards)
        pairs = [(point, order) for order in orders for point in found]
        policies = []
        for point, order in spread(pairs, n):
            account = Account(genome, problem.budget, point.values(genome))
            account.fill(order(account))
            policies.append(genome.policy(account.values))
        return policies


def _forwards(account: Account) -> list[int]:
    """Genes of blocks, then of inputs, in execution order."""
    genes = account.genome.genes
    return [i for kind in ("width", "act") for i, gene in enumerate(genes) if gene.kind == kind]


def _backwards(account: Account) -> list[int]:
    kinds = [account.genome.genes[i].kind for i in _forwards(account)]
    blocks = kinds.count("width")
    order = _forwards(account)
    return order[:blocks][::-1] + order[blocks:][::-1]


def _by_importance(account: Account) -> list[int]:
    genome, worth = account.genome, {}
    for i in _forwards(account):
        gene, value = genome.genes[i], int(account.values[i])
        if value + 1 < len(gene.options):
            layer = genome.network.layers[gene.layer]
            blocks = genome.blocks(gene.layer, account.alive)
            kernels = blocks[gene.block] if gene.block < len(blocks) else np.arange(0)
            costs = account.look(i, value + 1)[0]
            gain = genome.space.scores[layer.name][kernels if gene.kind == "width" else slice(None)].sum()
            worth[i] = gene.kind == "width", gain / max(float((costs / account.budget.caps).max()), 1e-12)
    return sorted(worth, key=worth.get, reverse=True)
