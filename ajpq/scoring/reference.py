"""The plain way to measure a policy, which the fast one is tested against and which it falls back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ajpq.bank import WeightBank
from ajpq.compression import compress
from ajpq.correction import Correction
from ajpq.image_order import channels_last
from ajpq.policy import CompressionPolicy
from ajpq.scoring.setting import Measured, Setting
from ajpq.scoring.tally import exact, summed, tally


class Reference:
    """Builds the very module that would be fine-tuned and shipped, re-estimates its batch-norms, runs it in float32."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.bank = setting, WeightBank(setting.network)
        self.batches = list(setting.search_data)  # a loader may shuffle or augment: all policies see the same images
        self._original: list[Tensor] | None = None  # outputs of the uncompressed network, per batch
        self.original = setting.original or setting.network
        data = setting.norm_data
        self.correct = Correction(self.original, data, setting.correction) if data else None

    def measure(self, policy: CompressionPolicy) -> Measured:
        student = compress(self.setting.network, policy, self.setting.calibration, self.bank)
        with torch.no_grad():
            if self.correct is not None:
                self.correct(student, policy)
            if self._original is None:
                self._original = [exact(self.original.module(x)) for x, *_ in self.batches]
            return summed(
                tally(self.setting.task, student(channels_last(x)), y, known)
                for (x, y, *_), known in zip(self.batches, self._original, strict=True)
            )

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        for i, policy in enumerate(policies):
            yield i, self.measure(policy)
