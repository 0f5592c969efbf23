"""All that a search backend sees: `problem.score(policy)`, the space to draw policies from, and the record of what was
tried.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.cost import BOPs, CostModel, MACs, Size
from ajpq.data import Batches, take
from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.importance import Importance, magnitude
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.scoring.local import Local
from ajpq.scoring.task import EvaluatorFactory, Measured, Task
from ajpq.space import Choices, SearchSpace
from ajpq.tracing import trace

CALIBRATION_IMAGES = 1000


@dataclass(frozen=True)
class Score:
    """What one evaluation found. accuracy and ratios are fractions; costs are in each model's unit; cross_entropy and
    divergence (see `scoring.task.Measured`) are in nats. whole: measured on the whole search split; otherwise the
    evaluator gave up after `images` of them."""

    reward: float
    accuracy: float
    costs: Mapping[str, float]
    ratios: Mapping[str, float]  # to the uncompressed network
    within: bool  # every budget holds
    images: int = 0
    whole: bool = True
    cross_entropy: float | None = None
    divergence: float | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One row of the record."""

    number: int  # from 1
    policy: CompressionPolicy
    score: Score
    seconds: float  # since the problem was made


@dataclass(frozen=True, eq=False)
class SearchResult:
    policy: CompressionPolicy  # the best one found within budget
    score: Score
    evaluations: int
    history: tuple[Evaluation, ...]


class SearchBackend(Protocol):
    """Proposes policies, has them scored, returns `problem.result()`."""

    def search(self, problem: Problem) -> SearchResult: ...


Reward = Callable[[Measured, Mapping[str, float]], float]  # (what was measured, cost ratios) -> what is maximised


def accuracy_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """The accuracy: budgets are hard, so nothing needs to be traded for them."""
    return measured.accuracy


def cross_entropy_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """Minus the cross-entropy, in nats."""
    return -_known(measured.cross_entropy, "cross_entropy")


def divergence_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """Minus the divergence from the uncompressed network, in nats: needs no labels, and tells bad policies from worse
    where both guess."""
    return -_known(measured.divergence, "divergence")


def _known(value: float | None, name: str) -> float:
    if value is None:
        raise AjpqError(
            f"this reward needs the {name}, but the evaluator measures accuracy only; use reward=accuracy or "
            "another evaluator"
        )
    return value


def default_costs() -> dict[str, CostModel]:
    return {"size": Size(), "macs": MACs(), "bops": BOPs()}


def reachable(space: SearchSpace, budget: Mapping[str, float], costs: Mapping[str, CostModel] | None = None) -> Budget:
    """The budget over the default costs and `costs`. Raises AjpqError if no policy of this space can meet it."""
    return Budget(space.network, {**default_costs(), **(costs or {})}, budget, space.cheapest())


