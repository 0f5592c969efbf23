"""Random policies within budget: the control that every search must beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult


class RandomSearch:
    """Draws every answer uniformly from what the budgets leave. evaluations: policies to score; seed: of the draws;
    batch: policies scored together."""

    def __init__(self, evaluations: int = 100, seed: int = 0, batch: int = 16) -> None:
        self.evaluations, self.seed, self.batch = evaluations, seed, batch
        self._resumed: dict[str, Any] | None = None

    def search(self, problem: Problem) -> SearchResult:
        self.rng, self.tries = np.random.default_rng(self.seed), 0
        if self._resumed is not None:
            self.rng.bit_generator.state, self.tries = self._resumed["rng"], self._resumed["tries"]
            self._resumed = None
        while self.tries < self.evaluations * 10:  # a policy drawn twice is not an evaluation
            left = self.evaluations - problem.evaluations
            if left <= 0:
                break
            problem.score_all([_draw(problem, self.rng) for _ in range(min(left, self.batch))])
            self.tries += 1
            problem.save(self)
        return problem.result()

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "tries": self.tries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next search continue from here."""
        self._resumed = state


def _draw(problem: Problem, rng: np.random.Generator) -> CompressionPolicy:
    draft = problem.draft()
    while (decision := draft.decision) is not None:
        draft.take(rng.uniform(*decision.options) if decision.kind == "sparsity" else int(rng.choice(decision.options)))
    return draft.policy()
