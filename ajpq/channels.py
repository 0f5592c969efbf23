"""Bookkeeping of tracing: which tensor channels are one and the same, and how elements moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


class ChannelSets:
    """Union-find over channels; every set remembers its writers, norms and why it cannot be pruned."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.frozen: dict[int, str] = {}
        self.writers: dict[int, dict[str, None]] = {}
        self.norms: dict[int, dict[str, None]] = {}

    def fresh(self, n: int, frozen: str = "") -> np.ndarray:
        """n new channels, int64 (n,)."""
        start = len(self.parent)
        ids = np.arange(start, start + n)
        self.parent.extend(ids.tolist())
        if frozen:
            self.freeze(ids, frozen)
        return ids

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def roots(self, ids: np.ndarray) -> np.ndarray:
        return np.array([self.find(int(i)) for i in ids.reshape(-1)], dtype=np.int64).reshape(ids.shape)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            i, j = self.find(i), self.find(j)
            if i == j:
                continue
            self.parent[j] = i
            if j in self.frozen:
                self.frozen.setdefault(i, self.frozen.pop(j))
            for table in (self.writers, self.norms):
                if j in table:
                    table.setdefault(i, {}).update(table.pop(j))

    def freeze(self, ids: np.ndarray, why: str) -> None:
        for i in set(ids.reshape(-1).tolist()):
            self.frozen.setdefault(self.find(i), why)

    def note(self, table: dict[int, dict[str, None]], ids: Iterable[int], name: str) -> None:
        """Add a writer or a norm to the sets of `ids`."""
        for i in ids:
            table.setdefault(self.find(int(i)), {})[name] = None


@dataclass
class Value:
    """What tracing knows about one tensor of the graph.

    ids: int64 (C,), the channel behind every index of dimension 1; None where an index has no single channel.
    zero: a pruned channel is certainly zero here.
    root, index: for moved tensors, the node they came from and, per element, the flat index into it.
    cells: int64, the shape without batch: the channel behind every element (for moved tensors, and where channels lie
        along another dimension than 1, as in (N, H, W, C)).
    """

    shape: tuple[int, ...]
    ids: np.ndarray | None
    zero: bool
    root: str
    index: np.ndarray | None = None
    cells: np.ndarray | None = None
    planned: bool = False  # where there are cells: surgery knows how to re-emit it

    @property
    def axis(self) -> int | None:
        """The one dimension (batch counted) along which the channel varies; None if there are several."""
        if self.cells is None:
            return 1
        varies = [d for d in range(self.cells.ndim) if not (self.cells == self.cells.take([0], axis=d)).all()]
        return None if len(varies) > 1 else 1 + (varies[0] if varies else 0)

    @property
    def along_axis(self) -> np.ndarray | None:
        """int64: the channels along `axis`."""
        if self.cells is None:
            return self.ids
        axis = self.axis
        return (
            None if axis is None else np.moveaxis(self.cells, axis - 1, 0).reshape(self.cells.shape[axis - 1], -1)[:, 0]
        )


def flat(value: Value | list[Value] | None) -> list[Value]:
    """The values of a node: none, one, or one per output."""
    return [] if value is None else value if isinstance(value, list) else [value]
