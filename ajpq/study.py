"""Several searches with several seeds on one problem, at equal evaluations: what they found, and which is better.

study = compare(problem, {"ajpq": lambda seed: Hierarchical(100, seed), "uniform": Uniform(100)}, (0, 1, 2), 100,
                controls=["uniform"])
print(study.table())
study.plot("comparison.png")

`ajpq-compare` is the same as a command (`ajpq.comparing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ajpq.errors import AjpqError
from ajpq.intervals import Difference, Estimate, Sample, difference, estimate
from ajpq.problem import Evaluation, Problem, SearchBackend
from ajpq.record import row
from ajpq.rewards import Reward, accuracy_reward, divergence_reward, loss_reward

_MEANING = {
    accuracy_reward: "accuracy",
    loss_reward: "minus loss",
    divergence_reward: "minus divergence from the original (nats)",
}
NOTE = """\
+- is half of the 95 % interval (Student's t over seeds); ratios and seconds are means. A search without a seed runs \
once. Differences are paired over seeds (Welch's where the seeds differ), one-sample against a search without a seed; \
each interval stands by itself, none is corrected for their number."""


@dataclass(frozen=True, eq=False)
class Run:
    """One search with one seed; None: it has none, and is run once.

    rows: its evaluations, at least one, as `ajpq.record.row` gives them.
    tests: seed of a fine-tuning -> accuracy of the best policy on the test split after it.
    """

    search: str
    seed: int | None
    rows: Sequence[Mapping[str, Any]]
    tests: Mapping[int, float] = field(default_factory=dict)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The first row with the highest reward within budget, if there is one."""
        return max(filter(_counts, self.rows), key=lambda row: (row["reward"], -row["number"]), default=None)

    @property
    def seconds(self) -> float:
        """Until the last evaluation."""
        return self.rows[-1]["seconds"]

    def curve(self) -> np.ndarray:
        """float64 (evaluations,): the best reward within budget so far, -inf before the first."""
        rewards = [row["reward"] if _counts(row) else -math.inf for row in self.rows]
        return np.maximum.accumulate(np.array(rewards, float))


