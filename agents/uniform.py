"""The same width and sparsity everywhere: the control that needs no search."""

from __future__ import annotations

import numpy as np

from ajpq.errors import AjpqError
from ajpq.problem import Problem, SearchResult


class Uniform:
    """For every width, the least sparsity (in steps of `step`, the same in every space) that meets all budgets; the
    best of them.

    evaluations: at most so many policies are scored, the widest first.
    """

    def __init__(self, evaluations: int = 100, step: float = 1 / 32) -> None:
        self.evaluations, self.step = evaluations, step

    def search(self, problem: Problem) -> SearchResult:
        choices = problem.space.choices
        top = choices.max_sparsity if 0 in choices.weight_bits else 0.0
        policies = []
        sparsities = [*np.arange(0, top, self.step), top]
        for act in reversed(choices.act_bits):
            for width in reversed([b for b in choices.weight_bits if b]):
                for sparsity in sparsities:
                    policy = problem.space.homogeneous(width, float(sparsity), act)
                    if problem.budget.admits(policy):
                        policies.append(policy)
                        break
        if not policies:
            limits = ", ".join(f"{name}={limit:g}" for name, limit in problem.budget.limits.items())
            raise AjpqError(
                f"a homogeneous policy must meet every budget, but none meets {limits}; use another search or "
                "a larger budget"
            )
        problem.score_all(policies[: self.evaluations])
        return problem.result()
