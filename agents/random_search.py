"""Random policies within budget: the control that every search must beat."""

from __future__ import annotations

import numpy as np

from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult


class RandomSearch:
    """Draws every answer uniformly from what the budgets leave. evaluations: policies to score; seed: of the draws;
    batch: policies scored together."""

    def __init__(self, evaluations: int = 100, seed: int = 0, batch: int = 16) -> None:
        self.evaluations, self.seed, self.batch = evaluations, seed, batch

    def search(self, problem: Problem) -> SearchResult:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.evaluations * 10):  # a policy drawn twice is not an evaluation
            left = self.evaluations - problem.evaluations
            if left <= 0:
                break
            problem.score_all([_draw(problem, rng) for _ in range(min(left, self.batch))])
        return problem.result()


def _draw(problem: Problem, rng: np.random.Generator) -> CompressionPolicy:
    draft = problem.draft()
    while (decision := draft.decision) is not None:
        draft.take(rng.uniform(*decision.options) if decision.kind == "sparsity" else int(rng.choice(decision.options)))
    return draft.policy()
