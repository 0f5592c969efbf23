"""Who answers for the half that is not trained: a controller, which sees what an agent would see, or a rule, which
sees the whole draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ajpq.budget import Budget
from ajpq.draft import Decision, Draft
from ajpq.errors import AjpqError
from ajpq.space import SearchSpace

Controller = Callable[[np.ndarray], np.ndarray]  # observation -> action


class Rule(Protocol):
    """answer(draft) -> the answer to `draft.decision`, one of its options."""

    def answer(self, draft: Draft) -> float: ...


def constant(value: float = 0.0) -> Controller:
    """The controller that always answers with the same action; 0 is the middle of what the budgets leave."""
    return lambda observation: np.full(2, value, np.float32)


class Homogeneous:
    """The rule "the same everywhere": every space gets the sparsity, every block and every input the width, or what
    comes nearest to it within the budgets (widths: from below).

    width, act_bits: bits. sparsity: a fraction. What is None is taken from `middle`.
    """

    def __init__(self, width: int | None = None, sparsity: float | None = None, act_bits: int | None = None) -> None:
        self._target = _Target(width, sparsity, act_bits)

    def answer(self, draft: Draft) -> float:
        return within(draft.decision, self._target.of(draft)[draft.decision.kind])


class ByImportance:
    """The rule "as important as the others": channels are pruned by one threshold for the whole network, and a block
    of kernels gets the more bits the more it matters within its layer.

    sparsity: of the prunable channels of the whole network; those with the least shares of importance
        (`SearchSpace.channel_scores`) go, wherever they are (global ranking: Molchanov et al. 2017, arXiv 1611.06440).
    width: of a block of average importance; another one gets log2(its mean importance / the geometric mean of the
        layer's) bits more, which is reverse water-filling (Cover & Thomas, Elements of Information Theory, 10.3.3)
        with the importance for the standard deviation (ours).
    act_bits: the same for every layer. What is None is taken from `middle`; every answer is the nearest one within the
    budgets (widths: from below).
    """

    def __init__(self, width: int | None = None, sparsity: float | None = None, act_bits: int | None = None) -> None:
        self._target = _Target(width, sparsity, act_bits)

    def answer(self, draft: Draft) -> float:
        decision, target = draft.decision, self._target.of(draft)
        wanted = target[decision.kind]
        if decision.kind == "sparsity":
            wanted = _share_below(draft, wanted)
        elif decision.kind == "width":
            scores = np.abs(draft.space.scores[decision.layer.name])
            alive = scores[draft.weight_bits(decision.layer.name) > 0]
            if alive.min() > 0:
                wanted = round(wanted + np.log2(scores[decision.kernels].mean()) - np.log2(alive).mean())
        return within(decision, wanted)


def within(decision: Decision, wanted: float) -> float:
    """The answer that comes nearest to a wanted sparsity; the largest width up to a wanted one, or the smallest."""
    if decision.kind == "sparsity":
        return float(np.clip(wanted, *decision.options))
    return max((b for b in decision.options if b <= wanted), default=decision.options[0])


def middle(space: SearchSpace, budget: Budget) -> dict[str, float]:
    """{"width", "sparsity", "act"} of a homogeneous policy between two ends: for every width the least sparsity within
    budget is found, activations as wide as the choices have them; of those that there are, the middle one is taken."""
    choices = space.choices
    top = choices.max_sparsity if 0 in choices.weight_bits else 0.0
    found = []
    for width in (b for b in choices.weight_bits if b):
        steps = np.linspace(0, top, 33)
        low, high = 0, len(steps)  # steps[high] fits, steps[low - 1] does not
        while low < high:
            half = (low + high) // 2
            if budget.admits(space.homogeneous(width, float(steps[half]))):
                high = half
            else:
                low = half + 1
        if low < len(steps):
            found.append((width, float(steps[low])))
    width, sparsity = found[len(found) // 2] if found else (min(b for b in choices.weight_bits if b), top)
    return {"width": width, "sparsity": sparsity, "act": choices.act_bits[-1]}


class _Target:
    """What is aimed at, per kind of decision, worked out once for every budget."""

    def __init__(self, width: int | None, sparsity: float | None, act_bits: int | None) -> None:
        if width is not None and width < 1 or act_bits is not None and act_bits < 1:
            raise AjpqError(f"a rule needs widths of at least 1 bit, but they are {width} and {act_bits}; raise them")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise AjpqError(f"0 <= sparsity < 1 must hold, but a rule has {sparsity}; choose another")
        given = {"width": width, "sparsity": sparsity, "act": act_bits}
        self._given = {kind: value for kind, value in given.items() if value is not None}
        self._budget: Budget | None = None
        self._known: dict[str, float] = {}

    def of(self, draft: Draft) -> dict[str, float]:
        if draft.budget is not self._budget:
            self._budget = draft.budget
            self._known = self._given if len(self._given) == 3 else middle(draft.space, draft.budget) | self._given
        return self._known


def _share_below(draft: Draft, sparsity: float) -> float:
    """The fraction of the present spaces' channels that are among the least important of the whole network."""
    space, network = draft.space, draft.space.network
    prunable = np.flatnonzero(network.prunable)
    order = prunable[np.argsort(space.channel_scores[prunable], kind="stable")]
    here = np.unique(network.space_of[draft.decision.layer.writes])
    channels = np.concatenate([network.spaces[s].channels for s in here if network.spaces[s].prunable])
    return float(np.isin(channels, order[: round(sparsity * len(order))]).mean())
