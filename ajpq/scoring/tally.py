"""How good outputs are: counted per batch, summed over batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ajpq.scoring.task import Measured

Tally = tuple[int, int, float, float]  # images, right ones, and the sums over them of cross-entropy and divergence


def log_probabilities(logits: Tensor) -> Tensor:
    """float64 (N, classes), on the CPU: sums over them do not depend on the number of batches or threads."""
    return F.log_softmax(logits.detach().to("cpu", torch.float64), dim=1)


def tally(logits: Tensor, labels: Tensor, original: Tensor) -> Tally:
    """logits (N, classes), labels (N,), original (N, classes): log-probabilities of the uncompressed network."""
    found, labels = log_probabilities(logits), labels.cpu()
    cross_entropy = F.nll_loss(found, labels, reduction="sum")
    divergence = F.kl_div(found, original, reduction="sum", log_target=True)
    return len(labels), int((found.argmax(1) == labels).sum()), float(cross_entropy), float(divergence)


def summed(tallies: Iterable[Tally], whole: bool = True) -> Measured:
    images, hits, cross_entropy, divergence = (sum(column) for column in zip(*tallies, strict=True))
    return Measured(hits / images, images, whole, cross_entropy / images, divergence / images)
