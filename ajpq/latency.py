"""Milliseconds of a network from a table that was measured for it on its device, as a cost: `budget.latency=0.4`.

How do I build the table for my model?

    ajpq-profile model=resnet20 data=cifar10 table=tables/resnet20.json   # on the device; a killed one goes on
    ajpq model=resnet20 data=cifar10 costs=latency_table costs.latency.path=tables/resnet20.json budget.latency=0.4
    ajpq-profile model=resnet20 data=cifar10 what=outputs/.../...         # what the shipped network really takes

The table has the time of every layer, alone, at some numbers of input channels and kernels, in float32 and in int8
(`ajpq.one_layer`), and of whole networks, all measured in turns (`ajpq.latency_points`), and knows the time of every
layer within the network from these (`ajpq.latency_table`). The cost looks it up:

- Between the points the prediction is bilinear, below the smallest it is constant.
- Runtimes compute in blocks of channels, and model.onnx is padded to multiples (`ajpq.padding`), so kernels and inputs
  are looked up at the multiples that they are padded to; the gradient is that of the unpadded numbers. A layer that
  reads or writes several spaces is taken as if these were one, so it may have some more channels than predicted.
- What lies between an int8 and a float32 layer is not predicted.
- A layer that keeps no kernel is skipped and takes no time, but for the first, which carries the empty run.
- A layer is int8 if all its kernels and its input have 8 bits or fewer; expected widths between 8 and 32 lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ajpq.cost import Load
from ajpq.errors import AjpqError
from ajpq.latency_table import LatencyTable, facts_of
from ajpq.network import LayerSpec
from ajpq.padding import check_multiple, padded
from ajpq.quantize import FLOAT
from ajpq.timing import Device, runner

INT8 = 8  # bits that an int8 layer has at most


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
