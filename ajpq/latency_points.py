"""Measuring a latency table, point after point; a build that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.files import sync
from ajpq.latency import EMPTY, INT8, WHOLE, LatencyTable, layer_grids
from ajpq.network import Network
from ajpq.one_layer import PRECISIONS, Point, empty_model, images_of, model_of
from ajpq.onnx_export import float_onnx, to_onnx
from ajpq.policy import CompressionPolicy
from ajpq.timing import Run, Runner, Subject, Times, interleaved, warm

LONG = 5e-4  # seconds that all copies of a layer should take, so that they can be told from the noise: our choice
COPIES = 16  # of a layer in one model, at most
IMAGES = 8  # of noise, to set the ranges of the 8-bit network
ALIKE = 1.25  # ratio of two measurements, at most, that are taken to agree: our choice
Measured = tuple[float, float, float]  # ms per image: median, lower and upper quartile


class Builder:
    """The work that a table needs: every point is measured twice, at two times far apart, and once more where these
    disagree by more than `ALIKE`; the smaller of two counts, the middle one of three. One moment in which the machine
    was busy with something else then spoils nothing: a search would find it.

    runner: of ONNX files. batch: images of a run. fractions: of the channels, see `layer_grids`. seconds: spent on
        every measurement, beside what it takes to load it.
    path: of the table. What is measured goes line by line to `path`.points, from where a killed build goes on; with the
        table written that file goes away. A table that is there already is completed, so that fractions can be added.
    Raises AjpqError where `path` has a table, or points, of another network, device or batch.
    """

    def __init__(
        self, network: Network, runner: Runner, path: Path, batch: int, fractions: Sequence[float], seconds: float
    ) -> None:
        self.network, self.runner, self.path = network, runner, path
        self.batch, self.seconds = batch, seconds
        self.image = tuple(network.example.shape[1:])
        self.layers = layer_grids(network, fractions)
        self.log = path.with_name(f"{path.name}.points")
        self._head = self._table({}).head
        self._finished = self._in_table()
        self._visits = self._in_log()
        self.points = self._points()

    @property
    def times(self) -> dict[str, Measured]:
        """What is known so far."""
        return {key: _settled(visits) for key, visits in self._visits.items()} | self._finished

    @property
    def pending(self) -> list[str]:
        """Keys to measure, one after the other, in a random order that is always the same: so the time of a part
        foretells that of the whole, and a change of the machine meets all layers alike. Every key comes once for each
        time that it is still to be measured; when they are done there may be more, where measurements disagree."""
        keys = [*self.points, EMPTY]
        keys = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
        seen = {key: self._seen(key) for key in keys}
        if rest := [key for visit in range(2) for key in keys if seen[key] <= visit]:
            return rest
        return [key for key in keys if seen[key] == 2 and not self._agrees(key)]

    def measure(self, key: str) -> None:
        """Measure one of `pending` and write it to the log; the whole networks go with the empty run."""
        found = {key: self._point(self.points[key])} if key in self.points else self._whole()
        for name, value in found.items():
            self._visits.setdefault(name, []).append(value)
        self._append(found)

    def finish(self) -> LatencyTable:
        """Write the table of all points, and remove the log; what it has of others is dropped, as it may have been
        measured once only."""
        wanted = {name for key in (*self.points, EMPTY) for name in self._names(key)} | set(self._finished)
        table = self._table({name: ms for name, ms in self.times.items() if name in wanted})
        table.write(self.path)
        self.log.unlink(missing_ok=True)
        return table

    def _table(self, times: dict[str, Measured]) -> LatencyTable:
        return LatencyTable(self.runner.device, self.batch, self.image, self.layers, times)

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

    def _point(self, point: Point) -> Measured:
        images = images_of(point, self.batch)

        def start(copies: int, poolings: int) -> Run:
            return self.runner.start(Subject(images, model_of(point, copies, poolings)))

        more = int(np.clip(round(LONG / warm(start(1, 1))), 1, COPIES))
        runs = {"one": start(1, 1 + more), "all": start(1 + more, 1)}
        found = interleaved(runs, seconds=self.seconds)
        slope = Times((found["all"].samples - found["one"].samples) / more)
        if slope.median <= 0:  # the noise is larger than the layer
            slope = Times(found["all"].samples / (1 + more))
        return self._told(slope)

    def _whole(self) -> dict[str, Measured]:
        images = torch.randn(self.batch, *self.image, generator=torch.Generator().manual_seed(0))
        subjects = {
            WHOLE["float32"]: Subject(images.numpy(), float_onnx(self.network.module, images)),
            WHOLE["int8"]: Subject(images.numpy(), int8_onnx(self.network)),
            EMPTY: Subject(np.zeros(1, np.float32), empty_model()),
        }
        runs = {name: self.runner.start(subject) for name, subject in subjects.items()}
        found = interleaved(runs, seconds=max(2.0, 10 * self.seconds))
        return {name: self._told(times) for name, times in found.items()}

    def _told(self, times: Times) -> Measured:
        return tuple(value / self.batch for value in (times.median, *times.quartiles))

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


def int8_onnx(network: Network) -> bytes:
    """The unpruned network with 8 bits everywhere, as an ONNX file; ranges are those of noise."""
    shape = network.example.shape[1:]
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    policy = CompressionPolicy.homogeneous(network, INT8, INT8)
    return to_onnx(freeze(compress(network, policy, calibrate(network, [(images, None)]))), images)
