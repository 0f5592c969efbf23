"""What training makes small: the task's loss, and the distance from a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.features import Features
from ajpq.image_order import channels_last, takes_channels_last
from ajpq.recipe import PRECISIONS
from ajpq.tasks import Task


@dataclass(frozen=True)
class Objective:
    """The loss of batches on `device`, see `training.fit` for its settings."""

    model: nn.Module
    task: Task
    teacher: nn.Module | None
    distill: float
    temperature: float
    features: Features | None
    precision: str
    device: torch.device
    _last: dict[nn.Module, bool] = field(default_factory=dict)  # whether it takes images in channels-last order

    def __call__(self, x: Tensor, y: Tensor, unlabelled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss () of images x (N, C, H, W), and of images without labels if there are, and the outputs (N, ...)
        for x."""
        outputs, target = self._both(x)
        loss = self.task.losses(outputs, y.to(self.device)).mean()  # ()
        if target is not None:
            loss = (1 - self.distill) * loss + self._distance(outputs, target)
        if unlabelled is not None:
            with _statistics_kept(self.model):
                loss = loss + self._distance(*self._both(unlabelled))
        return loss, outputs

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the model and the teacher make of images, float32."""
        x, low = x.to(self.device), self.precision != "float32"
        mine, its = (x if model is None else self._ordered(model, x) for model in (self.model, self.teacher))
        with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=low):
            outputs = self.model(mine)
            with torch.no_grad():
                target = None if self.teacher is None else self.teacher(its)
        return (outputs.float(), target if target is None else target.float()) if low else (outputs, target)

    def _ordered(self, model: nn.Module, x: Tensor) -> Tensor:
        if model not in self._last:
            self._last[model] = takes_channels_last(model, x)
        return channels_last(x) if self._last[model] else x

    def _distance(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Of the last batch that both networks saw, in outputs and inner tensors."""
        loss = self.distill * self.task.divergences(outputs, target, self.temperature).mean()
        return loss if self.features is None else loss + self.features.loss()


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Its batch-norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch-norms in training mode normalise by the batch that they see, but their running statistics stay."""
    norms = [norm for norm in norms_of(model) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
