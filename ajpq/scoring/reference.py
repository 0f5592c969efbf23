"""The plain way to measure a policy, which the fast one is tested against and which it falls back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ajpq.bank import WeightBank
from ajpq.compression import compress
from ajpq.correction import correct
from ajpq.policy import CompressionPolicy
from ajpq.scoring.tally import log_probabilities, summed, tally
from ajpq.scoring.task import Measured, Task


class Reference:
    """Builds the very module that would be fine-tuned and shipped, re-estimates its batch-norms, runs it in float32."""

    def __init__(self, task: Task) -> None:
        self.task, self.bank = task, WeightBank(task.network)
        self._original: list[Tensor] | None = None  # log-probabilities of the uncompressed network, per batch

    def measure(self, policy: CompressionPolicy) -> Measured:
        original = self.task.original or self.task.network
        student = compress(self.task.network, policy, self.task.calibration, self.bank)
        with torch.no_grad():
            if self.task.norm_data:
                correct(student, original, policy, self.task.norm_data, self.task.correction)
            if self._original is None:
                self._original = [log_probabilities(original.module(x)) for x, *_ in self.task.search_data]
            return summed(
                tally(student(x), y, known)
                for (x, y, *_), known in zip(self.task.search_data, self._original, strict=True)
            )

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        for i, policy in enumerate(policies):
            yield i, self.measure(policy)
