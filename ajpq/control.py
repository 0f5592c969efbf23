"""What a search is held against: a few policies that take no search. Its result is never less than the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, Score, SearchBackend, SearchResult


@runtime_checkable
class Control(Protocol):
    """Names policies without scoring any, e.g. `agents.uniform.Uniform`."""

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


def told(found: Mapping[str, Any]) -> str:
    """found: of `Comparison.to_json`. A sentence."""
    line = f"reward of the search {found['own']['reward']:.4f}; "
    if found["other"] is None:
        return f"{line}its control, {found['control']}, has no policy within budget"
    best = f"the best of {found['policies']} policies of {found['control']}, {found['other']['reward']:.4f}"
    line += f"of its control, {best}"
    return f"{line}: the control's policy was taken" if found["lost"] else line


class Beside:
    """Searches, then scores what a control names in the same record, on top of the search's own evaluations.

    What it names is asked for at once, before anything is spent. Nothing is compared without a control, and where the
    policy is given (a backend with `searches` = False).
    """

    def __init__(self, problem: Problem, backend: SearchBackend, control: Control | None) -> None:
        self.problem, self.backend, self.control = problem, backend, control
        compared = control is not None and getattr(backend, "searches", True)
        self.policies = list(control.policies(problem)) if compared else None

    def search(self) -> tuple[SearchResult, Comparison | None]:
        """The best of all, and how the two compare."""
        own = self.backend.search(self.problem)
        if self.policies is None:
            return own, None
        scores = self.problem.score_all(self.policies)
        other = max(scores, key=lambda score: (score.whole, score.reward), default=None)
        name = type(self.control).__name__
        return self.problem.result(), Comparison(name, len(scores), own.score, other)
