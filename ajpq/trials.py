"""The runs of a comparison on disk: a search in a folder of its own, the fine-tuning of what it found, the reports."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ajpq import report as reporting
from ajpq.console import Screen
from ajpq.data import Data
from ajpq.epochs import reseed
from ajpq.errors import AjpqError
from ajpq.files import remove_parts, replacing, write_text
from ajpq.loaders import Batches
from ajpq.policy import CompressionPolicy
from ajpq.preparing import Prepared, epochs
from ajpq.problem import Problem, SearchBackend
from ajpq.record import RECORD, read
from ajpq.searching import search_in
from ajpq.snapshot import STATE
from ajpq.study import Study, search_within
from ajpq.training import accuracy

RESULT, POLICY, TUNED = "result.json", "policy.json", "tuned"


def is_whole(place: Path) -> bool:
    """Whether the search of this folder has ended."""
    return (place / RESULT).is_file()


def trial(
    place: Path, problem: Problem, backend: SearchBackend, evaluations: int, seed: int, title: str, screen: Screen,
    tensorboard: bool,
) -> None:  # fmt: skip
    """Search on a problem with an empty record (see `searching.search_in`), and write policy.json (if any is within
    budget) and at last result.json."""
    place.mkdir(parents=True, exist_ok=True)
    remove_parts(place)
    try:
        search_in(
            place, problem, backend, seed=seed, evaluations=evaluations, screen=screen, tensorboard=tensorboard,
            title=title, run=lambda problem, backend: search_within(problem, backend, evaluations),
        )  # fmt: skip
    except AjpqError as error:
        raise AjpqError(f"{title}: {error}") from error
    found: dict[str, Any] = {"evaluations": problem.evaluations, "seconds": round(problem.history[-1].seconds, 3)}
    if problem.best is not None:
        policy, score = problem.best.policy, problem.best.score
        found |= {"policy": policy.digest(), "reward": score.reward, "accuracy": score.accuracy}
        found |= {"ratios": dict(score.ratios)}
        write_text(place / POLICY, policy.to_json())
    write_text(place / RESULT, json.dumps(found, indent=1))
    (place / STATE).unlink(missing_ok=True)


def rows_in(place: Path) -> list[dict[str, Any]]:
    """The record of a search without the widths of its policies."""
    return [{key: value for key, value in row.items() if key != "widths"} for row in read(place / RECORD)]


class Tuner:
    """Fine-tunes the policies of a comparison and measures them on the test split, the same policy once per seed.

    folder: has the results in `tuned`. fresh: makes the data anew: a loader that has served for training begins
    elsewhere in its order of images.
    """

    def __init__(self, job: Prepared, folder: Path, fresh: Callable[[], Data], screen: Screen) -> None:
        self.job, self.folder, self.screen = job, folder / TUNED, screen
        remove_parts(self.folder)
        self._fresh, self._data = fresh, None
        start = [job.norm_images, job.correction, job.reconstruct_images]
        text = json.dumps([*start, dict(job.finetune)], sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()[:8]

    def test(self, policy: CompressionPolicy, seed: int, title: str) -> float:
        """Accuracy on the test split after fine-tuning with a seed."""
        path = self.folder / f"{policy.digest()}-{self._settings}-{seed}.json"
        if not path.is_file():
            state = path.with_suffix(".pt")
            found = {"test": self._tuned(policy, seed, title, state), "seed": seed, "finetune": dict(self.job.finetune)}
            write_text(path, json.dumps(found, indent=1))
            state.unlink(missing_ok=True)
        return json.loads(path.read_text())["test"]

    def _tuned(self, policy: CompressionPolicy, seed: int, title: str, state: Path) -> float:
        data = self._data = self._data or self._fresh()
        student = self.job.student(policy)
        with self.screen.stage(f"fine-tune {title}", self.job.finetune["epochs"]) as advance:
            more = None if data.unlabelled is None else _later(data.unlabelled, seed)
            later = replace(data, train=_later(data.train, seed), unlabelled=more)
            final = self.job.tuned(student, policy, later, checkpoint=state, seed=seed, on_epoch=epochs(advance))
        return accuracy(final, data.test, self.job.problem.task)


def _later(train: Batches, seed: int) -> Batches:
    """The same images in orders of their own; those of a seed are always the same."""
    train = copy.deepcopy(train)
    reseed(train, seed)
    return train


def write(study: Study, planned: int, original: Mapping[str, float], folder: Path) -> None:
    """Write evaluations.csv, comparison.json, comparison.md and the pictures. planned: runs. original: split ->
    accuracy of the uncompressed network."""
    costs = list(study.runs[0].rows[0]["ratios"])
    plain = ("number", "policy", "reward", "accuracy", "loss", "divergence", "within", "whole", "seconds")
    with replacing(folder / "evaluations.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["search", "seed", *plain, *(f"{cost}_ratio" for cost in costs)])
        for one in study.runs:
            for row in one.rows:
                writer.writerow([one.search, one.seed, *map(row.get, plain), *(row["ratios"][c] for c in costs)])
    runs = [
        {"search": one.search, "seed": one.seed, "best": one.best, "seconds": one.seconds, "tests": one.tests}
        for one in study.runs
    ]
    facts = {"original": original, "versions": reporting.versions(), "machine": reporting.machine()}
    write_text(folder / "comparison.json", json.dumps({**study.summary(), "runs": runs, **facts}, indent=1))
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in study.limits.items())
    known = ", ".join(f"{value:.4f} on the {split} split" for split, value in original.items())
    head = f"Best policies within {limits}. Uncompressed network: {known}."
    if len(study.runs) < planned:
        head += f" So far {len(study.runs)} of {planned} runs."
    write_text(folder / "comparison.md", f"{head}\n{study.table()}")
    study.plot(folder / "comparison.png")
    if len(study.runs) == planned:
        study.plot(folder / "comparison.svg")
