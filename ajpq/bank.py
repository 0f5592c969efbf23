"""Every kernel at every width, quantized once: a policy only chooses among them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ajpq import quantize
from ajpq.network import LayerSpec, Network
from ajpq.quantize import FLOAT
from ajpq.step_sizes import fit_scale


class WeightBank:
    """The weights of a network and, made when first asked for, their step sizes and codes at each width.

    Step sizes are fitted to whole kernels, so a kernel has the same one whichever of its inputs are pruned, and a
    candidate's weights are gathered, not computed.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._scales: dict[tuple[str, int], Tensor] = {}
        self._codes: dict[tuple[str, int], Tensor] = {}

    def weight(self, layer: LayerSpec) -> Tensor:
        """float32 (c_out, c_in / groups, kh, kw), or (c_out, c_in) of a linear layer."""
        return self.network.module.get_submodule(layer.name).weight.detach()

    def scale(self, layer: LayerSpec, bits: int) -> Tensor:
        """Step size of every kernel at this width, float32 (c_out,)."""
        key = layer.name, bits
        if key not in self._scales:
            widths = torch.full((layer.c_out,), bits, dtype=torch.uint8)
            self._scales[key] = fit_scale(self.weight(layer), widths)
        return self._scales[key]

    def codes(self, layer: LayerSpec, bits: int) -> Tensor:
        """All kernels at this width, int8 (c_out, ...), in the container of `quantize.contain`."""
        key = layer.name, bits
        if key not in self._codes:
            widths = torch.full((layer.c_out,), bits, dtype=torch.uint8)
            codes = quantize.encode(self.weight(layer), widths, self.scale(layer, bits))
            self._codes[key] = quantize.contain(codes, widths)
        return self._codes[key]

    def scales(self, layer: LayerSpec, bits: np.ndarray) -> Tensor:
        """Step size of every kernel at its own width, float32 (c_out,); 1 for kernels of 0 or 32 bits."""
        found = torch.ones(layer.c_out)
        for width in _coded(bits):
            chosen = torch.from_numpy(bits == width)
            found[chosen] = self.scale(layer, width)[chosen]
        return found

    def gather(self, layer: LayerSpec, bits: np.ndarray, kernels: np.ndarray, inputs: np.ndarray) -> Tensor:
        """Codes of some kernels at their own widths, meeting some inputs: int8 (kernels, inputs, ...)."""
        found = torch.zeros((len(kernels), len(inputs), *self.weight(layer).shape[2:]), dtype=torch.int8)
        wanted = torch.from_numpy(inputs)
        widths = bits[kernels]
        for width in _coded(widths):
            here = np.flatnonzero(widths == width)
            rows = torch.from_numpy(kernels[here])
            found[torch.from_numpy(here)] = self.codes(layer, width)[rows][:, wanted]
        return found


def _coded(bits: np.ndarray) -> list[int]:
    return [int(width) for width in np.unique(bits) if 0 < width < FLOAT]
