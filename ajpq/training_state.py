"""A training that was interrupted goes on from a file: what it holds, and whom it fits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ajpq.averaging import Average
from ajpq.epochs import go_on, orders_of
from ajpq.errors import AjpqError
from ajpq.files import replacing
from ajpq.loaders import Batches


@dataclass
class TrainingState:
    """Everything of a training that its next epoch depends on. settings: plain data that a file must agree with."""

    model: nn.Module
    batches: Batches
    optimizer: torch.optim.Optimizer
    average: Average | None
    settings: Mapping[str, Any]
    device: torch.device

    def save(self, path: Path, rows: list[dict], skips: int) -> None:
        """Write the state after an epoch; the file appears complete or not at all. rows: of all epochs so far. skips:
        steps skipped in a row at its end."""
        cuda = self.device.type == "cuda"
        state = {
            "settings": dict(self.settings), "rows": rows, "skips": skips, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "average": self.average and self.average.state_dict(),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "orders": orders_of(self.batches),
        }  # fmt: skip
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> tuple[list[dict], int]:
        """Continue from a file, if there is one; returns its rows and skips. Batches get the state of their generators,
        or, where these are hidden, are begun as often as epochs are done. Raises AjpqError for a file that cannot be
        read or is of another training."""
        if not path.is_file():
            return [], 0
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            then = state["settings"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise AjpqError(
                f"a training can be continued only from a whole checkpoint, but {path} cannot be read "
                f"({type(error).__name__}); remove it to begin again"
            ) from error
        for name, value in self.settings.items():
            if then.get(name) != value:
                raise AjpqError(
                    f"a training can be continued only as it was, but {name} was {then.get(name)!r} in {path} and is "
                    f"{value!r}; change it back, or remove the file to begin again"
                )
        try:
            go_on(self.batches, state["orders"], len(state["rows"]))
        except AjpqError as error:
            raise AjpqError(f"{path}: {error}") from error
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise AjpqError(
                f"a training can be continued only with the network that it had, but that of {path} is another; remove "
                "the file to begin again"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state["rows"], state["skips"]