class Problem:
    """A network, the images to judge it on and the budget to meet.

    model: the trained CNN (never modified), or a `Network` traced before
    calibration: batches (x, y) of training images, of which the first 1,000 set activation ranges, and the first
        `norm_images` re-estimate batch-norms before a policy is scored (0 = never)
    search: batches (x, y), split off training, that every policy is scored on; never the test split
    budget: cost name -> largest fraction of the uncompressed network's cost
    costs: cost name -> model, beside and instead of size, macs, bops
    evaluator: makes, from a `scoring.task.Task`, what measures policies; the default, `scoring.local.Local`, runs them
        on `search` without training; `scoring.task.each(function)` takes a plain function policy -> accuracy
    on_evaluation: called with every new `Evaluation`
    Raises AjpqError for a network that cannot be traced and a budget that cannot be met.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        calibration: Batches,
        search: Batches,
        budget: Mapping[str, float],
        *,
        choices: Choices | None = None,
        costs: Mapping[str, CostModel] | None = None,
        importance: Importance = magnitude,
        reward: Reward = accuracy_reward,
        norm_images: int = 400,
        evaluator: EvaluatorFactory = Local,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> None:
        choices = choices or Choices()
        calibration = take(calibration, CALIBRATION_IMAGES)
        self.network = model if isinstance(model, Network) else trace(model, first_images(calibration))
        self.space = SearchSpace(self.network, choices, importance(self.network, calibration))
        self.budget = reachable(self.space, budget, costs)
        self.calibration = calibrate(self.network, calibration)
        self.choices, self.reward, self.on_evaluation = choices, reward, on_evaluation
        norm_data = take(calibration, norm_images) if norm_images else []
        self.evaluator = evaluator(Task(self.network, self.calibration, norm_data, search))
        self.history: list[Evaluation] = []
        self._memo: dict[str, Score] = {}
        self._start = time.perf_counter()

    @property
    def evaluations(self) -> int:
        """Policies scored so far; asking again for a known one is free."""
        return len(self.history)

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation with the highest reward within budget."""
        within = [e for e in self.history if e.score.within and e.score.whole]
        return max(within, key=lambda e: (e.score.reward, -e.number), default=None)

    def draft(self) -> Draft:
        """A fresh policy to be decided, every answer of which keeps all budgets reachable."""
        return Draft(self.space, self.budget)

    def score(self, policy: CompressionPolicy) -> Score:
        """Evaluate a policy. Pure and memoised on its digest. Raises AjpqError if it does not fit the network."""
        return self.score_all([policy])[0]

    def score_all(self, policies: Sequence[CompressionPolicy]) -> list[Score]:
        """Evaluate policies together, so that the evaluator can run them in parallel, and those that begin alike one
        after the other: in this order the record has them. Raises AjpqError, before any is run, if one does not fit."""
        for policy in policies:
            policy.validate(self.network)
        digests = [policy.digest() for policy in policies]
        fresh = {key: policy for key, policy in zip(digests, policies, strict=True) if key not in self._memo}
        order = sorted(fresh, key=lambda key: fresh[key].walk(self.network))
        if order:
            floor = self.best.score.accuracy if self.best and self.reward is accuracy_reward else None
            for i, measured in self.evaluator([fresh[key] for key in order], floor):
                self._record(order[i], fresh[order[i]], measured)
        return [self._memo[key] for key in digests]

    def _record(self, key: str, policy: CompressionPolicy, measured: Measured) -> None:
        costs = self.budget.values(policy)
        ratios = {name: value / self.budget.original[name] for name, value in costs.items()}
        within = all(ratios[name] <= limit * (1 + 1e-9) for name, limit in self.budget.limits.items())
        self._memo[key] = Score(
            self.reward(measured, ratios), measured.accuracy, costs, ratios, within, measured.images, measured.whole,
            measured.cross_entropy, measured.divergence,
        )  # fmt: skip
        seconds = time.perf_counter() - self._start
        self.history.append(Evaluation(len(self.history) + 1, policy, self._memo[key], seconds))
        if self.on_evaluation is not None:
            self.on_evaluation(self.history[-1])

    def again(self) -> Problem:
        """The same problem with an empty record, for another search; all else is shared."""
        twin = copy.copy(self)
        twin.history, twin._memo, twin._start = [], {}, time.perf_counter()
        return twin

    def close(self) -> None:
        """Let the evaluator go: activations that it keeps, threads, actors. Known scores stay known."""
        close = getattr(self.evaluator, "close", None)
        if close is not None:
            close()

    def result(self) -> SearchResult:
        """The best policy within budget so far. Raises AjpqError if there is none."""
        best = self.best
        if best is None:
            raise AjpqError(
                f"a search must score at least one policy within budget, but none of {self.evaluations} was; "
                "draw policies from problem.draft()"
            )
        return SearchResult(best.policy, best.score, self.evaluations, tuple(self.history))


def first_images(batches: Batches) -> Tensor:
    """The first two images of a loader."""
    for x, *_ in batches:
        return x[:2]
    raise AjpqError("a data loader must give at least one batch (x, y), but it gave none; pass training images")
