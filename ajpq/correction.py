"""What is done to a compressed network before it is judged, without training.

"statistics": means and variances of batch-norms are re-estimated on calibration images. "least_squares": their gains
and shifts are matched to the original besides. "reconstruction": so are all weights, layer by layer.
"""

from __future__ import annotations

from torch import fx

from ajpq.data import Batches
from ajpq.errors import AjpqError
from ajpq.matching import match
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.reconstruction import reconstruct
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


def correct(student: fx.GraphModule, original: Network, policy: CompressionPolicy, batches: Batches, how: str) -> None:
    """Correct a compressed network in place, from the images of `batches`; see `matching.match` and
    `reconstruction.reconstruct`."""
    check_correction(how)
    if how == "reconstruction":
        reconstruct(student, original, policy, batches, None)
    elif how == "least_squares":
        match(student, original, policy, batches)
    else:
        recalibrate(student, batches)
