"""Milliseconds of a network from a table that was measured for it on its device, as a cost: `budget.latency=0.4`.

How do I build the table for my model?

    ajpq-profile model=resnet20 data=cifar10 table=tables/resnet20.json   # on the device; a killed one goes on
    ajpq model=resnet20 data=cifar10 costs=latency_table costs.latency.path=tables/resnet20.json budget.latency=0.4
    ajpq-profile model=resnet20 data=cifar10 what=outputs/.../...         # what the shipped network really takes

The table has the time of every layer, alone, at some numbers of input channels and kernels, in float32 and in int8
(`ajpq.one_layer`), each measured two or three times (`ajpq.latency_points`), of the whole network in float32 and with 8
bits everywhere, and of a run of next to nothing.
`LatencyTable.grids` makes a prediction out of it, our choice throughout:

- A time must not fall when a channel is added or a layer goes from int8 to float32: budgets need it. But ONNX Runtime
  takes longer for 8 int8 kernels than for 16, and for some layers longer in int8 than in float32. Where a measured time
  falls the prediction is the geometric mean of the largest time below and the smallest above (`never_falling`).
- A whole network takes more than its layers (sums, pooling, what they move) and now and then less. What it takes more
  is spread over the layers as their outputs are large, and falls with their kernels; where it takes less, all layers
  are scaled down. So both whole networks are predicted as measured, but for layers where int8 is slower. The empty run
  is paid once, with the first layer.
- Between the points the prediction is bilinear, below the smallest it is constant.
- Runtimes compute in blocks of channels, and model.onnx is padded to multiples (`ajpq.padding`), so kernels and inputs
  are looked up at the multiples that they are padded to; the gradient is that of the unpadded numbers. A layer that
  reads or writes several spaces is taken as if these were one, so it may have some more channels than predicted.
- What lies between an int8 and a float32 layer is not predicted.
- A layer that keeps no kernel is skipped and takes no time, but for the first, which carries the empty run.
- A layer is int8 if all its kernels and its input have 8 bits or fewer; expected widths between 8 and 32 lie between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ajpq.cost import Load
from ajpq.errors import AjpqError
from ajpq.files import write_text
from ajpq.network import LayerSpec, Network
from ajpq.one_layer import PRECISIONS, Point, Shape, calls_of
from ajpq.padding import check_multiple, padded
from ajpq.quantize import FLOAT
from ajpq.timing import Device, runner

VERSION = 4  # of how points are measured: since 3 with their shapes fixed, since 4 at least twice
INT8 = 8  # bits that an int8 layer has at most
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

    batch: images of a run. image: their shape, (C, H, W). times: `str(Point)`, EMPTY or one of WHOLE -> (median, lower
    quartile, upper quartile), ms per image.
    """

    device: Device
    batch: int
    image: tuple[int, ...]
    layers: Sequence[LayerGrid]
    times: Mapping[str, tuple[float, float, float]]

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
        empty, found = self.times[EMPTY][0], {}
        inner = np.array([max(self.times[WHOLE[p]][0] - empty, 0.0) for p in PRECISIONS])
        steady = {name: never_falling(raw) for name, raw in self._raw.items()}
        sums = sum(grid[:, -1, -1] for grid in steady.values())
        scale, spare = np.minimum(1, inner / sums), np.maximum(inner - sums, 0)
        sizes = {layer.name: layer.facts["c_out"] * layer.facts["positions"] for layer in self.layers}
        for layer in self.layers:
            share = sizes[layer.name] / sum(sizes.values()) * np.array(layer.outputs) / layer.outputs[-1]
            grid = steady[layer.name] * scale[:, None, None] + spare[:, None, None] * share
            grid += empty if layer is self.layers[0] else 0.0
            found[layer.name] = never_falling(grid)
        return found

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
            table = cls(Device(**plain["device"]), plain["batch"], tuple(plain["image"]), layers, times)
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


