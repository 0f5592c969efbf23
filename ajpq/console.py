"""Progress on the terminal: one bar per stage, with the best score so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Screen:
    """Says what is going on and keeps the seconds of every stage."""

    def __init__(self) -> None:
        self.console = Console()
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, note: str = "") -> Iterator[Callable[[int, str], None]]:
        """Time a stage. The value is `advance(done, note)`; with a `total` it moves a bar, else the stage shows nothing."""
        start = time.perf_counter()
        bar = Progress(TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                       TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        try:
            if total is None:
                yield lambda done, text="": None
            else:
                with bar:
                    task = bar.add_task(name, total=total, note=note)
                    yield lambda done, text="": bar.update(task, completed=done, note=text)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
