"""No search: the policy of a file, to fine-tune and ship what an earlier run found."""

from __future__ import annotations

from pathlib import Path

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, SearchResult


class Given:
    """path: a policy.json. Raises AjpqError if it is not there, not a policy, not of this network or not within
    budget.
    """

    evaluations = 1
    searches = False  # what is given is not to be replaced

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.policy = CompressionPolicy.from_json(self.path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise AjpqError(
                f"a policy must be a readable file, but {self.path} is not ({error}); give the policy.json of a run"
            ) from error

    def search(self, problem: Problem) -> SearchResult:
        self.policy.validate(problem.network)
        score = problem.score(self.policy)
        if not score.within:
            over = [
                f"{name} is {score.ratios[name]:.4f} of the original"
                for name, limit in problem.budget.limits.items()
                if score.ratios[name] > limit
            ]
            raise AjpqError(
                f"a given policy must be within budget, but its {', '.join(over)} (limits "
                f"{problem.budget.limits}); raise the budget"
            )
        return problem.result()
