"""What the activations of the uncompressed network look like, and the step size that suits a bit-width best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ajpq.errors import AjpqError
from ajpq.network import Network
from ajpq.quantize import FLOAT, act_range

BINS = 2048


@dataclass(eq=False)
class InputRange:
    """Histogram of one layer's input, after a pass over the calibration images."""

    low: float
    high: float
    counts: np.ndarray  # int64 (BINS,), bins from low to high
    _steps: dict[int, float] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        return self.low < 0

    def step(self, bits: int) -> float:
        """Step size with the least mean squared error of rounding and clipping, over 64 clipping points."""
        if bits == FLOAT:
            return 1.0
        if bits not in self._steps:
            lo, hi = act_range(bits, self.signed)
            edges = np.linspace(self.low, self.high, BINS + 1)
            x, p = (edges[:-1] + edges[1:]) / 2, self.counts / max(self.counts.sum(), 1)
            top = max(self.high / hi if hi else 0.0, self.low / lo if lo else 0.0, 1e-8)
            steps = top * np.linspace(1.0, 0.05, 64)
            errors = [(p * (np.clip(np.round(x / s), lo, hi) * s - x) ** 2).sum() for s in steps]
            self._steps[bits] = float(steps[int(np.argmin(errors))])
        return self._steps[bits]


Calibration = dict[str, InputRange]  # layer name -> range of its input


def range_of(layer: str, bits: int, calibration: Calibration | None) -> InputRange:
    """The range of a layer's input. Raises AjpqError where there is none."""
    if calibration is None or layer not in calibration:
        raise AjpqError(
            f"quantized activations need a calibration, but {layer!r} has act_bits {bits} and no range; "
            "pass calibrate(network, batches)"
        )
    return calibration[layer]


class _Recorder(fx.Interpreter):
    """Runs the traced network and looks at what every layer reads; no hook touches a module."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module)
        self.network, self.low, self.high = network, {}, {}
        self.counts: dict[str, Tensor] = {}
        self.counting = False

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in self.network:
            x = args[0]
            if self.counting:
                found = torch.histc(x.float(), BINS, self.low[target], self.high[target])
                self.counts[target] = self.counts.get(target, 0) + found.double()
            else:
                self.low[target] = np.minimum(self.low.get(target, 0.0), x.min().item())  # these pass NaN on
                self.high[target] = np.maximum(self.high.get(target, 0.0), x.max().item())
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def calibrate(network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> Calibration:
    """Two passes of the uncompressed network over `batches` (x, y): ranges, then histograms."""
    recorder = _Recorder(network)
    images = 0
    for counting in (False, True):
        recorder.counting = counting
        if counting:
            for name, high in recorder.high.items():
                if not np.isfinite(high) or not np.isfinite(recorder.low[name]):
                    raise AjpqError(
                        f"activations must be finite, but the input of {name!r} is not; check the data and the weights"
                    )
                recorder.high[name] = max(high, recorder.low[name] + 1e-6)
        for x, *_ in batches:
            images += len(x)
            recorder.run(x.cpu())
    if not images:
        raise AjpqError("calibration needs at least one image, but the loader gave 0; pass training images")
    return {
        name: InputRange(float(recorder.low[name]), float(recorder.high[name]), recorder.counts[name].cpu().numpy())
        for name in recorder.low
    }