class LatencyTableCost:
    """Predicted ms of the shipped network, per image of the table's batch; see the head of `ajpq.latency`.

    path: a table that `ajpq-profile table=...` wrote. device: the processor that the table may be of, where it is
        another than this one, as the table names it; without it processor, runtime and version must be those of here.
    multiple: of channels, which model.onnx is padded to; 1 = as they are.
    Raises AjpqError for a table of another device, and when asked about a network that it was not made for.
    """

    unit = "ms"

    def __init__(self, path: str | Path, device: str | None = None, multiple: int = 16) -> None:
        check_multiple(multiple)
        self.path, self.table, self.multiple = path, LatencyTable.read(path), multiple
        _check_device(self.path, self.table.device, device)
        self._layers = {layer.name: layer for layer in self.table.layers}
        self._axes = {
            layer.name: tuple(torch.tensor(axis, dtype=torch.float64) for axis in (layer.inputs, layer.outputs))
            for layer in self.table.layers
        }
        self._copies: dict[str, tuple[int, int]] = {}
        self._grids = {name: torch.from_numpy(grid.copy()) for name, grid in self.table.grids.items()}

    def __call__(self, loads: Sequence[Load]) -> Tensor:
        values = [self._layer(load) for load in loads]
        return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)

    def _layer(self, load: Load) -> Tensor:
        self._check(load)
        inputs, outputs = load.inputs, load.kept.sum()
        found = self._at(load.layer.name, inputs, outputs)
        there = self._at(load.layer.name, *self._padded(load.layer, inputs.item(), outputs.item()))
        real, int8 = found + (there - found).detach()  # straight through
        kernels = (load.kept * _above(load.weight_bits)).amax()
        taken = int8 + torch.maximum(kernels, _above(load.act_bits)) * (real - int8)
        return taken if load.first else load.kept.sum().clamp(max=1) * taken

    def _at(self, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """ms in float32 and in int8, (2,)."""
        (i, u), (j, v) = map(_place, self._axes[name], (inputs, outputs))
        cell = self._grids[name][:, i : i + 2, j : j + 2]
        rows = cell[:, 0] + u * (cell[:, -1] - cell[:, 0])
        return rows[:, 0] + v * (rows[:, -1] - rows[:, 0])

    def _padded(self, layer: LayerSpec, inputs: float, outputs: float) -> list[Tensor]:
        """Inputs and kernels of model.onnx, of which a layer may have several for every channel."""
        reads, writes = layer.inputs_of_a_kernel, layer.writes
        if layer.name not in self._copies:
            self._copies[layer.name] = tuple(len(ids) // len(np.unique(ids)) for ids in (reads, writes))
        sizes = zip((inputs, outputs), (reads, writes), self._copies[layer.name], strict=True)
        found = [n * padded(value / n, len(ids) / n, self.multiple) for value, ids, n in sizes]
        return [torch.tensor(value, dtype=torch.float64) for value in found]

    def _check(self, load: Load) -> None:
        layer, known = load.layer, self._layers.get(load.layer.name)
        if known is None:
            what = f"the layer {layer.name!r} is not in it"
        elif facts_of(layer) != known.facts:
            facts = facts_of(layer)
            key = next(key for key in facts if facts[key] != known.facts.get(key))
            what = f"{layer.name!r} has {key} {facts[key]} now and {known.facts.get(key)} there"
        elif load.first != (known is self.table.layers[0]):
            what = f"its first layer is {self.table.layers[0].name!r}"
        else:
            return
        raise AjpqError(
            f"a latency table must be of the network that is compressed, at its input size, but in {self.path} {what}; "
            "build one with `ajpq-profile table=FILE` and the same model and data"
        )


def _above(bits: Tensor) -> Tensor:
    """0 up to 8 bits, 1 at 32."""
    return ((bits - INT8) / (FLOAT - INT8)).clamp(0, 1)


def _place(axis: Tensor, value: Tensor) -> tuple[int, Tensor]:
    """The cell of a grid that a value lies in, and how far, in [0, 1]; values off the axis are moved to its ends."""
    if len(axis) == 1:
        return 0, torch.zeros((), dtype=torch.float64)
    i = min(max(int(torch.searchsorted(axis, value.detach(), right=True)) - 1, 0), len(axis) - 2)
    return i, ((value - axis[i]) / (axis[i + 1] - axis[i])).clamp(0, 1)


def _check_device(path: str | Path, theirs: Device, named: str | None) -> None:
    if named is not None:
        if named != theirs.processor:
            raise AjpqError(
                f"a latency table must be of the device that is named, but {path} is of {theirs.processor!r} and not "
                f"of {named!r}; build one there or mend costs.latency.device"
            )
        return
    here = runner(theirs.runtime, theirs.threads).device
    if here != theirs:
        raise AjpqError(
            f"a latency table must be of this device, but {path} is of {theirs} and this is {here}; build one here "
            f"with `ajpq-profile table=FILE`, or allow that device with costs.latency.device='{theirs.processor}'"
        )
