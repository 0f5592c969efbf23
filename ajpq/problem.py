"""All that a search backend sees: `problem.score(policy)`, the space to draw policies from, and the record of what was
tried.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.compression import check_scales
from ajpq.correction import check_correction
from ajpq.cost import BOPs, CostModel, MACs, Size
from ajpq.draft import Draft
from ajpq.elimination import elimination
from ajpq.errors import AjpqError
from ajpq.importance import Importance
from ajpq.loaders import Batches, check_batches, take
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.record import policy_of
from ajpq.rewards import Reward, accuracy_reward, check_risk
from ajpq.scoring.local import Local
from ajpq.scoring.setting import EvaluatorFactory, Measured, Setting
from ajpq.space import Choices, SearchSpace
from ajpq.tasks import CLASSIFICATION, Task
from ajpq.tracing import trace

CALIBRATION_IMAGES = 1000


@dataclass(frozen=True)
class Score:
    """What one evaluation found. reward: -inf where it was NaN, and then never the best. accuracy and ratios are
    fractions; costs are in each model's unit; loss and divergence: see `scoring.setting.Measured`. whole: measured on
    the whole search split; otherwise the evaluator gave up after `images` of them."""

    reward: float
    accuracy: float
    costs: Mapping[str, float]
    ratios: Mapping[str, float]  # to the uncompressed network
    within: bool  # every budget holds
    images: int = 0
    whole: bool = True
    loss: float | None = None
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


@runtime_checkable
class SearchBackend(Protocol):
    """Proposes policies, has them scored, returns `problem.result()`.

    What it proposes must depend on the problem, its seed and the scores alone: a killed search is resumed by asking it
    again, and what it asked before is answered from the record. A backend whose own work takes long can continue where
    it was instead, with two more methods and a call:

        state_dict() -> dict            all that changes during `search`: tensors, numpy arrays, plain data
        load_state_dict(state) -> None  called before `search`; problem.history is then what it was at `state_dict`
        problem.save(self)              called by `search` between batches, when the state is whole

    One that scores a policy which is given and must not be replaced by a better one (`ajpq.control`) says so by a class
    attribute, searches = False.
    """

    def search(self, problem: Problem) -> SearchResult: ...


def default_costs() -> dict[str, CostModel]:
    return {"size": Size(), "macs": MACs(), "bops": BOPs()}


def reachable(space: SearchSpace, budget: Mapping[str, float], costs: Mapping[str, CostModel] | None = None) -> Budget:
    """The budget over the default costs and `costs`. Raises AjpqError if no policy of this space can meet it."""
    return Budget(space.network, {**default_costs(), **(costs or {})}, budget, space.cheapest())


class Problem:
    """A network, the images to judge it on and the budget to meet.

    model: the trained CNN (never modified), or a `Network` traced before
    calibration: batches (x, y) of training images, of which the first 1,000 set activation ranges, and the first
        `norm_images` correct batch-norms before a policy is scored (0 = never), as `correction` says: "statistics" or
        "least_squares", see `ajpq.correction`
    search: batches (x, y), split off training, that every policy is scored on; never the test split
    budget: cost name -> largest fraction of the uncompressed network's cost
    costs: cost name -> model, beside and instead of size, macs, bops
    original: the network that divergence is measured from, where `model` has other weights (`ajpq.sharing.share`)
    task: what the network is for
    evaluator: makes, from a `scoring.setting.Setting`, what measures policies; the default, `scoring.local.Local`, runs
        them on `search` without training; `scoring.setting.each(function)` takes a plain function policy -> accuracy
    train: batches (x, y) of augmented training images, none of them in `search`, for backends that train as they search
    on_evaluation: called with every new `Evaluation`, not with recalled ones
    Attributes to set: checkpoint, called with the backend when it can be saved; on_scalar, called with what `log` is
        given and the number of evaluations.
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
        importance: Importance = elimination,
        reward: Reward = accuracy_reward,
        norm_images: int = 400,
        original: Network | None = None,
        correction: str = "least_squares",
        task: Task = CLASSIFICATION,
        evaluator: EvaluatorFactory = Local,
        train: Batches | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> None:
        check_correction(correction)
        more = {} if train is None else {"training": train}
        check_batches(calibration=calibration, search=search, may_be_empty=("search",), **more)  # an evaluator's matter
        choices = choices or Choices()
        calibration = take(calibration, CALIBRATION_IMAGES)
        self.network = model if isinstance(model, Network) else trace(model, first_images(calibration))
        self.space = SearchSpace(self.network, choices, importance(self.network, calibration, task))
        self.budget = reachable(self.space, budget, costs)
        self.calibration = calibrate(self.network, calibration)
        check_scales(self.network, self.calibration)
        self.task, self.choices, self.reward = task, choices, reward
        self.train, self.on_evaluation = train, on_evaluation
        norm_data = take(calibration, norm_images) if norm_images else []
        self.evaluator = evaluator(
            Setting(self.network, self.calibration, norm_data, search, original, correction, task)
        )
        check_risk(getattr(self.evaluator, "risk", 0), reward)
        self.history: list[Evaluation] = []
        self.checkpoint: Callable[[SearchBackend], None] | None = None
        self.on_scalar: Callable[[str, float, int], None] | None = None
        self._memo: dict[str, Score] = {}
        self._recalled: deque[Mapping[str, Any]] = deque()
        self._start = time.perf_counter()

    @property
    def evaluations(self) -> int:
        """Policies scored so far; asking again for a known one is free."""
        return len(self.history)

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation with the highest reward within budget."""
        within = [e for e in self.history if e.score.within and e.score.whole and e.score.reward > -math.inf]
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
            order = self._answer(order, fresh)
        if order:
            for i, measured in self.evaluator([fresh[key] for key in order], floor):
                self._record(order[i], fresh[order[i]], measured)
                if self.on_evaluation is not None:
                    self.on_evaluation(self.history[-1])
        return [self._memo[key] for key in digests]

    def recall(self, rows: Sequence[Mapping[str, Any]], done: int = 0) -> None:
        """Take over the record of an earlier, killed run of the same search, before this one begins.

        rows: of `ajpq.record.read`. The first `done` of them enter `history` now, for a backend that continues from
        its state; the others when the backend asks for their policies, which are not measured again. Raises AjpqError
        for a policy that does not fit the network, and later, in `score_all` or `check_recalled`, if the backend asks
        for others than the record has.
        """
        for row in rows[:done]:
            policy = policy_of(row)
            policy.validate(self.network)
            self._replay(row, policy)
        self._recalled = deque(rows[done:])

    def _answer(self, order: Sequence[str], fresh: Mapping[str, CompressionPolicy]) -> list[str]:
        """Answer from recalled rows, in their order; what is left to measure."""
        while self._recalled and self._recalled[0]["policy"] in fresh:
            row = self._recalled.popleft()
            self._replay(row, fresh[row["policy"]])
        left = [key for key in order if key not in self._memo]
        if left:
            self.check_recalled(f"asks for policy {left[0]}")
        return left

    def _replay(self, row: Mapping[str, Any], policy: CompressionPolicy) -> None:
        self._record(row["policy"], policy, Measured(**{field.name: row[field.name] for field in fields(Measured)}))
        number, reward = len(self.history), self.history[-1].score.reward
        if not math.isclose(reward, row["reward"], rel_tol=1e-6):
            raise AjpqError(
                f"a resumed search must give the rewards of its record, but evaluation {number} has {row['reward']} "
                f"there and {reward} now; resume with the same reward and costs"
            )
        self.history[-1] = Evaluation(number, policy, self.history[-1].score, row["seconds"])
        self._start = time.perf_counter() - row["seconds"]

    def check_recalled(self, instead: str = "ends before it") -> None:
        """Raise AjpqError unless the search has asked for all that was recalled: to be called when it has ended. One
        that begins with another search has not ended where that one has its result."""
        if self._recalled:
            row = self._recalled[0]
            raise AjpqError(
                f"a resumed search must ask for the policies of its record, but evaluation {row['number']} is policy "
                f"{row['policy']} there and the search now {instead}; resume on the machine and with the versions that "
                "the record was made with, or start a new run"
            )

    def _record(self, key: str, policy: CompressionPolicy, measured: Measured) -> None:
        costs = self.budget.values(policy)
        ratios = {name: value / self.budget.original[name] for name, value in costs.items()}
        reward = self.reward(measured, ratios)
        within = all(ratios[name] <= limit * (1 + 1e-9) for name, limit in self.budget.limits.items())
        self._memo[key] = Score(
            -math.inf if math.isnan(reward) else reward, measured.accuracy, costs, ratios, within, measured.images,
            measured.whole, measured.loss, measured.divergence,
        )  # fmt: skip
        seconds = time.perf_counter() - self._start
        self.history.append(Evaluation(len(self.history) + 1, policy, self._memo[key], seconds))

    def save(self, backend: SearchBackend) -> None:
        """For backends with a state, between batches: a good moment to keep it. Does nothing unless somebody does."""
        if self.checkpoint is not None:
            self.checkpoint(backend)

    def log(self, name: str, value: float) -> None:
        """For backends: report a number, such as a loss, to be plotted. Does nothing unless somebody listens."""
        if self.on_scalar is not None:
            self.on_scalar(name, float(value), self.evaluations)

    def again(self) -> Problem:
        """The same problem with an empty record, for another search; all else is shared."""
        twin = copy.copy(self)
        twin.history, twin._memo, twin._recalled, twin._start = [], {}, deque(), time.perf_counter()
        twin.checkpoint = twin.on_scalar = None
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
            within = sum(e.score.within and e.score.whole for e in self.history)
            why = f" that and had a finite reward ({within} within); mend the reward, or look at the network's outputs"
            raise AjpqError(
                f"a search must score at least one policy within budget, but none of {self.evaluations} was"
                f"{why if within else '; draw policies from problem.draft()'}"
            )
        return SearchResult(best.policy, best.score, self.evaluations, tuple(self.history))


def first_images(batches: Batches) -> Tensor:
    """The first two images of a loader."""
    for x, *_ in batches:
        return x[:2]
    raise AjpqError("a data loader must give at least one batch (x, y), but it gave none; pass training images")
