"""Curves of a search for TensorBoard: `tensorboard --logdir FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ajpq.errors import AjpqError

FOLDER = "tensorboard"
_MEASURED = ("reward", "accuracy", "loss", "divergence", "seconds")


class Scalars:
    """Writes curves over the number of evaluations to `folder`/tensorboard.

    first: the first evaluation that will be written; what an earlier process wrote from there on counts no more.
    Raises AjpqError where the package tensorboard is missing.
    """

    def __init__(self, folder: Path, first: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise AjpqError(
                f"curves need the package tensorboard, but it cannot be imported ({error}); install it or set "
                "tensorboard=false"
            ) from error
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=first, flush_secs=10)

    def evaluation(self, row: Mapping[str, Any], best: float | None) -> None:
        """A row of a record (`ajpq.record.row`): reward, accuracy, loss, divergence, seconds, cost/<name> (the
        ratio), and the best reward within budget so far."""
        values = {name: row[name] for name in _MEASURED} | {"best": best}
        values |= {f"cost/{name}": ratio for name, ratio in row["ratios"].items()}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["number"])

    def evaluations(self, rows: Iterable[Mapping[str, Any]], first: int) -> None:
        """The rows of a record from number `first` on."""
        best = None
        for row in rows:
            if row["within"] and row["whole"]:
                best = row["reward"] if best is None else max(best, row["reward"])
            if row["number"] >= first:
                self.evaluation(row, best)

    def scalar(self, name: str, value: float, step: int) -> None:
        """What a backend reports with `problem.log`, as search/<name>."""
        self._writer.add_scalar(f"search/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
