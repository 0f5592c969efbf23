"""What a search may choose: `Choices` is what the user says, `SearchSpace` what follows from it for one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ajpq.errors import AjpqError
from ajpq.importance import magnitude, of_channels
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy
from ajpq.quantize import WIDTHS


@dataclass(frozen=True)
class Choices:
    """The options of every decision.

    weight_bits: widths of a kernel; 0 among them allows pruning
    act_bits: widths of a layer's input; more than one makes them a decision
    blocks: kernels of a layer are sorted by importance and get their widths in this many blocks; "max" = one kernel
        each
    max_sparsity: at most this fraction of a space's channels is pruned (AMC: 0.8)
    first_last: width of weights and input of the first and the last layer, as HAQ does; None = decided like the others
    round_to: a space that is pruned keeps a multiple of so many channels, because fast kernels run in multiples (AMC's
        code: channel_round); so a space of no more channels is never pruned
    """

    weight_bits: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)
    act_bits: tuple[int, ...] = (8,)
    blocks: int | str = 4
    max_sparsity: float = 0.8
    first_last: int | None = 8
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            given = getattr(self, name)
            if isinstance(given, (str, int, float)):
                raise AjpqError(f"{name} must be a list of widths, but it is {given!r}; write [0,2,4,8]")
            values = tuple(sorted({int(b) for b in given}))
            allowed = WIDTHS if name == "weight_bits" else WIDTHS[1:]
            if not set(values) <= set(allowed) or not set(values) - {0}:
                raise AjpqError(
                    f"{name} must be widths out of {allowed} with at least one above 0, but they are {values}; "
                    "choose others"
                )
            object.__setattr__(self, name, values)
        if self.blocks != "max" and not (isinstance(self.blocks, int) and self.blocks >= 1):
            raise AjpqError(f"blocks must be a whole number >= 1 or 'max', but it is {self.blocks!r}; choose another")
        if not 0 <= self.max_sparsity < 1:
            raise AjpqError(f"0 <= max_sparsity < 1 must hold, but it is {self.max_sparsity}; choose another")
        if self.first_last is not None and self.first_last not in WIDTHS[1:]:
            raise AjpqError(
                f"first_last must be one of {WIDTHS[1:]} or null, but it is {self.first_last}; choose another"
            )
        if not (isinstance(self.round_to, int) and self.round_to >= 1):
            raise AjpqError(f"round_to must be a whole number >= 1, but it is {self.round_to!r}; choose another")


class SearchSpace:
    """Facts that every backend shares: allowed widths, the orders by importance, and the two extreme policies."""

    def __init__(
        self, network: Network, choices: Choices | None = None, scores: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """scores: importance of every kernel, layer name -> (c_out,); None = `importance.magnitude`."""
        self.network, self.choices = network, choices or Choices()
        self.scores = magnitude(network) if scores is None else scores
        self.channel_scores = of_channels(network, self.scores)
        self._ends = {network.layers[0].name, network.layers[-1].name} if self.choices.first_last is not None else set()

    def widths(self, layer: LayerSpec) -> tuple[int, ...]:
        """Widths that a surviving kernel may have, ascending."""
        return (
            (self.choices.first_last,) if layer.name in self._ends else tuple(b for b in self.choices.weight_bits if b)
        )

    def acts(self, layer: LayerSpec) -> tuple[int, ...]:
        """Widths that the layer's input may have, ascending."""
        return (self.choices.first_last,) if layer.name in self._ends else self.choices.act_bits

    @cached_property
    def essential(self) -> np.ndarray:
        """bool (n_channels,): never pruned, so that every tensor and every space keeps a channel: the most important
        channel of each space within each tensor."""
        keep = ~self.network.prunable
        for ids in self.network.groups:
            owner = self.network.space_of[ids]
            for s in np.unique(owner):
                members = ids[owner == s]
                keep[members[np.argmax(self.channel_scores[members])]] = True
        for space in self.network.spaces:
            keep[space.channels[np.argmax(self.channel_scores[space.channels])]] = True
        return keep

    @cached_property
    def prune_order(self) -> tuple[np.ndarray, ...]:
        """For every space, the channels that may go, least important first; empty where nothing may."""
        free = ~self.essential if 0 in self.choices.weight_bits else np.zeros(self.network.n_channels, bool)
        orders = []
        for space in self.network.spaces:
            channels = space.channels[free[space.channels]]
            order = channels[np.argsort(self.channel_scores[channels], kind="stable")]
            orders.append(order[: self._whole(space.size, len(order))])
        return tuple(orders)

    def n_pruned(self, space: int, sparsity: float) -> int:
        """Channels of a space that a sparsity (a fraction of its size) removes: as many as it says, or fewer where
        `round_to` or the last channels of a tensor ask for them."""
        size = self.network.spaces[space].size
        wanted = int(np.floor(sparsity * size + 1e-9))
        return self._whole(size, min(wanted, len(self.prune_order[space])))

    def _whole(self, size: int, pruned: int) -> int:
        """The largest number up to `pruned` of `size` channels that leaves a multiple of `round_to`, or all of them."""
        return max(0, size - -(-(size - pruned) // self.choices.round_to) * self.choices.round_to)

    def alive_at(self, sparsity: float) -> np.ndarray:
        """bool (n_channels,) with the same sparsity in every space."""
        alive = np.ones(self.network.n_channels, bool)
        for s, order in enumerate(self.prune_order):
            alive[order[: self.n_pruned(s, sparsity)]] = False
        return alive

    def homogeneous(self, width: int, sparsity: float = 0.0, act_bits: int | None = None) -> CompressionPolicy:
        """The same width, sparsity and activation width everywhere that there is a choice (the nearest allowed one
        elsewhere).
        """
        alive = self.alive_at(sparsity)
        act_bits = self.choices.act_bits[-1] if act_bits is None else act_bits

        def nearest(options: tuple[int, ...], wanted: int) -> int:
            return min(options, key=lambda b: abs(b - wanted))

        return CompressionPolicy(
            {
                layer.name: np.where(alive[layer.writes], nearest(self.widths(layer), width), 0).astype(np.uint8)
                for layer in self.network.layers
            },
            {layer.name: nearest(self.acts(layer), act_bits) for layer in self.network.layers},
        )

    def cheapest(self) -> CompressionPolicy:
        """Smallest widths, largest sparsity: the least that any cost can become."""
        return self.homogeneous(0, self.choices.max_sparsity, act_bits=0)

    def blocks(self, layer: LayerSpec, alive: np.ndarray) -> list[np.ndarray]:
        """Surviving kernels (indices), most important first, in the configured number of nearly equal blocks."""
        kernels = np.flatnonzero(alive[layer.writes])
        kernels = kernels[np.argsort(-self.scores[layer.name][kernels], kind="stable")]
        n = len(kernels) if self.choices.blocks == "max" else min(int(self.choices.blocks), len(kernels))
        return np.array_split(kernels, n) if n else []
