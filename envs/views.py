"""What each controller sees of a draft and what its actions mean. A view is the whole interface between the two
worlds: to change observations or the decoding of actions, write another class with these four members, or a subclass
of one of the two here that has another `observe` or `apply`, and pass it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from gymnasium import spaces

from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.problem import Problem


class View(Protocol):
    """observation_space, action_space: of Gymnasium; the agents here need Box actions. observe(draft) -> a new
    observation in its space; apply(draft, action) answers the draft's present decision with `draft.take`, and a layer
    controller's also the next one if it is of the same layer (its sparsity, then the width of its input). Every action
    of the space, and actions a little outside, must be answered."""

    observation_space: spaces.Space
    action_space: spaces.Space

    def observe(self, draft: Draft) -> np.ndarray: ...

    def apply(self, draft: Draft, action: np.ndarray) -> None: ...


def turn(draft: Draft) -> str | None:
    """Whose decision is next: "layer", "channel", or None when the policy is complete."""
    if draft.decision is None:
        return None
    return "channel" if draft.decision.kind == "width" else "layer"


Views = Mapping[str, View] | Callable[[Problem], Mapping[str, View]]


def views_of(problem: Problem, given: Views | None = None) -> dict[str, View]:
    """{"layer": View, "channel": View}: those given, or what the callable makes of the problem, and the standard ones
    for the rest. Raises AjpqError for other names."""
    views = dict(given(problem) if callable(given) else given or {})
    if wrong := set(views) - {"layer", "channel"}:
        raise AjpqError(f"views must be for 'layer' or 'channel', but one is for {sorted(wrong)[0]!r}; rename it")
    return {"layer": LayerView(problem), "channel": ChannelView(problem)} | views


def _unit(action: float) -> float:
    """[-1, 1] -> [0, 1], clipped."""
    return float(np.clip((action + 1) / 2, 0, 1))


def pick(options: tuple[int, ...], action: float) -> int:
    """[-1, 1] in equal parts, one per option (HAQ's rounding, over the options that the budgets leave)."""
    return options[min(int(_unit(action) * len(options)), len(options) - 1)]


def _rescaled(column: list[float]) -> np.ndarray:
    """Min-max over the layers (AMC, HAQ); a constant column becomes 0."""
    values = np.array(column, float)
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


class _Features:
    """Ten numbers per layer in [0, 1], and what the rest of the network still weighs."""

    def __init__(self, problem: Problem) -> None:
        layers = problem.network.layers
        columns = [
            np.linspace(0, 1, len(layers)),
            [layer.kind == "depthwise" for layer in layers],
            [layer.kind == "linear" for layer in layers],
            _rescaled([np.log(layer.c_in) for layer in layers]),
            _rescaled([np.log(layer.c_out) for layer in layers]),
            _rescaled([layer.kernel[0] * layer.kernel[1] for layer in layers]),
            _rescaled([layer.stride[0] for layer in layers]),
            _rescaled([np.log(layer.out_hw[0] * layer.out_hw[1]) for layer in layers]),
            _rescaled([np.log(layer.weights) for layer in layers]),
            _rescaled([np.log(layer.macs) for layer in layers]),
        ]
        self.rows = np.stack([np.asarray(c, float) for c in columns], axis=1)  # (n_layers, 10)
        self.index = {layer.name: i for i, layer in enumerate(layers)}
        self.rest = np.stack(
            [
                1 - np.cumsum([getattr(layer, what) for layer in layers]) / getattr(problem.network, what)
                for what in ("weights", "macs")
            ],
            axis=1,
        )  # (n_layers, 2): share of the layers behind this one
        self.problem = problem

    def of(self, draft: Draft) -> tuple[int, list[float]]:
        """Index of the present layer, and its ten features followed by slack and the two rests (three numbers)."""
        at = self.index[draft.decision.layer.name]
        return at, [*self.rows[at], float(np.clip(draft.slack.min(), 0, 1)), *self.rest[at]]

    def mean_width(self, draft: Draft, at: int) -> float:
        """Mean width of a layer's kernels as drafted, / 8; 1 before the first layer."""
        if at < 0:
            return 1.0
        bits = draft.weight_bits(self.problem.network.layers[at].name)
        return min(float(bits[bits > 0].mean()) / 8, 1.0)


class LayerView:
    """Sparsity, and where there is a choice the width of the input. Tables: see `CompressionEnv`."""

    def __init__(self, problem: Problem) -> None:
        self._features = _Features(problem)
        self._acts = len(problem.choices.act_bits) > 1
        self.observation_space = spaces.Box(0.0, 1.0, (16,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2 if self._acts else 1,), np.float32)

    def observe(self, draft: Draft) -> np.ndarray:
        at, features = self._features.of(draft)
        decision = draft.decision
        low, high = decision.options if decision.kind == "sparsity" else (0.0, 0.0)
        return np.array([*features, low, high, self._features.mean_width(draft, at - 1)], np.float32)

    def apply(self, draft: Draft, action: np.ndarray) -> None:
        layer = draft.decision.layer
        if draft.decision.kind == "sparsity":
            low, high = draft.decision.options
            draft.take(low + _unit(action[0]) * (high - low))
        if draft.decision is not None and draft.decision.kind == "act" and draft.decision.layer is layer:
            draft.take(pick(draft.decision.options, action[1]))


class ChannelView:
    """The width of one block of kernels. Tables: see `CompressionEnv`."""

    def __init__(self, problem: Problem) -> None:
        self._features = _Features(problem)
        self._problem = problem
        self.observation_space = spaces.Box(0.0, 1.0, (21,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def observe(self, draft: Draft) -> np.ndarray:
        at, features = self._features.of(draft)
        decision = draft.decision
        scores = self._problem.space.scores[decision.layer.name]
        here = draft.weight_bits(decision.layer.name)
        kept = float((here > 0).mean())
        most = float(np.max(scores))
        importance = float(scores[decision.kernels].mean()) / most if most > 0 else 0.0
        return np.array(
            [
                *features,
                1 - kept,
                decision.block / decision.blocks,
                len(decision.kernels) / len(here),
                np.clip(importance, 0, 1),
                min(decision.options[-1] / 8, 1),
                min(draft.act_bits(decision.layer.name) / 8, 1),
                draft.last_width / 8,
                self._features.mean_width(draft, at - 1),
            ],
            np.float32,
        )

    def apply(self, draft: Draft, action: np.ndarray) -> None:
        draft.take(pick(draft.decision.options, action[0]))
