"""What a search is held against: a few policies that take no search. No job goes on with less than the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, Score, SearchBackend, SearchResult


class Control(Protocol):
    """Names policies within budget before any is scored, e.g. `agents.uniform.Uniform`."""

    def policies(self, problem: Problem) -> Sequence[CompressionPolicy]:
        """Within all budgets; none where none meets them."""


@dataclass(frozen=True)
class Comparison:
    """The best policy of a search beside the best of its control, on the images and by the reward of the search.

    control: name of its class. policies: how many it named. own: the score of the search's best policy. other: of the
    control's best, None where it named none.
    """

    control: str
    policies: int
    own: Score
    other: Score | None

    @property
    def lost(self) -> bool:
        """Whether the control was the better one, and is what the search's result was replaced by."""
        return self.other is not None and self.other.whole and self.other.reward > self.own.reward

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lost": self.lost}


def told(found: dict[str, Any]) -> str:
    """found: of `Comparison.to_json`. A sentence."""
    line = f"reward of the search {found['own']['reward']:.4f}; "
    if found["other"] is None:
        return f"{line}of {found['control']}, its control, no policy meets the budget"
    best = f"the best of {found['policies']} policies of {found['control']}, {found['other']['reward']:.4f}"
    line += f"of its control, {best}"
    return f"{line}: the control's policy was taken" if found["lost"] else line


def search_beside(
    problem: Problem, backend: SearchBackend, control: Control | None
) -> tuple[SearchResult, Comparison | None]:
    """Search, then score what the control names in the same record, and return the best of all.

    The evaluations of the control come on top of the search's. Nothing is compared without a control, and where the
    policy is given (a backend with `searches` = False).
    """
    own = backend.search(problem)
    if control is None or not getattr(backend, "searches", True):
        return own, None
    policies = control.policies(problem)
    scores = problem.score_all(policies)
    other = max(scores, key=lambda score: (score.whole, score.reward), default=None)
    return problem.result(), Comparison(type(control).__name__, len(policies), own.score, other)
