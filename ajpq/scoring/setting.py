"""What an evaluator is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ajpq.calibration import Calibration
from ajpq.loaders import Batches
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.tasks import CLASSIFICATION, Task


@dataclass(frozen=True, eq=False)
class Setting:
    """Everything that the accuracy of a policy depends on.

    calibration: activation ranges of the uncompressed network
    norm_data: batches (x, y) that batch-norms are re-estimated on before a policy is measured; empty = never
    search_data: batches (x, y), split off training, that accuracy is measured on
    original: the network that divergence is measured from; None = `network`, uncompressed
    correction: what is done to batch-norms on `norm_data`, see `ajpq.correction`
    task: how good, how wrong and how changed outputs are
    """

    network: Network
    calibration: Calibration
    norm_data: Batches
    search_data: Batches
    original: Network | None = None
    correction: str = "statistics"
    task: Task = CLASSIFICATION


@dataclass(frozen=True)
class Measured:
    """What an evaluator found out about a policy; `whole`: on all images of the search split, not on `images` of them.

    Means over the images of what the task says (`ajpq.tasks`): accuracy is its quality (for classification the fraction
    that is right), loss its loss (cross-entropy, in nats), divergence that from the outputs of the uncompressed network
    (of Kullback and Leibler, in nats). loss and divergence are None where an evaluator measures accuracy only.
    """

    accuracy: float
    images: int
    whole: bool = True
    loss: float | None = None
    divergence: float | None = None


class Evaluator(Protocol):
    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        """Measure valid policies, which come sorted so that neighbours begin alike.

        Yields (place in `policies`, result) as each becomes known, in an order that depends on the policies alone.
        floor: the accuracy to beat; a policy that cannot may be given up early (whole=False).
        """


EvaluatorFactory = Callable[[Setting], Evaluator]


def each(accuracy: Callable[[CompressionPolicy], float]) -> EvaluatorFactory:
    """An evaluator from a plain function policy -> accuracy."""

    def evaluate(policies: Sequence[CompressionPolicy], floor: float | None = None) -> Iterator[tuple[int, Measured]]:
        for i, policy in enumerate(policies):
            yield i, Measured(accuracy(policy), 0)

    return lambda setting: evaluate
