"""How a finished network does on images that it has not learned from and that are not the test split's.

Settings of a fine-tuning that are chosen by the test split make its figures too good; chosen by these, they do not.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ajpq.loaders import Batches
from ajpq.tasks import Task
from ajpq.training import outputs_of


def held_out(networks: Mapping[str, nn.Module], batches: Batches, task: Task) -> dict[str, dict[str, float]]:
    """Network -> what the task reports of these images, fractions, and its mean `divergence` from "original", which
    must be among them, in nats. A policy that was chosen by the same images does a little better on them than
    elsewhere. Raises AjpqError if there is no image."""
    found = {name: outputs_of(network, batches, task.metric) for name, network in networks.items()}
    known = found["original"][0]
    return {
        name: {**task.metrics(outputs, targets), "divergence": float(task.divergences(outputs, known).mean())}
        for name, (outputs, targets) in found.items()
    }
