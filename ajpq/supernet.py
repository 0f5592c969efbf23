"""A super net over a traced network: every layer under the mixture of its candidates."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ajpq.architecture import Architecture, Parts
from ajpq.calibration import Calibration, range_of
from ajpq.errors import AjpqError
from ajpq.mixing import Gate, MixedInput, MixedLayer, MixedNorm, dorefa, rounded
from ajpq.outputs import put
from ajpq.quantize import FLOAT


class SuperNet(nn.Module):
    """A copy of a network in which every layer computes the mixture of its candidates, and every branch that may be
    skipped is multiplied by the part of it that is not. In training mode, batch-norms
    with the statistics of the batch; parts of 0 and 1 give what `compression.compress` gives in that mode.

    weights: "rounded", by `ajpq.quantize` with step sizes fitted by `refresh`, or "dorefa"; inputs: "rounded", by
        steps of the calibration, or "pact", by learned clipping values.
    """

    def __init__(
        self, architecture: Architecture, calibration: Calibration, weights: str = "rounded", inputs: str = "rounded"
    ) -> None:
        super().__init__()
        versions = {"rounded": rounded, "dorefa": dorefa}
        for what, name, known in (("weights", weights, versions), ("inputs", inputs, ("rounded", "pact"))):
            if name not in known:
                raise AjpqError(f"{what} of a super net must be one of {', '.join(known)}, but they are {name!r}")
        space, self.network = architecture.space, architecture.network
        self.module = copy.deepcopy(self.network.module).requires_grad_(True)
        self._architecture = [architecture]  # in a list: its logits are no weights
        for layer in self.network.layers:
            acts = space.acts(layer)
            signed, steps = True, [1.0]
            if acts != (FLOAT,):
                seen = range_of(layer.name, max(b for b in acts if b != FLOAT), calibration)
                signed, steps = seen.signed, [seen.step(b) for b in acts]
            mixed = MixedInput(acts, signed, steps, inputs == "pact")
            module = self.module.get_submodule(layer.name)
            self.module.set_submodule(layer.name, MixedLayer(module, space.widths(layer), mixed, versions[weights]))
        for norm in self.network.norms:
            self.module.set_submodule(norm.name, MixedNorm(self.module.get_submodule(norm.name)))
        nodes = {node.name: node for node in self.module.graph.nodes}
        self.gates = nn.ModuleList(Gate() for _ in architecture.branches)
        for i, branch in enumerate(architecture.branches):
            self.module.add_submodule(f"gate_{i}", self.gates[i])
            put(self.module, f"gate_{i}", nodes[branch.end], nodes[branch.sum])
        self.module.recompile()
        self._folded = {norm.folds_into for norm in self.network.norms}
        self.train()

    def refresh(self) -> None:
        """Fit step sizes to the weights as they are now."""
        for layer in self.network.layers:
            self.module.get_submodule(layer.name).refresh()

    def forward(self, x: Tensor, parts: Parts) -> Tensor:
        architecture, parts = self._architecture[0], parts.to(x.device)
        pruning = len(architecture.keeping) > 0
        for layer in self.network.layers:
            mixed = self.module.get_submodule(layer.name)
            mixed.p, mixed.q = architecture.of_kernels(layer, parts), architecture.of_input(layer, parts)
            mixed.kept = parts.kept[layer.writes] if pruning and layer.name not in self._folded else None
        for norm in self.network.norms:
            self.module.get_submodule(norm.name).kept = parts.kept[norm.channels] if pruning else None
        for gate, taken in zip(self.gates, parts.taken, strict=True):
            gate.taken = taken
        return self.module(x)
