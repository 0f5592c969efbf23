"""What layers take within a network: their times alone, weighed so that they add up to what whole networks take.

Layers one by one do not make a network. Weights that a layer alone finds in the nearest cache come from afar, tensors
that it alone has at hand were written long ago, and a runtime merges, copies and calls. How much that is depends on the
runtime, so it is fitted (our choice): the time of a network is the sum over its layers of

    a[kind] alone + b moved + c weights + d,        a, b, c, d >= 0

with the time alone, the elements that it writes, its weights and 1, and with a[kind] of convolutions, 1x1 convolutions,
depthwise ones and linear layers. Every part rises with channels, so the sum does: budgets need it. The coefficients
minimise the squared relative errors of whole networks that were measured, with a ridge towards a = 1, b = c = d = 0.
Only in int8 were pruned ones measured; in float32 the ridge is towards the coefficients of int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import nnls

ALONE = "alone"  # first word of the coefficients of times
RIDGE = 0.12  # 3 % of a network's time weigh as much as 25 % of an `a`, or of the network in b, c or d: our choice
UNPRUNED = 10.0  # weight of the unpruned network, whose time is the unit of every budget: our choice


class Layer(Protocol):
    """As in `ajpq.latency_table.LayerGrid`."""

    name: str
    facts: Mapping[str, Any]
    inputs: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True)
class Whole:
    """A network that was measured. ms: without what a call of the runtime takes; measured: with it, what errors are
    relative to; channels: layer name -> inputs of a kernel, kernels."""

    ms: float
    measured: float
    channels: Mapping[str, tuple[int, int]]


Grids = Mapping[str, np.ndarray]  # layer name -> ms, (n inputs, n outputs)


class Fit:
    """Coefficients, so that layers add up to the first of `wholes`, the unpruned network, and nearly to the others.

    alone: times of layers, measured one by one. prior: coefficients to stay near to, instead of those that leave the
    times as they are.
    """

    def __init__(
        self, layers: Sequence[Layer], alone: Grids, wholes: Sequence[Whole], prior: Mapping[str, float] | None = None
    ) -> None:
        self.parts = {layer.name: _parts(layer, alone[layer.name]) for layer in layers}
        names = sorted({name for grids in self.parts.values() for name in grids})
        start = np.array([(prior or {}).get(name, float(name.startswith(ALONE))) for name in names])
        rows = np.array([[self._added(layers, name, whole.channels) for name in names] for whole in wholes])
        ms = np.array([whole.ms for whole in wholes])
        weights = np.array([1 / whole.measured for whole in wholes])
        weights[0] *= UNPRUNED
        size = [1 if name.startswith(ALONE) else of_all / ms[0] for name, of_all in zip(names, rows[0], strict=True)]
        matrix = np.vstack([rows * weights[:, None], RIDGE * np.diag(size)])
        found, _ = nnls(matrix, np.concatenate([weights * ms, RIDGE * np.array(size) * start]))
        found *= ms[0] / (rows[0] @ found)
        self.coefficients = dict(zip(names, found.tolist(), strict=True))

    @property
    def grids(self) -> Grids:
        """Times within a network."""
        return {
            layer: sum(self.coefficients[name] * grid for name, grid in parts.items())
            for layer, parts in self.parts.items()
        }

    def _added(self, layers: Sequence[Layer], name: str, channels: Mapping[str, tuple[int, int]]) -> float:
        """A part of all layers of a network."""
        found = 0.0
        for layer in layers:
            grid, (inputs, outputs) = self.parts[layer.name].get(name), channels[layer.name]
            if grid is not None:
                found += between(layer, grid, inputs, outputs)
        return found


def _parts(layer: Layer, alone: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficient -> what it is the coefficient of, (n inputs, n outputs)."""
    facts, (i, o) = layer.facts, np.meshgrid(layer.inputs, layer.outputs, indexing="ij")
    pixels = int(np.prod(facts["kernel"]))
    pointwise = facts["kind"] == "conv" and pixels == 1
    return {
        f"{ALONE} {'pointwise' if pointwise else facts['kind']}": alone,
        "moved": 1.0 * facts["positions"] * o,
        "weights": 1.0 * pixels * i * o,
        "layers": np.ones_like(alone),
    }


def between(layer: Layer, grid: np.ndarray, inputs: float, outputs: float) -> float:
    """A value of a grid, bilinear, as `ajpq.latency` looks it up."""
    rows = [np.interp(outputs, layer.outputs, row) for row in grid]
    return float(np.interp(inputs, layer.inputs, rows))
