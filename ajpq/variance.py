"""Is a difference between allocations more than the noise of training? Homogeneous, random and searched policies of the
same cost, each trained several times, as Zur et al. 2019 (arXiv 1904.09872) studied it: what varies between policies,
what between repeats of one. `ajpq-variance` is the command (`ajpq.varying`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ajpq.curves import COLOURS, MARKERS
from ajpq.intervals import Difference, Sample, difference, estimate

HOMOGENEOUS = "homogeneous"


@dataclass(frozen=True, eq=False)
class Trial:
    """A policy. point: the homogeneous policy that has its cost. kind: "homogeneous", "random" or the name of a search.
    seed: of the draw or search. ratio: its cost as a fraction of the original's. accuracies: of every repeat."""

    point: str
    kind: str
    seed: int | None
    policy: str  # its digest
    ratio: float
    accuracies: Sequence[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))


@dataclass(frozen=True)
class Spread:
    """What a kind of policies has at a point. between: standard deviation of the policies' means; repeats: of the
    repeats of one policy, pooled over policies; all: of all trainings together. nan where there is one of a kind only.
    The means vary with the repeats, too, by repeats / sqrt(number of them)."""

    mean: float
    half: float  # of the 95 % interval of the mean, over policies (over repeats, if there is one policy)
    between: float
    repeats: float
    all: float
    ratio: float
    policies: int


@dataclass(frozen=True, eq=False)
class Variance:
    """A study. cost: what is the same at a point, and of which trial.ratio is. split: that was measured on."""

    trials: Sequence[Trial]
    cost: str
    split: str

    @property
    def points(self) -> list[str]:
        return list(dict.fromkeys(trial.point for trial in self.trials))

    def kinds(self, point: str) -> list[str]:
        return list(dict.fromkeys(trial.kind for trial in self.trials if trial.point == point))

    def of(self, point: str, kind: str) -> list[Trial]:
        return [trial for trial in self.trials if (trial.point, trial.kind) == (point, kind)]

    def spread(self, point: str, kind: str) -> Spread:
        trials = self.of(point, kind)
        every = np.concatenate([trial.accuracies for trial in trials])
        squares = sum(float(((np.array(t.accuracies) - t.mean) ** 2).sum()) for t in trials)
        freedom = len(every) - len(trials)
        means = np.array([trial.mean for trial in trials])
        return Spread(
            float(means.mean()), estimate(list(self.sample(point, kind).values())).half, _deviation(means),
            math.sqrt(squares / freedom) if freedom else math.nan, _deviation(every),
            float(np.mean([trial.ratio for trial in trials])), len(trials),
        )  # fmt: skip

    def sample(self, point: str, kind: str) -> Sample:
        """One value per policy; where there is one policy, one per repeat, under keys of its kind: they pair with none.
        A single training is not known exactly; a policy that was only scored is."""
        trials = self.of(point, kind)
        if len(trials) > 1:
            return {trial.seed: trial.mean for trial in trials}
        values = trials[0].accuracies
        exact = self.split == "search" and len(values) == 1
        return {None: values[0]} if exact else {(kind, i): value for i, value in enumerate(values)}

    def differences(self) -> dict[tuple[str, str, str], Difference]:
        """(point, kind, other kind that was measured before it) -> difference of mean accuracies."""
        return {
            (point, kind, other): difference(self.sample(point, kind), self.sample(point, other))
            for point in self.points
            for i, kind in enumerate(self.kinds(point))
            for other in self.kinds(point)[:i]
        }

    def table(self) -> str:
        """Markdown: a row per point and kind, then a sentence per difference."""
        lines = [
            f"Accuracy on the {self.split} split at equal {self.cost}; +- is half of the 95 % interval; sd = standard "
            "deviation.", "",
            f"| point | policies | number | {self.cost}, of the original | accuracy | sd between policies "
            "| sd between repeats of one | sd of all |",
            "|" + "---|" * 8,
        ]  # fmt: skip
        for point in self.points:
            for kind in self.kinds(point):
                s = self.spread(point, kind)
                mean = f"{s.mean:.4f}" + ("" if math.isnan(s.half) else f" +- {s.half:.4f}")
                cells = [
                    point,
                    kind,
                    str(s.policies),
                    f"{s.ratio:.4f}",
                    mean,
                    *map(_told, (s.between, s.repeats, s.all)),
                ]
                lines.append("| " + " | ".join(cells) + " |")
        found = [f"- {point}: {d.sentence(kind, other)}" for (point, kind, other), d in self.differences().items()]
        return "\n".join([*lines, "", *found]) + "\n"

    def summary(self) -> dict[str, Any]:
        """The table and the trials as plain data; null where a number cannot be told."""
        rows = [
            {"point": point, "kind": kind, **{k: _plain(v) for k, v in vars(self.spread(point, kind)).items()}}
            for point in self.points
            for kind in self.kinds(point)
        ]
        told = [
            {"point": point, "kind": kind, "than": other, "mean": d.mean, "half": _plain(d.half), "word": d.word}
            for (point, kind, other), d in self.differences().items()
        ]
        trials = [{**vars(trial), "accuracies": list(trial.accuracies)} for trial in self.trials]
        return {"cost": self.cost, "split": self.split, "spreads": rows, "differences": told, "trials": trials}

    def plot(self, path: str | Path) -> None:
        """Accuracy against cost: a dot per training, the mean of every kind and point with its standard deviation (of
        all trainings), a line through the homogeneous ones. The suffix of `path` says which kind of picture."""
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = FigureCanvasAgg(figure).figure.subplots()
        kinds = list(dict.fromkeys(trial.kind for trial in self.trials))
        for i, kind in enumerate(kinds):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            dots = [(t.ratio, accuracy) for t in self.trials if t.kind == kind for accuracy in t.accuracies]
            axes.scatter(*zip(*dots, strict=True), **style, s=12, alpha=0.35, linewidths=0)
            spreads = [self.spread(point, kind) for point in self.points if self.of(point, kind)]
            spreads.sort(key=lambda s: s.ratio)
            axes.errorbar(
                [s.ratio for s in spreads], [s.mean for s in spreads], [np.nan_to_num(s.all) for s in spreads],
                **style, label=kind, linestyle="-" if kind == HOMOGENEOUS else "none", capsize=3, markersize=6,
            )  # fmt: skip
        axes.set_xlabel(f"{self.cost}, as a fraction of the original's")
        axes.set_ylabel(f"accuracy, {self.split} split")
        axes.set_title("mean and standard deviation over all trainings; a dot is one")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _told(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
