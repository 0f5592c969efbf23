"""Distributions over whole numbers, moved by the score function: no gradient passes through the network.

    d/d alpha E[L] = E[(n - E[n]) L]

holds for every distribution whose logarithm is linear in alpha with the statistic n (Williams 1992, REINFORCE): the
counts of a multinomial with logits alpha, the successes of a binomial with logit alpha, the indicators of a
categorical. Zur et al. (arXiv 1904.09872) write it as E[n_i L] - E[L] n softmax_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def score_gradient(drawn: np.ndarray, expected: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The gradient by alpha of the mean loss. drawn: the statistic of every sample, (S, k). expected: its exact
    expectation, (k,). losses: (S,). Returns float64 (k,)."""
    return ((drawn - expected) * losses[:, None]).mean(0)


def advantages(losses: np.ndarray) -> np.ndarray:
    """Losses (S,) from which each sample's baseline, the mean of the others, is taken, so that the gradient stays
    unbiased and has less variance, in units of their standard deviation. Ours: the paper takes losses as they are and
    thousands of steps; a hundred evaluations are a dozen."""
    n, spread = len(losses), losses.std()
    if n < 2 or not spread > 0:
        return np.zeros(n)
    return (losses - losses.mean()) / spread * n / (n - 1)


def softmax(alphas: np.ndarray) -> np.ndarray:
    powers = np.exp(alphas - alphas.max())
    return powers / powers.sum()


def rounded(shares: np.ndarray, total: int) -> np.ndarray:
    """The whole numbers nearest to `shares` x `total` that sum to `total`: what rounding down leaves goes to the
    largest remainders, of equal ones to the first. shares: (k,), sum 1. Returns int64 (k,)."""
    wanted = shares * total
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(-(wanted - counts).round(9), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


class Descent:
    """SGD with momentum on several alphas at once, as the paper's code has it: gradients clipped to a common norm
    `clip`, the learning rate times `decay` after every step."""

    def __init__(self, alphas: Sequence[np.ndarray], lr: float, momentum: float, decay: float, clip: float) -> None:
        self.lr, self.momentum, self.decay, self.clip = lr, momentum, decay, clip
        self._speed = [np.zeros_like(alpha) for alpha in alphas]

    def step(self, alphas: Sequence[np.ndarray], gradients: Sequence[np.ndarray], frozen: Sequence[bool]) -> None:
        """Moves the alphas that are not frozen, in place."""
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, self.clip / norm) if norm else 0.0
        for alpha, gradient, speed, still in zip(alphas, gradients, self._speed, frozen, strict=True):
            speed *= self.momentum
            speed += factor * gradient
            if not still:
                alpha -= self.lr * speed
        self.lr *= self.decay


class Freezer:
    """The rule that ends the search of a layer: its alphas rest once the largest probability was `share` or more
    `times` times in a row. frozen: bool (n,)."""

    def __init__(self, n: int, share: float, times: int) -> None:
        self.share, self.times = share, times
        self._row, self.frozen = np.zeros(n, int), np.zeros(n, bool)

    def look(self, largest: Sequence[float]) -> None:
        """largest: of every vector's probabilities, (n,), after a step."""
        self._row = np.where(np.asarray(largest) >= self.share, self._row + 1, 0)
        self.frozen |= self._row >= self.times
