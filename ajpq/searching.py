"""One search in a folder: its record, its state, its curves, its bar; a search that was killed there goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ajpq.console import Pace, Screen
from ajpq.errors import AjpqError
from ajpq.problem import Evaluation, Problem, SearchBackend
from ajpq.record import RECORD, Record
from ajpq.scalars import Scalars
from ajpq.snapshot import STATE, Keeper, load_state

T = TypeVar("T")


def search_in(
    folder: Path, problem: Problem, backend: SearchBackend, *, seed: int, evaluations: int, screen: Screen,
    tensorboard: bool, title: str = "search", run: Callable[[Problem, SearchBackend], T] = lambda p, b: b.search(p),
) -> T:  # fmt: skip
    """What `run` returns, on a problem with an empty record.

    Writes evaluations.jsonl (a line per evaluation, at once), search.pt (the state of the search, now and then) and,
    with `tensorboard`, curves. seed: of the global random numbers, so that what ran before does not matter.
    evaluations: the length of the bar; 0 = not known.
    """
    for sow in (torch.manual_seed, np.random.seed, random.seed):
        sow(seed)
    record, scalars = Record(folder / RECORD), None
    try:
        done, fault = load_state(folder / STATE, backend, record.rows)
        if fault:
            screen.say(f"{folder / STATE} cannot be used ({fault}): the search is replayed from its record")
        problem.recall(record.rows, done)
        if record.rows:
            screen.say(f"{title} resumed after {len(record.rows)} evaluations")
        scalars = _scalars(folder, screen, done + 1) if tensorboard else None
        if scalars is not None:
            scalars.evaluations(record.rows, done + 1)
            problem.on_scalar = scalars.scalar
        problem.checkpoint = Keeper(folder / STATE, problem, before=scalars.flush if scalars else None)
        with screen.stage(title, evaluations) as advance:
            pace = Pace()

            def log(evaluation: Evaluation) -> None:
                row = record.append(evaluation)
                best = problem.best.score.reward if problem.best else None
                if scalars is not None:
                    scalars.evaluation(row, best)
                advance(evaluation.number, pace.note(best))

            problem.on_evaluation = log
            found = run(problem, backend)
            problem.check_recalled()
            return found
    finally:
        record.close()
        if scalars is not None:
            scalars.close()


def _scalars(folder: Path, screen: Screen, first: int) -> Scalars | None:
    try:
        return Scalars(folder, first)
    except AjpqError as error:
        screen.say(str(error))
        return None
