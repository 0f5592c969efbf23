"""What a search maximises: made of what an evaluator measured and of what the policy costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ajpq.errors import AjpqError
from ajpq.scoring.setting import Measured

Reward = Callable[[Measured, Mapping[str, float]], float]  # (what was measured, cost ratios) -> what is maximised


def accuracy_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """The accuracy: budgets are hard, so nothing needs to be traded for them."""
    return measured.accuracy


def loss_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """Minus the loss of the task, for classification the cross-entropy in nats."""
    return -_known(measured.loss, "loss")


def divergence_reward(measured: Measured, ratios: Mapping[str, float]) -> float:
    """Minus the divergence from the uncompressed network, in nats: needs no labels, and tells bad policies from worse
    where both guess."""
    return -_known(measured.divergence, "divergence")


def _known(value: float | None, name: str) -> float:
    if value is None:
        raise AjpqError(
            f"this reward needs the {name}, but the evaluator measures accuracy only; use reward=accuracy or "
            "another evaluator"
        )
    return value


def check_risk(risk: float, reward: Reward) -> None:
    """Raises AjpqError where an evaluator is to give candidates up but never could."""
    if risk and reward is not accuracy_reward:
        raise AjpqError(
            f"a candidate can be given up early only where the accuracy is the reward, but evaluator.risk is {risk} "
            "and the reward is another; use reward=accuracy or evaluator.risk=0"
        )
