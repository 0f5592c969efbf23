"""The plain way to measure a policy, which the fast one is tested against and which it falls back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ajpq.bank import WeightBank
from ajpq.compression import compress
from ajpq.policy import CompressionPolicy
from ajpq.scoring.task import Measured, Task
from ajpq.training import accuracy, recalibrate


class Reference:
    """Builds the very module that would be fine-tuned and shipped, re-estimates its batch-norms, runs it in float32."""

    def __init__(self, task: Task) -> None:
        self.task, self.bank = task, WeightBank(task.network)

    def measure(self, policy: CompressionPolicy) -> float:
        """Accuracy on the search split."""
        student = compress(self.task.network, policy, self.task.calibration, self.bank)
        with torch.no_grad():
            if self.task.norm_data:
                recalibrate(student, self.task.norm_data)
            return accuracy(student, self.task.search_data)

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        images = sum(len(y) for _, y in self.task.search_data)
        for i, policy in enumerate(policies):
            yield i, Measured(self.measure(policy), images)
