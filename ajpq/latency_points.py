"""Measuring a latency table, point after point; a build that was killed goes on.

A shared machine runs at one speed now and at another a minute later, so nothing is timed by itself: points in turns
with the unpruned int8 network, and that, pruned networks and the empty run in turns with the float32 one. What counts
are ratios, round by round; only the float32 network has milliseconds, and all others are multiples of these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ajpq.calibration import Calibration, calibrate
from ajpq.errors import AjpqError
from ajpq.files import sync
from ajpq.latency_samples import channels_of, int8_onnx, noise, pruned_networks, unpruned
from ajpq.latency_table import EMPTY, WHOLE, LatencyTable, layer_grids
from ajpq.network import Network
from ajpq.one_layer import PRECISIONS, Point, empty_model, images_of, model_of
from ajpq.onnx_export import float_onnx
from ajpq.timing import Run, Runner, Subject, Times, interleaved, passes_of, warm

LONG = 5e-4  # seconds that all copies of a layer should take, so that they can be told from the noise: our choice
COPIES = 16  # of a layer in one model, at most
PRUNED = 12  # networks that are fitted to, for up to seven coefficients: our choice
ALIKE = 1.25  # ratio of two measurements, at most, that are taken to agree: our choice
FLOAT32, INT8 = (WHOLE[precision] for precision in PRECISIONS)
Measured = tuple[float, float, float]  # median, lower and upper quartile


class Builder:
    """The work that a table needs. Its keys are points of layers, pruned networks, and EMPTY, with which the unpruned
    networks go. Every key is measured twice, at two times far apart, and once more where these disagree by more than
    `ALIKE`; the smaller of two counts, the middle one of three. One moment in which the machine was busy with something
    else then spoils little: a search would find it.

    runner: of ONNX files. batch: images of a run. fractions: of the channels, see `layer_grids`. seconds: spent on
        every measurement of a point, beside what it takes to load it, and at least five passes of the int8 network;
        whole networks take ten times as long, or half a second. pruned: networks to fit to.
    path: of the table. What is measured goes line by line to `path`.points, from where a killed build goes on; with the
        table written that file goes away. A table that is there already is completed, so that fractions can be added.
    Raises AjpqError where `path` has a table, or points, of another network, device or batch.
    """

    def __init__(
        self, network: Network, runner: Runner, path: Path, batch: int, fractions: Sequence[float], seconds: float,
        pruned: int = PRUNED,
    ) -> None:  # fmt: skip
        self.network, self.runner, self.path = network, runner, path
        self.batch, self.seconds = batch, seconds
        self.image = tuple(network.example.shape[1:])
        self.layers = layer_grids(network, fractions)
        self.pruned = pruned_networks(network, pruned)
        self.log = path.with_name(f"{path.name}.points")
        self._shapes = {key: channels_of(network, policy) for key, policy in self.pruned.items()}
        self._head = self._table({}).head
        self._finished = self._in_table()
        self._visits = self._in_log()
        self.points = self._points()
        self._files: dict[str, bytes] = {}  # of pruned networks, for the second time

    @property
    def times(self) -> dict[str, Measured]:
        """What is known so far, ms per image; nothing before the unpruned networks are."""
        known = {key: _settled(visits) for key, visits in self._visits.items()}
        unit = {key: self._finished[key][0] for key in WHOLE.values() if key in self._finished}
        if not unit and {FLOAT32, INT8} <= set(known):
            unit = {FLOAT32: known[FLOAT32][0], INT8: known[FLOAT32][0] * known[INT8][0]}
        if not unit:
            return self._finished
        by = {FLOAT32: 1.0} | dict.fromkeys((INT8, EMPTY, *self.pruned), unit[FLOAT32])
        by |= dict.fromkeys(self.points, unit[INT8])
        found = {key: tuple(by[key] * value for value in known[key]) for key in by if key in known}
        return found | self._finished

    @property
    def pending(self) -> list[str]:
        """Keys to measure, one after the other: the whole networks, then the points in a random order that is always
        the same, so that the time of a part foretells that of the whole, and a change of the machine meets all layers
        alike. Every key comes once for each time that it is still to be measured; when they are done there may be more,
        where measurements disagree."""
        points = list(self.points)
        keys = [EMPTY, *self.pruned, *(points[i] for i in np.random.default_rng(0).permutation(len(points)))]
        seen = {key: self._seen(key) for key in keys}
        if rest := [key for visit in range(2) for key in keys if seen[key] <= visit]:
            return rest
        return [key for key in keys if seen[key] == 2 and not self._agrees(key)]

    def measure(self, key: str) -> None:
        """Measure one of `pending` and write it to the log."""
        if key == EMPTY:
            found = self._whole()
        else:
            found = {key: self._point(self.points[key]) if key in self.points else self._pruned(key)}
        for name, value in found.items():
            self._visits.setdefault(name, []).append(value)
        self._append(found)

    def finish(self) -> LatencyTable:
        """Write the table of all points, and remove the log; what it has of others is dropped, as it may have been
        measured once only."""
        table = self._table(self.times)
        table.write(self.path)
        self.log.unlink(missing_ok=True)
        return table

    def _table(self, times: dict[str, Measured]) -> LatencyTable:
        return LatencyTable(self.runner.device, self.batch, self.image, self.layers, times, self._shapes)

    def _points(self) -> dict[str, Point]:
        grids = (grid for layer in self.layers for p in PRECISIONS for grid in layer.points(p))
        return {str(point): point for grid in grids for row in grid for point in row}

    def _names(self, key: str) -> tuple[str, ...]:
        return (EMPTY, *WHOLE.values()) if key == EMPTY else (key,)

    def _seen(self, key: str) -> int:
        """How often a key was measured; often enough if the table has it."""
        return min(3 if name in self._finished else len(self._visits.get(name, ())) for name in self._names(key))

    def _agrees(self, key: str) -> bool:
        found = [[median for median, *_ in self._visits[name]] for name in self._names(key)]
        return all(max(medians) <= ALIKE * min(medians) for medians in found)

    # -- measuring ----------------------------------------------------------------------------------------------------

    @property
    def _images(self) -> torch.Tensor:
        return torch.randn(self.batch, *self.image, generator=torch.Generator().manual_seed(0))

    def _start(self, model: bytes) -> Run:
        """Load a whole network."""
        return self.runner.start(Subject(self._images.numpy(), model))

    @cached_property
    def _ranges(self) -> Calibration:
        return calibrate(self.network, [(noise(self.network), None)])

    @cached_property
    def _float32(self) -> Run:
        return self._start(float_onnx(self.network.module, self._images))

    @cached_property
    def _int8(self) -> Run:
        return self._start(int8_onnx(self.network, unpruned(self.network), self._ranges))

    @cached_property
    def _warmed(self) -> dict[str, int]:
        return {INT8: passes_of(self._int8)}

    def _point(self, point: Point) -> Measured:
        """In units of the unpruned int8 network."""
        images, warmed = images_of(point, self.batch), self._warmed

        def start(copies: int, poolings: int) -> Run:
            return self.runner.start(Subject(images, model_of(point, copies, poolings)))

        more = int(np.clip(round(LONG / warm(start(1, 1))), 1, COPIES))
        runs = {"one": start(1, 1 + more), INT8: self._int8, "all": start(1 + more, 1)}  # both follow it in turns
        found = interleaved(runs, seconds=self.seconds, warmed=warmed)
        slope = Times((found["all"].samples - found["one"].samples) / more).over(found[INT8])
        if slope.median <= 0:  # the noise is larger than the layer
            slope = Times(found["all"].samples / (1 + more)).over(found[INT8])
        return _told(slope)

    def _whole(self) -> dict[str, Measured]:
        """ms per image of the float32 network; the others in units of it."""
        empty = self.runner.start(Subject(np.zeros(1, np.float32), empty_model()))
        runs = {FLOAT32: self._float32, INT8: self._int8, EMPTY: empty}
        found = interleaved(runs, seconds=max(2.0, 10 * self.seconds))
        ms = Times(found[FLOAT32].samples / self.batch)
        return {FLOAT32: _told(ms)} | {key: _told(found[key].over(found[FLOAT32])) for key in (INT8, EMPTY)}

    def _pruned(self, key: str) -> Measured:
        """In units of the float32 network."""
        if key not in self._files:
            self._files[key] = int8_onnx(self.network, self.pruned[key], self._ranges)
        runs = {FLOAT32: self._float32, key: self._start(self._files[key])}
        found = interleaved(runs, seconds=max(0.5, 10 * self.seconds))
        return _told(found[key].over(found[FLOAT32]))

    # -- files --------------------------------------------------------------------------------------------------------

    def _append(self, found: dict[str, Measured]) -> None:
        fresh = not self.log.is_file()
        lines = ([self._head] if fresh else []) + [[key, *value] for key, value in found.items()]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if fresh:
            sync(self.log.parent)
        sync(self.log)

    def _in_log(self) -> dict[str, list[Measured]]:
        """What an earlier build measured, in its order; a line that it did not finish is removed."""
        if not self.log.is_file():
            return {}
        text = self.log.read_text()
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            self.log.unlink()
            return {}
        if whole != text:
            with self.log.open("r+") as file:
                file.truncate(len(whole.encode()))
        try:
            head, *rows = map(json.loads, whole.splitlines())
            found: dict[str, list[Measured]] = {}
            for key, *values in rows:
                median, low, high = map(float, values)
                found.setdefault(key, []).append((median, low, high))
        except (ValueError, TypeError) as error:
            raise AjpqError(
                f"points of a latency table must be lines of JSON, but {self.log} is not ({error}); remove it"
            ) from error
        self._check(head, self.log)
        return found

    def _in_table(self) -> dict[str, Measured]:
        for part in self.path.parent.glob(f".{self.path.name}.*.part"):
            part.unlink(missing_ok=True)  # of a killed process
        if not self.path.is_file():
            return {}
        table = LatencyTable.read(self.path)
        self._check(table.head, self.path)
        self._shapes = {**self._shapes, **table.pruned}
        return dict(table.times)

    def _check(self, head: Any, path: Path) -> None:
        for key, ours in self._head.items():
            theirs = head.get(key) if isinstance(head, dict) else None
            if theirs != ours:
                told = "" if key == "layers" else f", {theirs} and not {ours}"
                raise AjpqError(
                    f"a latency table is completed only for its own network and device, but {path} is of another "
                    f"{'network' if key == 'layers' else key}{told}; name another file, or remove it"
                )


def _settled(visits: Sequence[Measured]) -> Measured:
    """The smaller of two, the middle one of three."""
    return sorted(visits)[(len(visits) - 1) // 2]


def _told(times: Times) -> Measured:
    return (times.median, *times.quartiles)
