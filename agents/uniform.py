"""The same width and sparsity everywhere: the control that needs no search."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.genes import Genome
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult

STEP = 1 / 32  # of sparsity


@dataclass(frozen=True)
class Homogeneous:
    """The arguments of `SearchSpace.homogeneous`."""

    width: int
    sparsity: float
    act_bits: int

    def policy(self, problem: Problem) -> CompressionPolicy:
        return problem.space.homogeneous(self.width, self.sparsity, self.act_bits)

    def values(self, genome: Genome) -> np.ndarray:
        return genome.homogeneous(self.width, self.sparsity, self.act_bits)


def homogeneous_within(problem: Problem, step: float = STEP) -> list[Homogeneous]:
    """For every width of weights and of inputs, the policy with the least sparsity, in steps of `step`, that meets all
    budgets, where there is one; the widest first."""
    choices = problem.space.choices
    top = choices.max_sparsity if 0 in choices.weight_bits else 0.0
    sparsities = [*np.arange(0, top, step).tolist(), top]
    found = []
    for act in reversed(choices.act_bits):
        for width in reversed([b for b in choices.weight_bits if b]):
            grid = [Homogeneous(width, sparsity, act) for sparsity in sparsities]
            first = bisect_left(grid, True, key=lambda point: problem.budget.admits(point.policy(problem)))
            found += grid[first : first + 1]
    return found


def spread(things: Sequence, n: int) -> list:
    """At most n of these, evenly spaced and in order."""
    return [things[i] for i in np.linspace(0, len(things) - 1, min(max(n, 0), len(things))).round().astype(int)]


def nothing_fits(problem: Problem) -> AjpqError:
    limits = ", ".join(f"{name}={limit:g}" for name, limit in problem.budget.limits.items())
    return AjpqError(
        f"a homogeneous policy must meet every budget, but none meets {limits}; use another search or a larger budget"
    )


class Uniform:
    """For every width, the least sparsity (in steps of `step`, the same in every space) that meets all budgets; the
    best of them. Also a control (`ajpq.control`) of other searches.

    evaluations: at most so many policies are scored, evenly spaced between the widest and the narrowest.
    """

    def __init__(self, evaluations: int = 100, step: float = STEP) -> None:
        self.evaluations, self.step = evaluations, step

    def search(self, problem: Problem) -> SearchResult:
        found = self._few(problem, self.evaluations - problem.evaluations)
        if found is None:
            raise nothing_fits(problem)
        problem.score_all(found)
        return problem.result()

    def policies(self, problem: Problem) -> list[CompressionPolicy]:
        """Those that `search` scores first; none where no homogeneous one meets the budgets."""
        return self._few(problem, self.evaluations) or []

    def _few(self, problem: Problem, n: int) -> list[CompressionPolicy] | None:
        """At most n; None where no homogeneous one meets the budgets."""
        found = homogeneous_within(problem, self.step)
        return [point.policy(problem) for point in spread(found, n)] if found else None
