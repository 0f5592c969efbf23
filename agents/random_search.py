"""Random policies within budget: the control that every search must beat."""

from __future__ import annotations

import numpy as np

from ajpq.problem import Problem, SearchResult


class RandomSearch:
    """Draws every answer uniformly from what the budgets leave. evaluations: policies to score; seed: of the draws."""

    def __init__(self, evaluations: int = 100, seed: int = 0) -> None:
        self.evaluations, self.seed = evaluations, seed

    def search(self, problem: Problem) -> SearchResult:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.evaluations * 10):  # a policy drawn twice is not an evaluation
            if problem.evaluations >= self.evaluations:
                break
            draft = problem.draft()
            while (decision := draft.decision) is not None:
                draft.take(
                    rng.uniform(*decision.options) if decision.kind == "sparsity" else int(rng.choice(decision.options))
                )
            problem.score(draft.policy())
        return problem.result()