@dataclass(frozen=True, eq=False)
class Study:
    """The runs of a comparison. controls: searches that every other one is compared with. limits: cost name -> budget.
    reward: what it means, with its unit. evaluations: the most that a run may take."""

    runs: Sequence[Run]
    controls: Sequence[str]
    limits: Mapping[str, float]
    reward: str
    evaluations: int

    @property
    def searches(self) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.search, []).append(run)
        return found

    def bests(self, search: str) -> list[Mapping[str, Any]]:
        """The best row of every run; none at all if one of them found no policy within budget."""
        found = [run.best for run in self.searches[search]]
        return [] if None in found else found

    def rewards(self, search: str) -> Sample:
        """Best reward of every run, as `bests`."""
        runs = self.searches[search]
        return {run.seed: row["reward"] for run, row in zip(runs, self.bests(search), strict=False)}

    def tests(self, search: str) -> Sample:
        """Test accuracy of every fine-tuned best policy; empty without fine-tuning."""
        return {seed: test for run in self.searches[search] for seed, test in run.tests.items()}

    def differences(self, values: Callable[[str], Sample]) -> dict[tuple[str, str], Difference]:
        """(search, control) -> difference; of two controls the later one of `controls` is the search."""
        pairs = [
            (search, control)
            for search in self.searches
            for i, control in enumerate(self.controls)
            if search not in self.controls[: i + 1]
        ]
        known = {pair: [values(name) for name in pair] for pair in pairs if pair[1] in self.searches}
        return {pair: difference(*sides) for pair, sides in known.items() if all(sides)}

    def table(self) -> str:
        """Markdown: a row per search, then one sentence per search and control."""
        costs = list(self.runs[0].rows[0]["ratios"])
        told, tested = self.reward != "accuracy", any(run.tests for run in self.runs)
        head = ["search", "runs", "evaluations", *([f"best {self.reward}"] if told else [])]
        head += ["accuracy, search split", *map(self._cost, costs), "seconds"]
        head += ["accuracy, test split, fine-tuned"] if tested else []
        lines = [f"At most {self.evaluations} evaluations per run; reward: {self.reward}.", "", _line(head)]
        lines.append("|" + "---|" * len(head))
        for name, runs in self.searches.items():
            best, tests = self.bests(name), list(self.tests(name).values())
            cells = [f"`{name}`", "1 (no seed)" if runs[0].seed is None else str(len(runs))]
            cells.append(_span([len(run.rows) for run in runs]))
            if best:
                cells += [str(estimate([row["reward"] for row in best]))] if told else []
                cells.append(str(estimate([row["accuracy"] for row in best])))
                cells += [f"{np.mean([row['ratios'][cost] for row in best]):.4f}" for cost in costs]
            else:
                cells += ["none within budget", *[""] * (told + len(costs))]
            cells.append(f"{np.mean([run.seconds for run in runs]):.0f}")
            cells += [str(estimate(tests)) if tests else ""] if tested else []
            lines.append(_line(cells))
        lines += ["", NOTE]
        for name, runs in self.searches.items():
            if missed := sum(run.best is None for run in runs):
                lines += ["", f"`{name}` found no policy within budget in {missed} of {len(runs)} runs."]
        for what, values in ((f"Best {self.reward}", self.rewards), ("Test accuracy, fine-tuned", self.tests)):
            found = self.differences(values)
            lines += ["", f"{what}:", ""] if found else []
            lines += [f"- {found[pair].sentence(*pair)}" for pair in found]
        return "\n".join(lines) + "\n"

    def summary(self) -> dict[str, Any]:
        """The table as plain data; null where a number cannot be told."""
        searches = {
            name: {
                "seeds": [run.seed for run in runs],
                "evaluations": [len(run.rows) for run in runs],
                "reward": _mean(self.rewards(name).values()),
                "accuracy": _mean([row["accuracy"] for row in self.bests(name)]),
                "test": _mean(self.tests(name).values()),
            }
            for name, runs in self.searches.items()
        }
        differences = [
            {"of": of, "search": search, "control": control, **_plain(found), "method": found.method,
             "verdict": f"{found.word} than {control}" if found.word else "not enough seeds to tell"}
            for of, values in (("reward", self.rewards), ("test", self.tests))
            for (search, control), found in self.differences(values).items()
        ]  # fmt: skip
        return {
            "budget": dict(self.limits), "reward": self.reward, "evaluations": self.evaluations, "searches": searches,
            "differences": differences,
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Draw best-so-far per evaluation; see `ajpq.curves.draw`."""
        from ajpq import curves

        curves.plot(self, path)

    def _cost(self, name: str) -> str:
        return f"{name} (<= {self.limits[name]:g})" if name in self.limits else name


def compare(
    problem: Problem,
    searches: Mapping[str, SearchBackend | Callable[[int], SearchBackend]],
    seeds: Iterable[int],
    evaluations: int,
    controls: Sequence[str] = (),
) -> Study:
    """Run every search with every seed on `problem`, each with an empty record of its own.

    searches: name -> seed -> backend, or a backend that has no seed and is run once. evaluations: a backend that asks
    for more is stopped. controls: names of searches that every other one is compared with.
    Raises AjpqError for a control that is no search.
    """
    seeds = list(seeds)
    check_controls(controls, list(searches))
    runs = []
    for name, make in searches.items():
        for seed in [None] if hasattr(make, "search") else seeds:
            fresh = problem.again()
            search_within(fresh, make if seed is None else make(seed), evaluations)
            runs.append(Run(name, seed, [row(evaluation) for evaluation in fresh.history]))
    return Study(runs, controls, problem.budget.limits, meaning(problem.reward), evaluations)


def check_controls(controls: Sequence[str], searches: Sequence[str]) -> None:
    """Raise AjpqError for a control that is not among the searches."""
    for name in controls:
        if name not in searches:
            raise AjpqError(
                f"controls must be among the searches {', '.join(searches)}, but {name!r} is not; add it to searches"
            )


def search_within(problem: Problem, backend: SearchBackend, evaluations: int) -> None:
    """Search, and end a search that asks for more than so many evaluations; `problem.best` is None after one that found
    no policy within budget."""
    listener = problem.on_evaluation

    def listen(evaluation: Evaluation) -> None:
        if evaluation.number > evaluations:
            raise _Spent
        if listener is not None:
            listener(evaluation)

    problem.on_evaluation = listen
    try:
        backend.search(problem)
    except _Spent:
        del problem.history[evaluations:]
    except AjpqError as error:
        if problem.best is not None or f"none of {problem.evaluations} was" not in str(error):
            raise
    finally:
        problem.on_evaluation = listener


class _Spent(BaseException):
    """No error, and not to be caught by a backend."""


def meaning(reward: Reward) -> str:
    """What a reward is, in words."""
    return _MEANING.get(reward) or getattr(reward, "__name__", type(reward).__name__)


def _counts(row: Mapping[str, Any]) -> bool:
    return row["within"] and row["whole"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _mean(values: Iterable[float]) -> dict[str, float | None] | None:
    found = list(values)
    return _plain(estimate(found)) if found else None


def _plain(found: Estimate | Difference) -> dict[str, float | None]:
    return {"mean": found.mean, "half": None if math.isnan(found.half) else found.half}
