"""Does a search backend keep the rules that make searches comparable?"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem, Score, SearchBackend, SearchResult
from ajpq.space import Choices
from ajpq.testing.problems import fingerprint, must, must_be_unchanged, other_random_numbers, small_problem

PATIENCE = 200  # policies that a search may ask for per evaluation


def check_backend(
    backend: SearchBackend | Callable[..., SearchBackend], problem: Problem | None = None, evaluations: int = 8
) -> None:
    """Run a search backend and raise AssertionError where it breaks a rule:

    - `search(problem)` returns a `SearchResult`, that of `problem.result()`, its policy the best of those scored
    - every policy that it scores is within budget, and the record says what the problem measured
    - it scores at most `evaluations` policies, and ends where there is nothing new to score
    - the same seed gives the same history, whatever the global random numbers are
    - the problem's network is left as it was

    backend: a class or another callable that takes some of the keywords evaluations and seed; or an object, of which
        copies are run, and whose number of evaluations is its attribute `evaluations` if it has one.
    problem: by default `small_problem()`. It is not changed. evaluations: what the search is asked for.
    """
    small = problem is None
    problem = problem or small_problem()
    before = fingerprint(problem.network)
    makes = isinstance(backend, type) or not hasattr(backend, "search")
    takes = _keywords(backend) if makes else set()
    limit = evaluations if makes else getattr(backend, "evaluations", None)

    def run(problem: Problem, evaluations: int | None, randomness: int) -> tuple[SearchResult, _Watched]:
        with other_random_numbers(randomness):
            options = {"evaluations": evaluations, "seed": 0}
            search = backend(**{k: v for k, v in options.items() if k in takes}) if makes else copy.deepcopy(backend)
            must(
                callable(getattr(search, "search", None)),
                f"a backend must have a method search, but {search!r} has none",
            )
            watched = _Watched(problem, evaluations)
            return search.search(watched), watched

    try:
        result, watched = run(problem, limit, 1)
        _check_result(result, watched)
        must_be_unchanged("a search", before, problem.network)
        _check_scores(result, problem)
        again, _ = run(problem, limit, 2)
        first, second = _digests(result), _digests(again)
        place = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        must(
            first == second,
            f"the same seed must give the same history, but two runs of {len(first)} and {len(second)} evaluations "
            f"differ from number {place + 1} on; draw from a generator of your own, np.random.default_rng(seed)",
        )
        if makes and "evaluations" in takes and evaluations > 2:
            run(problem, 2, 1)
        if small:
            nothing_new = small_problem({"size": 1.0}, choices=Choices(weight_bits=(8,), first_last=None))
            with suppress(AjpqError):  # it may refuse a problem in which nothing is to be decided
                run(nothing_new, limit, 1)
            nothing_new.close()
    finally:
        if small:
            problem.close()


class _Watched(Problem):
    """A problem with a record of its own that raises AssertionError as soon as a search asks for too much."""

    def __init__(self, problem: Problem, limit: int | None) -> None:
        vars(self).update(vars(problem.again()))
        self.limit, self.asked = limit, 0
        self.digests: list[str] = []  # of the policies as they were when they were scored

    def score_all(self, policies: Sequence[CompressionPolicy]) -> list[Score]:
        self.asked += len(policies)
        scores = super().score_all(policies)
        self.digests += [evaluation.policy.digest() for evaluation in self.history[len(self.digests) :]]
        if self.limit is not None:
            must(
                self.evaluations <= self.limit,
                f"a search must score at most as many policies as it is asked for, but with evaluations={self.limit} "
                f"it scored {self.evaluations}",
            )
            must(
                self.asked <= PATIENCE * self.limit,
                f"a search must end where there is nothing new to score, but it asked for {self.asked} policies of "
                f"which {self.evaluations} were new; count what you ask for, too",
            )
        return scores


def _check_result(result: Any, problem: _Watched) -> None:
    must(
        isinstance(result, SearchResult),
        f"search must return a SearchResult, but it returned {type(result).__name__}; return problem.result()",
    )
    must(bool(problem.history), "a search must score at least one policy, but it scored none")
    must(
        list(result.history) == list(problem.history) and result.evaluations == problem.evaluations,
        f"the result must hold the problem's own record of {problem.evaluations} evaluations, but it has "
        f"{len(result.history)} and says {result.evaluations}; return problem.result()",
    )
    must(
        _digests(result) == problem.digests,
        "a policy must not be changed after it was scored, but one in the record is another now; copy its arrays first",
    )
    outside = [evaluation.number for evaluation in result.history if not evaluation.score.within]
    must(
        not outside,
        f"every policy that is scored must be within budget, but number {outside[:1]} is not; draw policies from "
        "problem.draft(), or ask problem.budget.admits(policy)",
    )
    must(
        result.policy.digest() in _digests(result),
        "the policy of the result must be one that was scored, but it is not in the history; return problem.result()",
    )
    best = problem.best
    must(
        result.policy.digest() == best.policy.digest() and result.score == best.score,
        f"the result must be the best policy that was scored (number {best.number}, reward {best.score.reward:g}), but "
        f"its reward is {result.score.reward:g}; return problem.result()",
    )


def _check_scores(result: SearchResult, problem: Problem) -> None:
    fresh = problem.again()
    for evaluation in result.history:
        evaluation.policy.validate(problem.network)
        if evaluation.score.whole:
            reward = fresh.score(evaluation.policy).reward
            must(
                reward == evaluation.score.reward,
                f"the record must say what the problem measures, but evaluation {evaluation.number} has reward "
                f"{evaluation.score.reward:g} and its policy, measured again, {reward:g}; leave the record alone",
            )


def _digests(result: SearchResult) -> list[str]:
    return [evaluation.policy.digest() for evaluation in result.history]


def _keywords(factory: Callable) -> set[str]:
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {"evaluations", "seed"}
    return {parameter.name for parameter in parameters}
