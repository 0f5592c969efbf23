"""Activations of earlier candidates, kept for the next ones within a number of bytes."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from ajpq.memory import give_back

REMEMBERED = 100_000  # names
HALF_LIFE = 32  # candidates
FIRST = 0.1  # what the first candidate with a value counts, against 1 for each that has it again


@dataclass(eq=False)
class _Entry:
    value: Any
    size: int
    density: float  # worth / size
    name: Hashable
    ticket: int = 0  # of its valid place in the heap


def size_of(value: Any) -> int:
    """Bytes of the memory that a tensor lies in; 0 for anything else."""
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0


class Shelf:
    """Values by key, each with the name that it shares with its likes from other images. While there is room every
    value is kept; then only in the place of values of less than half its use: how often candidates had a value of that
    name again (counts fade by half in `HALF_LIFE` candidates) x worth / bytes. So a candidate that others are made from
    stays, and a stream of unrelated ones moves little (our choice). Safe for threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, 0
        self._entries: dict[Hashable, _Entry] = {}
        self._heap: list[tuple[float, int, Hashable]] = []  # (use, ticket, key); those with an old ticket are void
        self._tickets = count(1)
        self._counts: dict[Hashable, float] = {}  # of candidates per name, in units that grow as counts fade
        self._unit = 1.0
        self._moved = 0  # bytes let in since memory was last given back
        self._lock = threading.Lock()

    def holds(self, keys: Iterable[Hashable]) -> bool:
        return all(key in self._entries for key in keys)

    def take(self, keys: list[Hashable]) -> list[Any] | None:
        """The values of all keys, or None where one is missing."""
        with self._lock:
            found = [self._entries.get(key) for key in keys]
            return None if any(entry is None for entry in found) else [entry.value for entry in found]

    def offer(self, key: Hashable, value: Any, worth: float, name: Hashable) -> None:
        """Keep the value if it deserves it. worth: what computing it costs."""
        size = size_of(value)
        with self._lock:
            if key in self._entries or size > self.capacity:
                return
            entry = _Entry(value, size, worth / max(size, 1), name)
            if self.held + size > self.capacity and not self._make_room(size, self._use(entry) / 2):
                return
            self._entries[key] = entry
            self.held += size
            self._moved += size
            self._rank(key, entry)

    def remember(self, names: Iterable[Hashable]) -> None:
        """A candidate that had values of these names is done."""
        with self._lock:
            for name in names:
                known = self._counts.pop(name, None)
                self._counts[name] = FIRST * self._unit if known is None else known + self._unit
            self._unit *= 2 ** (1 / HALF_LIFE)
            for name in list(self._counts)[: max(0, len(self._counts) - REMEMBERED)]:
                del self._counts[name]
            if self._unit > 2.0**500:
                self._counts = {name: number / self._unit for name, number in self._counts.items()}
                self._unit, self._heap = 1.0, []
                for key, entry in self._entries.items():
                    self._rank(key, entry)

    def settle(self) -> None:
        """Give freed memory back to the system now and then: values of many sizes that come and go leave holes."""
        if self._moved > max(self.capacity / 16, 2**25):
            self._moved = 0
            give_back()

    def limit(self, capacity: int) -> None:
        """Hold at most so many bytes from now on."""
        with self._lock:
            self.capacity = max(capacity, 0)
            if self.held > self.capacity:
                self._make_room(0, float("inf"))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear(), self._heap.clear()
            self.held = 0

    def _use(self, entry: _Entry) -> float:
        return entry.density * self._counts.get(entry.name, FIRST * self._unit)

    def _rank(self, key: Hashable, entry: _Entry) -> None:
        entry.ticket = next(self._tickets)
        heapq.heappush(self._heap, (self._use(entry), entry.ticket, key))

    def _make_room(self, size: int, use: float) -> bool:
        """Remove values of less use until a new one fits; nothing where that is not enough."""
        freed, chosen = 0, []
        while self.held - freed + size > self.capacity:
            item = self._least()
            if item is None or item[0] >= use:
                for old in chosen:
                    heapq.heappush(self._heap, old)
                return False
            chosen.append(heapq.heappop(self._heap))
            freed += self._entries[item[2]].size
        for _, _, key in chosen:
            self.held -= self._entries.pop(key).size
        return True

    def _least(self) -> tuple[float, int, Hashable] | None:
        """The entry of least use; uses only grow, so the first place that is still right is the least."""
        while self._heap:
            use, ticket, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.ticket == ticket and use >= self._use(entry) * (1 - 1e-9):
                return self._heap[0]
            heapq.heappop(self._heap)
            if entry is not None and entry.ticket == ticket:
                self._rank(key, entry)
        return None
