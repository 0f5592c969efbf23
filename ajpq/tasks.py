"""What a network is for: how wrong, how good and how changed its outputs are. All else is the same for every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.errors import AjpqError


@runtime_checkable
class Task(Protocol):
    """outputs: of the network for a batch, (N, ...). targets: of the same images as the data give them, (N, ...).

    Everything but `metrics` is per image, so that it can be summed over batches of any size; losses and divergences
    carry gradients.
    """

    metric: str  # what `quality`, and its mean over a split, is called, e.g. "accuracy"; all reports must have it too

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training lowers, (N,)."""

    def divergences(self, outputs: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
        """How far outputs are from those of the uncompressed network, at least 0 and 0 for the same, (N,), in nats.

        temperature: softens both where the task knows how, and scales the result by its square (Hinton et al. 2015,
        arXiv 1503.02531)."""

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How good each output is, in [0, 1], (N,)."""

    def per_image(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What is reported and has a value for each image, float64 (N,), fractions. Differences between networks get
        their intervals from it."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """What is reported of a whole split, fractions: the means of `per_image`, and what only a split has."""


@runtime_checkable
class Answering(Protocol):
    """A task whose networks give answers that are the same or not."""

    def answers(self, outputs: Tensor) -> tuple[str, Tensor]:
        """What an answer is called, and the answer to every image, whole numbers (N,)."""


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

    def per_image(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found = {"accuracy": self.quality(outputs, targets).double()}
        if outputs.shape[1] > 5:
            found["top5_accuracy"] = (outputs.topk(5, dim=1).indices == targets[:, None]).any(1).double()
        return found

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return means(self.per_image(outputs, targets))

    def answers(self, outputs: Tensor) -> tuple[str, Tensor]:
        """The most probable class."""
        return "class", outputs.argmax(1)


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Of every metric over its images."""
    return {name: column.mean().item() for name, column in values.items()}


def check_task(task: Task, model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Raises AjpqError where a network's outputs for a batch, or its targets, are not what the task is about."""
    with torch.no_grad():
        outputs, why = model(images), ""
        if not isinstance(outputs, Tensor):
            inside = f" of {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else ""
            raise AjpqError(
                f"a network that is judged must return one tensor, but it returns a {type(outputs).__name__}{inside}; "
                "wrap it in a module that returns the part that counts"
            )
        try:
            fits = len(task.losses(outputs, targets)) == len(task.quality(outputs, targets)) == len(images)
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            fits, why = False, f" ({str(error).splitlines()[0]})"
    if not fits:
        raise AjpqError(
            f"task, model and data must fit, but {type(task).__name__} cannot judge outputs of {tuple(outputs.shape)} "
            f"by targets of {tuple(targets.shape)}{why}; set task= to what the network and the data are for"
        )


CLASSIFICATION = Classification()


def is_binary(task: Task) -> bool:
    """Whether quality is 0 or 1 for every image: how many are right is then a count."""
    return isinstance(task, Classification)
