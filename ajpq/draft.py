"""A policy in the making. It asks its questions layer by layer and offers, for each, only answers from which every
budget can still be reached; so any sequence of answers ends in a valid policy within budget, and none is edited
afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ajpq.budget import Budget
from ajpq.errors import AjpqError
from ajpq.network import LayerSpec
from ajpq.policy import CompressionPolicy
from ajpq.space import SearchSpace


@dataclass(frozen=True, eq=False)
class Decision:
    """One question. kind "sparsity": a number in [options[0], options[-1]]; "act" or "width": one of `options`,
    ascending.

    kernels: for "width", the kernels of the layer that get it; block, blocks: which block of how many this is.
    menu: the options before budgets were looked at (a sparsity's bounds; all allowed widths).
    """

    kind: str
    layer: LayerSpec
    options: tuple
    menu: tuple
    kernels: np.ndarray | None = None
    block: int = 0
    blocks: int = 1


class Draft:
    """Walks the layers in execution order. For each: the sparsity of the spaces that it is the first to write, the
    width of its input, the width of every block of its surviving kernels. What is not decided yet counts as cheap as
    it can become.

        draft = Draft(space, budget)
        while (decision := draft.decision) is not None:
            draft.take(decision.options[-1])
        policy = draft.policy()
    """

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        self.space, self.budget, network = space, budget, space.network
        cheapest = space.cheapest()
        self.alive = cheapest.alive(network)  # bool (n_channels,); undecided spaces at their smallest
        self._weight = {name: bits.copy() for name, bits in cheapest.weight_bits.items()}
        self._act = dict(cheapest.act_bits)
        self.sparsity: dict[int, float] = {}  # decided spaces
        self.costs = np.array(
            [
                budget.layer_costs(layer, self._weight[layer.name], self._act[layer.name], self.alive)
                for layer in network.layers
            ]
        )  # (n_layers, n limits): the least each layer can still cost
        self.last_width = 8  # of the block decided last
        self._queue = self._questions()
        self.decision: Decision | None = next(self._queue, None)

    @property
    def slack(self) -> np.ndarray:
        """float64 (n limits,): the part of each budget that is not spoken for, as a fraction of it."""
        return 1 - self.costs.sum(axis=0) / self.budget.caps

    def weight_bits(self, layer: str) -> np.ndarray:
        """uint8 (c_out,): decided widths, and the least possible where nothing is decided yet."""
        return self._weight[layer]

    def act_bits(self, layer: str) -> int:
        return self._act[layer]

    def take(self, answer: float) -> None:
        """Answer the present decision. Raises AjpqError if the answer is not among its options."""
        decision = self.decision
        assert decision is not None, "the draft is complete"
        options, low_high = decision.options, decision.kind == "sparsity"
        if low_high and options[0] - 1e-6 <= answer <= options[-1] + 1e-6:  # a float32 of an end is the end
            answer = min(max(float(answer), options[0]), options[-1])
        elif low_high or answer not in options:
            raise AjpqError(
                f"the {decision.kind} of {decision.layer.name!r} must be {'within' if low_high else 'one of'} "
                f"{options}, but it is {answer}; other values break a budget"
            )
        getattr(self, f"_take_{decision.kind}")(decision, answer)
        self.decision = next(self._queue, None)

    def policy(self) -> CompressionPolicy:
        assert self.decision is None, "the draft has open decisions"
        return CompressionPolicy({name: bits.copy() for name, bits in self._weight.items()}, dict(self._act))

    # -- questions ----------------------------------------------------------------------------------------------------

    def _questions(self):
        network, space = self.space.network, self.space
        for layer in network.layers:
            fresh = self._fresh_spaces(layer)
            if fresh:
                top = space.choices.max_sparsity
                yield Decision("sparsity", layer, (self._least_sparsity(fresh), top), (0.0, top))
            if len(acts := space.acts(layer)) > 1:
                yield Decision(
                    "act",
                    layer,
                    self._affordable(layer, acts, lambda b, layer=layer: (self._weight[layer.name], b)),
                    acts,
                )
            widths = space.widths(layer)
            if len(widths) > 1:
                blocks = space.blocks(layer, self.alive)
                for i, kernels in enumerate(blocks):
                    options = self._affordable(
                        layer,
                        widths,
                        lambda b, layer=layer, k=kernels: (self._with(layer, k, b), self._act[layer.name]),
                    )
                    yield Decision("width", layer, options, widths, kernels, i, len(blocks))

    def _fresh_spaces(self, layer: LayerSpec) -> list[int]:
        """Prunable spaces that this layer is the first to write."""
        network = self.space.network
        return [
            s
            for s in dict.fromkeys(network.space_of[layer.writes].tolist())
            if s not in self.sparsity and len(self.space.prune_order[s])
        ]

    def _affordable(self, layer: LayerSpec, options: tuple[int, ...], state) -> tuple[int, ...]:
        """The options, cheapest first, up to the dearest that leaves every budget reachable."""
        at = self.space.network.index[layer.name]
        others = self.costs.sum(axis=0) - self.costs[at]
        low, high = 0, len(options) - 1  # options[low] always fits: it is what the draft assumes
        while low < high:
            middle = (low + high + 1) // 2
            if self.budget.fits(others + self.budget.layer_costs(layer, *state(options[middle]), self.alive)):
                low = middle
            else:
                high = middle - 1
        return options[: low + 1]

    def _least_sparsity(self, spaces: list[int]) -> float:
        """The smallest sparsity of these spaces from which every budget can be reached, on the grid of the largest."""
        size = max(self.space.network.spaces[s].size for s in spaces)
        top = self.space.choices.max_sparsity
        low, high = 0, int(np.ceil(top * size))
        while low < high:
            middle = (low + high) // 2
            if self.budget.fits(self._pruned(spaces, min(middle / size, top))[2].sum(axis=0)):
                high = middle
            else:
                low = middle + 1
        return min(low / size, top)

    # -- answers ------------------------------------------------------------------------------------------------------

    def _with(self, layer: LayerSpec, kernels: np.ndarray, bits: int) -> np.ndarray:
        weight = self._weight[layer.name].copy()
        weight[kernels] = bits
        return weight

    def _pruned(self, spaces: list[int], sparsity: float) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """What alive, the widths of the layers concerned and all costs become at a sparsity of these spaces."""
        network, alive = self.space.network, self.alive.copy()
        for s in spaces:
            alive[network.spaces[s].channels] = True
            alive[self.space.prune_order[s][: self.space.n_pruned(s, sparsity)]] = False
        touched = {name for s in spaces for name in network.carriers[s]}
        weights, costs = {}, self.costs.copy()
        for i, layer in enumerate(network.layers):
            if layer.name in touched:
                old = self._weight[layer.name]
                weights[layer.name] = np.where(
                    alive[layer.writes], np.where(old > 0, old, self.space.widths(layer)[0]), 0
                ).astype(np.uint8)
                costs[i] = self.budget.layer_costs(layer, weights[layer.name], self._act[layer.name], alive)
        return alive, weights, costs

    def _take_sparsity(self, decision: Decision, sparsity: float) -> None:
        spaces = self._fresh_spaces(decision.layer)
        self.alive, weights, self.costs = self._pruned(spaces, sparsity)
        self._weight.update(weights)
        self.sparsity.update(dict.fromkeys(spaces, sparsity))

    def _take_act(self, decision: Decision, bits: int) -> None:
        self._act[decision.layer.name] = int(bits)
        self._update(decision.layer)

    def _take_width(self, decision: Decision, bits: int) -> None:
        self.last_width = min(int(bits), 8)
        self._weight[decision.layer.name] = self._with(decision.layer, decision.kernels, int(bits))
        self._update(decision.layer)

    def _update(self, layer: LayerSpec) -> None:
        at = self.space.network.index[layer.name]
        self.costs[at] = self.budget.layer_costs(layer, self._weight[layer.name], self._act[layer.name], self.alive)
