"""How good a policy is: build the very network that would be fine-tuned and shipped, re-estimate its batch-norms,
measure it.
"""

from __future__ import annotations

import torch

from ajpq.calibration import Calibration
from ajpq.compression import compress
from ajpq.data import Batches, take
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.training import accuracy, recalibrate


class Evaluator:
    """policy -> accuracy (a fraction) on the search split, without training.

    Every policy gets the same treatment: batch-norms are re-estimated on the first `norm_images` calibration images
    (0 = never). The smaller network is what runs, so a candidate costs what its multiply-accumulates cost.
    """

    def __init__(
        self,
        network: Network,
        calibration: Calibration,
        calibration_data: Batches,
        search_data: Batches,
        norm_images: int = 400,
    ) -> None:
        self.network, self.calibration, self.search_data = network, calibration, search_data
        self.norm_data = take(calibration_data, norm_images)

    def __call__(self, policy: CompressionPolicy) -> float:
        student = compress(self.network, policy, self.calibration)
        with torch.no_grad():
            if self.norm_data:
                recalibrate(student, self.norm_data)
            return accuracy(student, self.search_data)
