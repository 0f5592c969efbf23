"""Distributions over the widths of channel spaces, as Zur et al. 2019 (arXiv 1904.09872) draw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from agents.genes import Genome
from agents.score_function import softmax


class Distribution(Protocol):
    """Of the indices 0 .. levels - 1 into the widths, each space's drawn by itself."""

    levels: int

    def start(self, q: float) -> np.ndarray:
        """The alphas with which indices are Binomial(levels - 1, q)."""

    def mean(self, alphas: np.ndarray) -> float:
        """Of an index."""

    def draw(self, alphas: np.ndarray, spaces: int, rng: np.random.Generator) -> np.ndarray:
        """Indices, int64 (spaces,)."""

    def statistic(self, indices: np.ndarray) -> np.ndarray:
        """What the score function takes: of the shape of alphas, summed over the spaces."""

    def expected(self, alphas: np.ndarray, spaces: int) -> np.ndarray:
        """Its expectation."""


@dataclass(frozen=True)
class Categorical:
    """Softmax over the widths. alphas: (levels,)."""

    levels: int

    def start(self, q: float) -> np.ndarray:
        return stats.binom.logpmf(np.arange(self.levels), self.levels - 1, q)

    def mean(self, alphas: np.ndarray) -> float:
        return float(softmax(alphas) @ np.arange(self.levels))

    def draw(self, alphas: np.ndarray, spaces: int, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(self.levels, spaces, p=softmax(alphas))

    def statistic(self, indices: np.ndarray) -> np.ndarray:
        return np.bincount(indices, minlength=self.levels).astype(float)

    def expected(self, alphas: np.ndarray, spaces: int) -> np.ndarray:
        return spaces * softmax(alphas)


@dataclass(frozen=True)
class Binomial:
    """index ~ Binomial(levels - 1, sigmoid(alpha)). alphas: (1,)."""

    levels: int

    def start(self, q: float) -> np.ndarray:
        return np.array([np.log(q / (1 - q))])

    def mean(self, alphas: np.ndarray) -> float:
        return (self.levels - 1) / (1 + float(np.exp(-alphas[0])))

    def draw(self, alphas: np.ndarray, spaces: int, rng: np.random.Generator) -> np.ndarray:
        return rng.binomial(self.levels - 1, self.mean(alphas) / (self.levels - 1), spaces)

    def statistic(self, indices: np.ndarray) -> np.ndarray:
        return np.array([float(indices.sum())])

    def expected(self, alphas: np.ndarray, spaces: int) -> np.ndarray:
        return np.array([spaces * self.mean(alphas)])


DISTRIBUTIONS = {"categorical": Categorical, "binomial": Binomial, "block_binomial": Binomial}


def blocks_of(genome: Genome, distribution: str) -> list[np.ndarray]:
    """The sparsity genes that share an alpha: each by itself, or, for "block_binomial", all whose spaces have the same
    number of channels (16, 32 and 64 in the paper's networks)."""
    genes = [i for i, gene in enumerate(genome.genes) if gene.kind == "sparsity"]
    if distribution != "block_binomial":
        return [np.array([i]) for i in genes]
    spaces = genome.network.spaces
    sizes = {i: max(spaces[s].size for s in genome.genes[i].spaces) for i in genes}
    return [np.array([i for i in genes if sizes[i] == size]) for size in sorted(set(sizes.values()))]
