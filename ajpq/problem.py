"""All that a search backend sees: `problem.score(policy)`, the space to draw policies from, and the record of what was
tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.cost import BOPs, CostModel, MACs, Size
from ajpq.data import Batches, take
from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.evaluate import Evaluator
from ajpq.importance import Importance, magnitude
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.space import Choices, SearchSpace
from ajpq.tracing import trace

CALIBRATION_IMAGES = 1000


@dataclass(frozen=True)
class Score:
    """What one evaluation found. accuracy and ratios are fractions; costs are in each model's unit."""

    reward: float
    accuracy: float
    costs: Mapping[str, float]
    ratios: Mapping[str, float]  # to the uncompressed network
    within: bool  # every budget holds


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


Reward = Callable[[float, Mapping[str, float]], float]  # (accuracy, cost ratios) -> what the search maximises


def accuracy_reward(accuracy: float, ratios: Mapping[str, float]) -> float:
    """The accuracy: budgets are hard, so nothing needs to be traded for them."""
    return accuracy


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
    evaluator: policy -> accuracy; the default measures it on `search` without training
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
        evaluator: Callable[[CompressionPolicy], float] | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> None:
        choices = choices or Choices()
        calibration = take(calibration, CALIBRATION_IMAGES)
        self.network = model if isinstance(model, Network) else trace(model, first_images(calibration))
        self.space = SearchSpace(self.network, choices, importance)
        self.budget = reachable(self.space, budget, costs)
        self.calibration = calibrate(self.network, calibration)
        self.choices, self.reward, self.on_evaluation = choices, reward, on_evaluation
        self._evaluate = evaluator or Evaluator(self.network, self.calibration, calibration, search, norm_images)
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
        within = [e for e in self.history if e.score.within]
        return max(within, key=lambda e: (e.score.reward, -e.number), default=None)

    def draft(self) -> Draft:
        """A fresh policy to be decided, every answer of which keeps all budgets reachable."""
        return Draft(self.space, self.budget)

    def score(self, policy: CompressionPolicy) -> Score:
        """Evaluate a policy. Pure and memoised on its digest. Raises AjpqError if it does not fit the network."""
        key = policy.digest()
        if key not in self._memo:
            policy.validate(self.network)
            accuracy = self._evaluate(policy)
            costs = self.budget.values(policy)
            ratios = {name: value / self.budget.original[name] for name, value in costs.items()}
            within = all(ratios[name] <= limit * (1 + 1e-9) for name, limit in self.budget.limits.items())
            score = self._memo[key] = Score(self.reward(accuracy, ratios), accuracy, costs, ratios, within)
            self.history.append(Evaluation(len(self.history) + 1, policy, score, time.perf_counter() - self._start))
            if self.on_evaluation is not None:
                self.on_evaluation(self.history[-1])
        return self._memo[key]

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
