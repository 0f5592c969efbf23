"""What a network is for: how wrong, how good and how changed its outputs are. All else is the same for every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Task(Protocol):
    """outputs: of the network for a batch, (N, ...). targets: of the same images as the data give them, (N, ...).

    Everything is per image, so that it can be summed over batches of any size; all but `metrics` carries gradients.
    """

    metric: str  # what the mean of `quality` over a split is called, e.g. "accuracy"; `metrics` must have it too

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training lowers, (N,)."""

    def divergences(self, outputs: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
        """How far outputs are from those of the uncompressed network, at least 0 and 0 for the same, (N,), in nats.

        temperature: softens both where the task knows how, and scales the result by its square (Hinton et al. 2015,
        arXiv 1503.02531)."""

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How good each output is, in [0, 1], (N,)."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """What is reported of a whole split, fractions."""


@dataclass(frozen=True)
class Classification:
    """One label per image: outputs are logits (N, classes), targets labels (N,). Reports top-1 accuracy, and top-5
    where there are more than five classes. label_smoothing: of the loss."""

    label_smoothing: float = 0.0
    metric = "accuracy"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def divergences(self, outputs: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
        """Of Kullback and Leibler, from the original's class probabilities."""
        found, known = (F.log_softmax(t / temperature, dim=1) for t in (outputs, original))
        return temperature**2 * F.kl_div(found, known, reduction="none", log_target=True).sum(1)

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).to(outputs.dtype)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        found = {"accuracy": self.quality(outputs.double(), targets).mean().item()}
        if outputs.shape[1] > 5:
            right = (outputs.topk(5, dim=1).indices == targets[:, None]).any(1)
            found["top5_accuracy"] = right.double().mean().item()
        return found


CLASSIFICATION = Classification()


def is_binary(task: Task) -> bool:
    """Whether quality is 0 or 1 for every image: how many are right is then a count."""
    return isinstance(task, Classification)
