"""Random heterogeneous policies of nearly the same cost: the control of a study of variance (Zur et al. 2019, arXiv
1904.09872, RandomSearch)."""

from __future__ import annotations

import numpy as np

from agents.genes import Account, Genome
from agents.uniform import homogeneous_within
from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult


class Nearby:
    """Policies whose `cost` is between `least` of its budget and the budget: widths of all blocks and inputs drawn
    independently and uniformly, then lowered by one option in random order until every budget holds and the cost is
    below a point drawn from that band, and raised where it fell out of it. Nothing is pruned that need not be.

    evaluations: policies to score. seed: of the draws. cost: None = the first that is limited. Raises AjpqError for one
    that is not limited, and where the cost cannot be that high.
    """

    def __init__(self, evaluations: int = 1, seed: int = 0, least: float = 0.8, cost: str | None = None) -> None:
        if not 0 <= least < 1:
            raise AjpqError(f"0 <= least < 1 must hold (a fraction of the budget), but it is {least}; choose another")
        self.evaluations, self.seed, self.least, self.cost = evaluations, seed, least, cost

    def search(self, problem: Problem) -> SearchResult:
        limited = problem.budget.names
        if self.cost is not None and self.cost not in limited:
            raise AjpqError(
                f"cost must be limited, but {self.cost!r} is none of {', '.join(limited)}; choose one of them"
            )
        at, rng, genome = (
            limited.index(self.cost or limited[0]),
            np.random.default_rng(self.seed),
            Genome(problem.space),
        )
        for _ in range(10 * self.evaluations):  # a policy drawn twice is not an evaluation
            if problem.evaluations >= self.evaluations:
                break
            problem.score(self._draw(problem, genome, at, rng))
        return problem.result()

    def _draw(self, problem: Problem, genome: Genome, at: int, rng: np.random.Generator) -> CompressionPolicy:
        points = homogeneous_within(problem)
        least = min(points, key=lambda point: point.sparsity).values(genome) if points else genome.cheapest()
        sparse = np.array([gene.kind == "sparsity" for gene in genome.genes], bool)
        values = np.where(sparse, least, rng.integers(0, genome.levels))
        account = Account(genome, problem.budget, values)
        account.trim(rng, spare=np.flatnonzero(sparse))
        cap = problem.budget.caps[at]
        floor, target = self.least * cap, rng.uniform(self.least, 1) * cap
        while account.total[at] > target and len(open_ := np.flatnonzero(~sparse & (account.values > 0))):
            i = rng.choice(open_)
            account.take(account.look(i, account.values[i] - 1)[2])
        raised = True
        while raised and account.total[at] < floor:
            raised = False
            for i in rng.permutation(len(genome)):
                raised |= account.raised(i)
                if account.total[at] >= floor:
                    break
        if account.total[at] < floor:
            raise AjpqError(
                f"{problem.budget.names[at]} must reach {self.least:g} of its budget, but no decision can be raised "
                f"any more at {account.total[at] / cap:.4f}; lower least or allow more bits"
            )
        return genome.policy(account.values)
