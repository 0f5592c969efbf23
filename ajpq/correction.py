"""What is done to a compressed network before it is judged, without training.

"statistics": means and variances of batch-norms are re-estimated on calibration images. "least_squares": their gains
and shifts are matched to the original besides. "reconstruction": so are all weights, layer by layer.
"""

from __future__ import annotations

from torch import fx

from ajpq.errors import AjpqError
from ajpq.goals import Goals
from ajpq.loaders import Batches
from ajpq.matching import match
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.reconstruction import solve
from ajpq.training import recalibrate

CORRECTIONS = ("statistics", "least_squares", "reconstruction")


def check_correction(name: str) -> None:
    if name not in CORRECTIONS:
        raise AjpqError(f"correction must be one of {', '.join(CORRECTIONS)}, but it is {name!r}; choose one")


def advice(network: Network, how: str) -> str | None:
    """What to tell whoever wants candidates of this network corrected like that, if there is something."""
    if how == "reconstruction" or network.norms:
        return None
    return (
        f"this network has no batch-norms, so correction={how} corrects nothing and pruned candidates score like "
        "guesses; correction=reconstruction solves for their weights, at several times the cost"
    )


class Correction:
    """Corrects compressed networks in place, each for its policy, from the same images: the (x, y) of `batches`. See
    `matching.match` and `reconstruction.reconstruct`."""

    def __init__(self, original: Network, batches: Batches, how: str) -> None:
        check_correction(how)
        self.original, self.batches, self.how = original, batches, how
        self._goals: Goals | None = None  # the same for every policy

    def __call__(self, student: fx.GraphModule, policy: CompressionPolicy) -> None:
        if self.how == "reconstruction":
            self._goals = self._goals or Goals(self.original, self.batches, None)
            solve(student, self.original, policy, self._goals)
        elif self.how == "least_squares":
            match(student, self.original, policy, self.batches)
        else:
            recalibrate(student, self.batches)
