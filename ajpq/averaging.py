"""A moving average of weights: what a training ends with instead of its last step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Average:
    """Exponential moving average of all float parameters and buffers of a model (Polyak and Juditsky 1992; the
    weights of Tarvainen and Valpola 2017, arXiv 1703.01780): ``a <- d a + (1 - d) w`` after every step.

    d rises to `decay` as (1 + n) / (10 + n) over the n steps so far, our choice after TensorFlow, so that a short
    training is not held back by where it began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._live = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
        self._mean = {name: t.clone() for name, t in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, mean in self._mean.items():
            mean.lerp_(self._live[name], share)
        self.steps += 1

    def restart(self) -> None:
        """Forget all but the weights as they are now."""
        self.steps = 0
        self._copy(self._live, self._mean)

    def apply(self) -> None:
        """Give the model the average. Batch-norm statistics are averages of other weights: re-estimate them."""
        self._copy(self._mean, self._live)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": dict(self._mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self._copy(state["mean"], self._mean)

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])
