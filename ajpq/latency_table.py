"""A latency table: what was measured of a network on a device, and the time of every layer within it that follows.

`LatencyTable.grids` makes the predictions, our choice throughout:

- A time must not fall when a channel is added or a layer goes from int8 to float32: budgets need it. But ONNX Runtime
  takes longer for 8 int8 kernels than for 16, and for some layers longer in int8 than in float32. Where a measured time
  falls the prediction is the geometric mean of the largest time below and the smallest above (`never_falling`).
- A whole network is not the sum of its layers, each alone. How their times are weighed, and what comes on top, is
  fitted to whole networks: the unpruned one, and in int8 some that are pruned at random (`ajpq.latency_fit`). Both
  unpruned networks are predicted as measured, but for layers where int8 is slower. The empty run is paid once, with the
  first layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ajpq.errors import AjpqError
from ajpq.files import write_text
from ajpq.latency_fit import Fit, Whole, between
from ajpq.network import LayerSpec, Network
from ajpq.one_layer import PRECISIONS, Point, Shape, calls_of
from ajpq.timing import Device

VERSION = 5  # of what is measured and how; since 5 in turns with whole networks, and pruned ones, too
LEAST = 1e-6  # share of a whole network that its layers take, whatever the empty run took
BLOCK = 16  # channels that processors with AVX-512 compute together
EMPTY, WHOLE = "empty", {name: f"whole {name}" for name in PRECISIONS}  # keys of times beside those of points
_FACTS = ("kind", "c_in", "c_out", "groups", "kernel", "stride", "out_hw", "positions")


def facts_of(layer: LayerSpec) -> dict[str, Any]:
    """What a layer is recognised by, as JSON gives it back."""
    return {key: list(v) if isinstance(v := getattr(layer, key), tuple) else v for key in _FACTS}


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """A layer of a table. calls: the shapes that it is called with; inputs, outputs: increasing, the last the layer's
    own: channels of a kernel (1 for depthwise) and kernels."""

    name: str
    facts: Mapping[str, Any]
    calls: Sequence[Shape]
    inputs: Sequence[int]
    outputs: Sequence[int]

    def points(self, precision: str) -> list[list[list[Point]]]:
        """[input][output][call]."""
        return [[[Point(s, i, o, precision) for s in self.calls] for o in self.outputs] for i in self.inputs]


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times measured for one network on one device.

    batch: images of a run. image: their shape, (C, H, W). times: `str(Point)`, EMPTY, one of WHOLE or of `pruned` ->
        (median, lower quartile, upper quartile), ms per image. pruned: networks that were pruned at random, in int8:
        layer name -> inputs of a kernel, kernels.
    """

    device: Device
    batch: int
    image: tuple[int, ...]
    layers: Sequence[LayerGrid]
    times: Mapping[str, tuple[float, float, float]]
    pruned: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)

    @cached_property
    def _raw(self) -> dict[str, np.ndarray]:
        def measured(calls: Sequence[Point]) -> float:
            return sum(self.times[str(point)][0] for point in calls)

        return {
            layer.name: np.array([[list(map(measured, row)) for row in layer.points(p)] for p in PRECISIONS])
            for layer in self.layers
        }

    @cached_property
    def layer_sums(self) -> dict[str, float]:
        """Precision -> ms of all layers of the unpruned network, each alone."""
        return {p: float(sum(raw[i, -1, -1] for raw in self._raw.values())) for i, p in enumerate(PRECISIONS)}

    @cached_property
    def grids(self) -> dict[str, np.ndarray]:
        """Layer name -> predicted ms per image, float64 (2, n inputs, n outputs): float32, then int8."""
        alone = {name: never_falling(raw) for name, raw in self._raw.items()}
        real, int8 = ({name: grid[i] for name, grid in alone.items()} for i in range(len(PRECISIONS)))
        original = {layer.name: (layer.inputs[-1], layer.outputs[-1]) for layer in self.layers}
        of_int8 = [(WHOLE["int8"], original), *self.pruned.items()]
        low = Fit(self.layers, int8, [self._whole(*each) for each in of_int8])
        high = Fit(self.layers, real, [self._whole(WHOLE["float32"], original)], low.coefficients)
        found = {name: np.stack([high.grids[name], low.grids[name]]) for name in alone}
        found[self.layers[0].name] += self.times[EMPTY][0]
        return {name: never_falling(grid) for name, grid in found.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Pruned network -> relative error of its prediction, which was fitted to it."""
        found = {}
        for key, channels in self.pruned.items():
            ms = sum(between(layer, self.grids[layer.name][1], *channels[layer.name]) for layer in self.layers)
            found[key] = ms / self.times[key][0] - 1
        return found

    def _whole(self, key: str, channels: Mapping[str, tuple[int, int]]) -> Whole:
        measured = self.times[key][0]
        return Whole(max(measured - self.times[EMPTY][0], LEAST * measured), measured, channels)

    @property
    def head(self) -> dict[str, Any]:
        """What a table is for, as JSON gives it back."""
        layers = [[layer.name, layer.facts] for layer in self.layers]
        facts = {"version": VERSION, "device": asdict(self.device), "batch": self.batch, "image": self.image}
        facts["layers"] = layers
        return json.loads(json.dumps(facts))

    def write(self, path: Path) -> None:
        """At once or not at all."""
        rows = [{**vars(layer), "calls": [asdict(shape) for shape in layer.calls]} for layer in self.layers]
        plain = {
            "version": VERSION, "unit": "ms per image: median, lower and upper quartile", "device": asdict(self.device),
            "batch": self.batch, "image": self.image, "layers": rows, "times": self.times,
            "pruned": self.pruned,
        }  # fmt: skip
        write_text(path, json.dumps(plain, indent=1))

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Raises AjpqError if the file cannot be read or is no whole table."""
        try:
            plain = json.loads(Path(path).read_text())
            if plain["version"] != VERSION:
                raise AjpqError(
                    f"a latency table must be of version {VERSION}, but {path} is of {plain['version']}; remove it and "
                    "build it again"
                )
            layers = [LayerGrid(**{**row, "calls": [_shape(call) for call in row["calls"]]}) for row in plain["layers"]]
            times = {key: tuple(map(float, found)) for key, found in plain["times"].items()}
            pruned = {
                key: {name: (int(i), int(o)) for name, (i, o) in channels.items()}
                for key, channels in plain["pruned"].items()
            }
            table = cls(Device(**plain["device"]), plain["batch"], tuple(plain["image"]), layers, times, pruned)
            whole = bool(layers) and all(np.isfinite(grid).all() for grid in table.grids.values())
            if not whole:
                raise ValueError("it has no layers, or a time that is no number")
        except AjpqError:
            raise
        except OSError as error:
            raise AjpqError(
                f"a latency table must be a readable file, but {path} is not ({error.strerror}); build it with "
                f"`ajpq-profile table={path}`"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AjpqError(
                f"a latency table must be a file that `ajpq-profile table=...` wrote, but {path} is not "
                f"({type(error).__name__}: {error}); build it again"
            ) from error
        return table


def never_falling(grid: np.ndarray) -> np.ndarray:
    """Positive times (2, n inputs, n outputs), float32 before int8, made to rise with channels and with precision;
    where they do already they stay."""
    below = above = grid[::-1]
    for axis in range(3):
        below = np.maximum.accumulate(below, axis)
        above = np.flip(np.minimum.accumulate(np.flip(above, axis), axis), axis)
    return np.sqrt(below * above)[::-1]


def _shape(call: Mapping[str, Any]) -> Shape:
    return Shape(**{key: tuple(value) if isinstance(value, list) else value for key, value in call.items()})


def layer_grids(network: Network, fractions: Sequence[float]) -> list[LayerGrid]:
    """Where every layer is to be measured: at these fractions of its channels, as far as they can be pruned, rounded to
    multiples of 16, as model.onnx is padded (`ajpq.padding`), or of 8 below 32 channels; a grouped convolution has as
    many kernels in every group. Raises AjpqError for fractions out of (0, 1]."""
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise AjpqError(
            f"fractions must be at least one number in (0, 1], but they are {list(fractions)}; write "
            "fractions=[0.25,0.5,0.75,1]"
        )
    calls, found = calls_of(network), []
    for layer in network.layers:
        depthwise = layer.kind == "depthwise"
        step = layer.c_out // layer.c_in if depthwise else layer.groups
        some, all_of_it = list(fractions), [1.0]
        going, coming = (network.prunable[channels].any() for channels in (layer.writes, layer.reads))
        inputs = [1] if depthwise else _axis(layer.c_in // layer.groups, some if coming else all_of_it)
        outputs = _axis(layer.c_out, some if going else all_of_it, step)
        found.append(LayerGrid(layer.name, facts_of(layer), calls[layer.name], inputs, outputs))
    return found


def _axis(size: int, fractions: Sequence[float], groups: int = 1) -> list[int]:
    step = BLOCK * groups if size >= 2 * BLOCK * groups else int(np.lcm(BLOCK // 2, groups))
    rounded = {max(step, round(f * size / step) * step) for f in fractions if f < 1}
    return sorted({n for n in rounded if n < size} | {size})
