"""Hard budgets: several costs, each at most a fraction of what the uncompressed network costs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ajpq.cost import CostModel, inputs_per_kernel, load_of, loads_of, side_words, total
from ajpq.errors import AjpqError
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy

KNOWN = 200_000  # costs of a layer that are kept: searches ask for the same ones again and again


class Budget:
    """cost name -> largest allowed ratio to the uncompressed network, and the arithmetic around it.

    costs: every cost that is reported, name -> model. limits: those that bind, name -> fraction in (0, 1].
    cheapest: the policy with the smallest widths and the fewest channels that the search may choose.
    Raises AjpqError for an unknown name, a fraction out of range, or a limit that even `cheapest` exceeds.
    """

    def __init__(
        self, network: Network, costs: Mapping[str, CostModel], limits: Mapping[str, float], cheapest: CompressionPolicy
    ) -> None:
        self.network, self.costs, self.limits = (
            network,
            dict(costs),
            {name: float(value) for name, value in limits.items()},
        )
        self._known: dict[tuple, np.ndarray] = {}
        if not self.limits:
            raise AjpqError(
                f"a budget must limit at least one cost, but it is empty; set one of {', '.join(self.costs)}, "
                "e.g. size=0.1"
            )
        for name, limit in self.limits.items():
            if name not in self.costs:
                raise AjpqError(
                    f"a budget must name a cost, but {name!r} is none of {', '.join(self.costs)}; rename it or "
                    "add the cost model"
                )
            if not 0 < limit <= 1:
                raise AjpqError(
                    f"0 < budget <= 1 must hold (a fraction of the uncompressed network), but {name} has "
                    f"{limit:g}; write 0.1 for 10 %"
                )
        for name, cost in self.costs.items():
            _check(name, cost, network, cheapest)
        self.original = {
            name: total(cost, network, CompressionPolicy.homogeneous(network)) for name, cost in self.costs.items()
        }
        if empty := [name for name, value in self.original.items() if not value > 0 or not np.isfinite(value)]:
            raise AjpqError(
                f"the uncompressed network must have a cost above 0, but {empty[0]!r} gives "
                f"{self.original[empty[0]]:g}; "
                "check the cost model"
            )
        floor = self.ratios(cheapest)
        out = [
            f"{name}={limit:g} (smallest reachable {np.ceil(floor[name] * 1e4) / 1e4:.4f})"
            for name, limit in self.limits.items()
            if floor[name] > limit
        ]
        if out:
            raise AjpqError(
                f"a budget must be reachable, but with these bit-widths and this sparsity {', '.join(out)} is not; "
                "raise it, allow fewer bits, or allow more sparsity"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The binding costs, in order."""
        return tuple(self.limits)

    @property
    def caps(self) -> np.ndarray:
        """float64 (n limits,): the largest allowed cost, in each model's unit."""
        return np.array([self.limits[name] * self.original[name] for name in self.limits])

    def values(self, policy: CompressionPolicy) -> dict[str, float]:
        return {name: total(cost, self.network, policy) for name, cost in self.costs.items()}

    def ratios(self, policy: CompressionPolicy) -> dict[str, float]:
        """Each cost as a fraction of the uncompressed network's."""
        return {name: value / self.original[name] for name, value in self.values(policy).items()}

    def layer_costs(self, layer: LayerSpec, weight_bits: np.ndarray, act_bits: int, alive: np.ndarray) -> np.ndarray:
        """float64 (n limits,): what one layer adds to every binding cost."""
        inputs, side = inputs_per_kernel(layer, alive), side_words(self.network, alive, layer)
        key = layer.name, weight_bits.tobytes(), act_bits, inputs, side  # all that a `Load` holds
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            load = [load_of(self.network, layer, weight_bits, act_bits, alive)]
            self._known[key] = np.array([float(self.costs[name](load)[0]) for name in self.limits])
        return self._known[key]

    def fits(self, totals: np.ndarray) -> bool:
        """totals (n limits,)."""
        return bool((totals <= self.caps * (1 + 1e-9)).all())

    def admits(self, policy: CompressionPolicy) -> bool:
        return self.fits(np.array([total(self.costs[name], self.network, policy) for name in self.limits]))


def _check(name: str, cost: CostModel, network: Network, cheapest: CompressionPolicy) -> None:
    """Raise AjpqError unless a cost model has a unit and gives a finite number for every layer, by that alone."""
    if not callable(cost) or not isinstance(getattr(cost, "unit", None), str):
        raise AjpqError(
            f"a cost model must be called with loads and have a `unit`, but {name!r} is {type(cost).__name__}, which "
            "does not; add unit = 'ms', or whatever it counts"
        )
    for policy in (CompressionPolicy.homogeneous(network), cheapest):
        loads = loads_of(network, policy)
        found = cost(loads)
        if not isinstance(found, Tensor) or found.shape != (len(loads),):
            shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise AjpqError(
                f"a cost model must give a tensor with a number per layer, but for {len(loads)} layers {name!r} gives "
                f"{shape}; mend {type(cost).__name__}"
            )
        if not found.isfinite().all():
            worst = network.layers[int((~found.isfinite()).nonzero()[0])].name
            raise AjpqError(f"costs must be finite, but {name!r} is not for {worst!r}; mend {type(cost).__name__}")
        for i, load in enumerate(loads):
            alone = cost([load])[0].item()
            if not math.isclose(alone, found[i].item(), rel_tol=1e-5, abs_tol=1e-9):
                raise AjpqError(
                    f"the cost of a layer must depend on its own load alone, but {name!r} gives {alone:g} for "
                    f"{load.layer.name!r} by itself and {found[i].item():g} among the others; mend "
                    f"{type(cost).__name__}"
                )
