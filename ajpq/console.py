"""Progress for people: on a terminal one bar per stage with the best score so far, elsewhere a line every tenth of a
stage; and every step in the log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, str], None]  # (steps done, note)
_log = logging.getLogger("ajpq")


class Pace:
    """What the note of a search says: the best reward so far, and evaluations per second since this was made."""

    def __init__(self) -> None:
        self._start, self._done = time.perf_counter(), 0

    def note(self, best: float | None) -> str:
        """After one more evaluation."""
        self._done += 1
        rate = self._done / max(time.perf_counter() - self._start, 1e-9)
        return f"best {'-' if best is None else f'{best:.4f}'} {rate:.3g}/s"


class Screen:
    """Says what is going on and keeps the seconds of every stage."""

    def __init__(self) -> None:
        self.console = Console()
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        _log.info(text)

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Advance]:
        """Time a stage; with a total, the value moves its bar."""
        start = time.perf_counter()
        try:
            if not total:
                yield lambda done, note: None
            elif self.console.is_terminal:
                with self._bar() as bar:
                    task = bar.add_task(name, total=total, note="")
                    yield self._logged(name, total, lambda done, note: bar.update(task, completed=done, note=note))
            else:
                yield self._logged(name, total, lambda done, note: self._line(name, total, done, note))
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _line(self, name: str, total: int, done: int, note: str) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            self.console.print(f"{name} {done}/{total} {note}", highlight=False, markup=False, soft_wrap=True)

    @staticmethod
    def _logged(name: str, total: int, advance: Advance) -> Advance:
        def step(done: int, note: str) -> None:
            _log.info("%s %d/%d %s", name, done, total, note)
            advance(done, note)

        return step
