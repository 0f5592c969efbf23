"""What is known about a CNN: its layers, its channel spaces and how a channel travels through the graph.

Two nouns carry the whole project. A *channel* is one number: the feature map that one or several kernels write and
others read. Two tensor channels that are added together are the same channel, so residual coupling cannot be
expressed wrongly. A *space* is a set of channels with the same writers. Pruning belongs to channels (and so to spaces),
bit-widths belong to the kernels of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from ajpq.branches import Branch, Skipped, branches_of, skip
from ajpq.errors import AjpqError
from ajpq.graph_pickle import pack, unpack

KNOWN_SKIPS = 1000  # that are kept: a search asks for the same ones again and again


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """A fact about one convolution or linear layer. Immutable."""

    name: str  # qualified module name: the only identity of a layer, from trace to shipped file
    kind: str  # "conv", "depthwise" or "linear"
    c_in: int  # input channels (input features for linear)
    c_out: int  # kernels
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    out_hw: tuple[int, int]  # output pixels of one call; (1, 1) for linear
    positions: int  # output pixels per image, summed over all calls of the module
    reads: np.ndarray  # int64 (c_in,): the channel behind every input channel; flatten repeats each H*W times
    writes: np.ndarray  # int64 (c_out,): the channel that every kernel writes
    bias: bool  # the shipped layer has a bias: its own, or that of the norm folded into it

    @property
    def weights_per_kernel(self) -> int:
        return self.c_in // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def weights(self) -> int:
        return self.c_out * self.weights_per_kernel

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return self.positions * self.weights

    @property
    def inputs_of_a_kernel(self) -> np.ndarray:
        """int64 (c_in / groups,): the channels that kernel 0 reads; other groups read coupled ones."""
        return self.reads[: self.c_in // self.groups]


@dataclass(frozen=True, eq=False)
class NormSpec:
    """A batch-norm: folded into the layer before it when shipped, or stored as one affine map per channel."""

    name: str
    channels: np.ndarray  # int64 (C,)
    folds_into: str | None  # the layer whose output it alone reads
    charged_to: str  # the layer whose cost carries it where it cannot be folded


@dataclass(frozen=True, eq=False)
class Space:
    """Channels with the same writers, pruned together or one by one, but for all writers at once."""

    channels: np.ndarray  # int64 (size,)
    prunable: bool
    why_not: str  # the reason, where prunable is False
    writers: tuple[str, ...]  # layers whose kernels write these channels
    norms: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.channels)


@dataclass(frozen=True, eq=False)
class Move:
    """How surgery re-emits a node that only moves elements (slice, shuffle, flatten, view, channel padding).

    kind: "gather"   positions `index` of dimension 1 of the node `root`
          "flatten"  the node `root` from dimension 1 on
          "pad"      zeros around the input, `index` of them: two per dimension, from the last dimension backwards
          "resize"   the node itself; a literal size at `axis`, which lists `channels`, follows the surviving ones
    """

    kind: str
    root: str
    index: np.ndarray | None = None
    axis: int = 1
    channels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """The user's CNN as tracing proved it to be. Holds a private copy: the user's module is never modified."""

    module: fx.GraphModule  # eval mode
    example: torch.Tensor  # (2, C, H, W): the input that tracing ran on
    layers: tuple[LayerSpec, ...]  # execution order
    spaces: tuple[Space, ...]
    norms: tuple[NormSpec, ...]
    values: Mapping[str, np.ndarray]  # node name -> int64 channels along dimension 1
    moves: Mapping[str, Move]  # node name -> how to re-emit it
    unused: tuple[str, ...]  # conv and linear modules that the traced forward never calls: not shipped
    other_parameters: int  # 32-bit words of modules that are neither layers nor norms

    def __getstate__(self) -> dict[str, Any]:
        """The fields; what was derived from them and cached is derived again."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"module": pack(self.module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, module=unpack(state["module"]))

    @cached_property
    def unfolded(self) -> dict[str, list[NormSpec]]:
        """Layer name -> the batch-norms that its cost carries because they cannot be folded."""
        found: dict[str, list[NormSpec]] = {}
        for norm in self.norms:
            if norm.folds_into is None:
                found.setdefault(norm.charged_to, []).append(norm)
        return found

    @cached_property
    def gathers(self) -> dict[str, dict[str, int]]:
        """Layer name -> the nodes, charged to that layer, that pick channels in an order of their own (shuffle, every
        other channel): once some of these are pruned, the packed file holds the places of the others, of so many bytes
        each. Our choice: two; one of up to 128 channels, and of up to 512 in the order of a shuffle or slice, which
        compresses well."""
        found: dict[str, dict[str, int]] = {}
        nodes = list(self.module.graph.nodes)
        for at, node in enumerate(nodes):
            move = self.moves.get(node.name)
            if move is None or move.kind != "gather" or (np.diff(move.index) == 1).all():
                continue  # what is contiguous stays so when channels go
            if all(self._passes_by(user, node) for user in node.users):
                continue
            later = [n.target for n in nodes[at:] if n.op == "call_module" and n.target in self.index]
            charged = found.setdefault(later[0] if later else self.layers[-1].name, {})
            shuffled, among = len(np.unique(np.diff(move.index))) <= 2, len(self.values[move.root])
            charged[node.name] = 1 if among <= (512 if shuffled else 128) else 2
        return found

    def _passes_by(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether surgery emits the user from an earlier node, so that it does not need this one."""
        move = self.moves.get(user.name)
        if move is None and user.name not in self.values and user.users:  # chunks: a tuple of values
            return all(self._passes_by(other, node) for other in user.users)
        if move is None:
            return False
        return move.kind in ("gather", "flatten") and move.root != node.name

    @cached_property
    def carriers(self) -> tuple[frozenset[str], ...]:
        """For every space, the layers whose cost depends on which of its channels survive."""
        found = [{*space.writers, *read} for space, read in zip(self.spaces, self.readers, strict=True)]
        for norm in self.norms:
            if norm.folds_into is None:
                for s in np.unique(self.space_of[norm.channels]):
                    found[s].add(norm.charged_to)
        for layer, nodes in self.gathers.items():
            for s in np.unique(self.space_of[np.concatenate([self.values[node] for node in nodes])]):
                found[s].add(layer)
        return tuple(map(frozenset, found))

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches that may be skipped."""
        return branches_of(self)

    @cached_property
    def _skips(self) -> dict[frozenset[str], Skipped]:
        return {}

    def without(self, layers: Collection[str]) -> Skipped:
        """What goes when these layers keep no kernel: the branches that have no other layer."""
        key = frozenset(layers)
        if key not in self._skips:
            if len(self._skips) >= KNOWN_SKIPS:
                self._skips.clear()
            self._skips[key] = skip(self, key)
        return self._skips[key]

    @cached_property
    def index(self) -> dict[str, int]:
        """Layer name -> place in `layers`."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def __getitem__(self, name: str) -> LayerSpec:
        if name not in self.index:
            raise AjpqError(
                f"a layer must be one of the network's, but there is no {name!r}; "
                f"it has {', '.join(list(self.index)[:6])}, ... (print the network for all of them)"
            )
        return self.layers[self.index[name]]

    def __contains__(self, name: str) -> bool:
        return name in self.index

    @cached_property
    def n_channels(self) -> int:
        return 1 + max(int(space.channels.max()) for space in self.spaces)

    @cached_property
    def space_of(self) -> np.ndarray:
        """int64 (n_channels,): index into `spaces`."""
        owner = np.full(self.n_channels, -1)
        for i, space in enumerate(self.spaces):
            owner[space.channels] = i
        return owner

    @cached_property
    def prunable(self) -> np.ndarray:
        """bool (n_channels,)."""
        return np.array([self.spaces[s].prunable for s in self.space_of])

    @cached_property
    def readers(self) -> tuple[tuple[str, ...], ...]:
        """For every space, the layers that read any of its channels."""
        found: list[list[str]] = [[] for _ in self.spaces]
        for layer in self.layers:
            for s in np.unique(self.space_of[layer.reads]):
                found[s].append(layer.name)
        return tuple(map(tuple, found))

    @cached_property
    def groups(self) -> tuple[np.ndarray, ...]:
        """The distinct sets of channels that tensors of the graph and kernels hold; one of each must survive."""
        found = [*self.values.values(), *(layer.inputs_of_a_kernel for layer in self.layers)]
        unique = {ids.tobytes(): ids for ids in map(np.unique, found)}
        return tuple(unique.values())

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    def writers_of(self, channels: np.ndarray) -> tuple[str, ...]:
        """Layers whose kernels write any of these channels."""
        spaces = (self.spaces[s] for s in np.unique(self.space_of[channels]))
        return tuple(dict.fromkeys(name for space in spaces for name in space.writers))

    def why_not(self, layer: LayerSpec) -> str:
        """Why kernels of this layer cannot be pruned; empty when all can."""
        reasons = {self.spaces[s].why_not for s in np.unique(self.space_of[layer.writes])}
        return "; ".join(sorted(reasons - {""}))

    def __str__(self) -> str:
        head = (
            "layer",
            "kind",
            "weights (c_out, c_in/groups, kh, kw)",
            "out",
            "parameters",
            "MACs",
            "space",
            "prunable",
        )
        rows = [head]
        for layer in self.layers:
            spaces = "+".join(str(s) for s in dict.fromkeys(self.space_of[layer.writes].tolist()))
            shape = (layer.c_out, layer.c_in // layer.groups, *layer.kernel)
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    str(shape),
                    f"{layer.out_hw[0]}x{layer.out_hw[1]}",
                    f"{layer.weights:,}",
                    f"{layer.macs:,}",
                    spaces,
                    self.why_not(layer) or "yes",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        right = (4, 5)
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(
            f"{len(self.layers)} layers, {self.weights:,} weights, {self.macs:,} MACs, {len(self.spaces)} spaces, "
            f"{int(self.prunable.sum())} of {self.n_channels} channels prunable"
        )
        if self.unused:
            lines.append(f"never called in eval mode, not shipped: {', '.join(self.unused)}")
        return "\n".join(lines)
