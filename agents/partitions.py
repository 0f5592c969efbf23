"""Partitions of the filters of every layer among the widths, drawn from one multinomial per layer (Zur et al. 2019,
arXiv 1904.09872)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.genes import Genome
from agents.score_function import rounded, softmax
from ajpq.problem import Problem

STEEPEST = 100.0  # slope of the tilt at which nothing is left but the cheapest option


@dataclass(frozen=True, eq=False)
class Choice:
    """What one alpha vector decides. kind "width": of the filters of a layer, `parts` of them; "act": of its input,
    once. options: ascending; 0 = pruned. genes: of the genome that follow; sparsity: the one that 0 decides."""

    layer: int  # place in `network.layers`
    kind: str
    options: tuple[int, ...]
    parts: int
    genes: np.ndarray
    sparsity: int | None = None

    @property
    def slopes(self) -> np.ndarray:
        """How dear each option is, float64 (k,) in [0, 1]."""
        return np.array(self.options) / self.options[-1]

    def chances(self) -> np.ndarray:
        """The paper's first probabilities: 8 bits have 1 / (2 k - 1), half of what each other option has."""
        eight = (np.array(self.options) == 8) & (self.kind == "width")
        return softmax(np.where(eight, -np.log(2.0), 0.0))


class Partitions:
    """Partitions of the filters of every layer among the widths, as counts, and the policies that they are.

    A filter is a block of kernels (`Choices.blocks`; "max" = one kernel each). The paper assigns widths in the order of
    the filters; here the most important get the most bits. 0 bits is a choice of the layer that is the first to write a
    prunable space: its part of the filters is the part of the space's channels that goes, the least important ones, and
    what else was drawn is stretched over the survivors. Another layer that writes the same space divides its survivors.
    The width of an input is one number per layer, so a vector of its own with one draw.

    home: values of the genome that hold wherever nothing is drawn; without `prune`, where 0 is no choice, all its
    sparsities.
    """

    def __init__(self, genome: Genome, home: np.ndarray, prune: bool) -> None:
        self.genome, self.home = genome, home
        self.choices: list[Choice] = []
        for at, layer in enumerate(genome.network.layers):
            mine = {kind: [i for i, g in enumerate(genome.genes) if (g.layer, g.kind) == (at, kind)]
                    for kind in ("sparsity", "act", "width")}  # fmt: skip
            zero, widths = mine["sparsity"] if prune else [], genome.space.widths(layer)
            parts = min(
                layer.c_out, layer.c_out if genome.space.choices.blocks == "max" else genome.space.choices.blocks
            )
            options = (0, *widths) if zero else widths
            if len(options) > 1:
                genes = np.array(mine["width"], np.int64)
                self.choices.append(Choice(at, "width", options, parts, genes, zero[0] if zero else None))
            for i in mine["act"]:
                self.choices.append(Choice(at, "act", genome.space.acts(layer), 1, np.array([i])))

    def initial(self, trust: float) -> list[np.ndarray]:
        """The first alphas: probabilities that are `Choice.chances`, and by a part `trust` those of home."""
        return [np.log((1 - trust) * c.chances() + trust * self._at_home(c) + 1e-12) for c in self.choices]

    def _at_home(self, choice: Choice) -> np.ndarray:
        shares, first = np.zeros(len(choice.options)), int(choice.sparsity is not None)
        shares[first + int(self.home[choice.genes[0]]) if len(choice.genes) else -1] = 1.0
        if choice.sparsity is not None:
            pruned = self.genome.genes[choice.sparsity].options[self.home[choice.sparsity]]
            shares = (1 - pruned) * shares
            shares[0] = pruned
        return shares

    def draw(self, alphas: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Counts, int64 (k,) per choice, that sum to its parts."""
        return [rng.multinomial(c.parts, softmax(alpha)) for c, alpha in zip(self.choices, alphas, strict=True)]

    def deterministic(self, alphas: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The counts nearest to the probabilities. The paper gives all that rounding down leaves to the last option,
        which with few filters is most of them."""
        return [rounded(softmax(alpha), c.parts) for c, alpha in zip(self.choices, alphas, strict=True)]

    def values(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        """Of the genome; exact, within budget or not."""
        genome, values = self.genome, self.home.copy()
        for choice, n in zip(self.choices, counts, strict=True):
            if choice.sparsity is not None:
                values[choice.sparsity] = self._pruned(choice, n[0] / choice.parts)
        alive = genome.alive(values)
        for choice, n in zip(self.choices, counts, strict=True):
            first = int(choice.sparsity is not None)
            drawn = np.repeat(np.arange(len(choice.options) - first), n[first:])[::-1]  # the widest first
            writes = genome.network.layers[choice.layer].writes
            living = min(choice.parts, int(alive[writes].sum())) if choice.kind == "width" else 1
            if len(drawn) and len(choice.genes):
                values[choice.genes[:living]] = drawn[(2 * np.arange(living) + 1) * len(drawn) // (2 * living)]
        return values

    def _pruned(self, choice: Choice, sparsity: float) -> int:
        """The value of a sparsity gene that prunes nearly as much."""
        options = np.array(self.genome.genes[choice.sparsity].options)
        return int(np.argmin(np.abs(options - sparsity)))

    def expected_costs(self, alphas: Sequence[np.ndarray], problem: Problem) -> np.ndarray:
        """Of the limited costs, float64 (n limits,): exact in the widths, at the expected sparsity."""
        genome, budget, values = self.genome, problem.budget, self.home.copy()
        chances = {(c.layer, c.kind): softmax(alpha) for c, alpha in zip(self.choices, alphas, strict=True)}
        for choice in self.choices:
            if choice.sparsity is not None:
                values[choice.sparsity] = self._pruned(choice, chances[choice.layer, "width"][0])
        alive, costs = genome.alive(values), np.zeros(len(budget.limits))
        for at, layer in enumerate(genome.network.layers):
            widths, acts = genome.space.widths(layer), genome.space.acts(layer)
            of_widths = chances.get((at, "width"), np.ones(1))[-len(widths) :]
            of_widths = of_widths / of_widths.sum() if of_widths.sum() > 0 else np.eye(len(widths))[0]
            for width, p in zip(widths, of_widths, strict=True):
                bits = np.where(alive[layer.writes], width, 0).astype(np.uint8)
                for act, q in zip(acts, chances.get((at, "act"), np.ones(1)), strict=True):
                    costs += p * q * budget.layer_costs(layer, bits, act, alive)
        return costs

    def meet(self, alphas: Sequence[np.ndarray], problem: Problem, frozen: Sequence[bool]) -> None:
        """Tilt the alphas that are not frozen, in place, by the least t >= 0 in alpha_i - t * slope_i from which the
        expected partition is within budget."""

        def tilted(t: float) -> list[np.ndarray]:
            return [
                alpha if still else alpha - t * choice.slopes
                for alpha, choice, still in zip(alphas, self.choices, frozen, strict=True)
            ]

        if not self.choices or problem.budget.fits(self.expected_costs(alphas, problem)):
            return
        low, high = 0.0, STEEPEST
        for _ in range(16):
            middle = (low + high) / 2
            fits = problem.budget.fits(self.expected_costs(tilted(middle), problem))
            low, high = (low, middle) if fits else (middle, high)
        for alpha, moved in zip(alphas, tilted(high), strict=True):
            alpha[:] = moved
