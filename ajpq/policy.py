"""The thing searched for: a bit-width for every kernel (0 = pruned) and for every layer's input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ajpq.branches import Skipped
from ajpq.errors import AjpqError
from ajpq.network import Network
from ajpq.quantize import FLOAT, WIDTHS


@dataclass(frozen=True, eq=False)
class CompressionPolicy:
    """Plain data: nothing in it refers to a module or a position.

    Pruning is quantization to 0 bits, of a kernel and of more: where all kernels of all layers of a residual branch
    have 0 bits (`Network.branches`), the branch is skipped, and the sum that it belongs to becomes its shortcut.

    weight_bits: layer name -> uint8 (c_out,), each 0 (pruned), 1..8 or 32 (untouched)
    act_bits: layer name -> bit-width of the layer's input, 1..8 or 32
    """

    weight_bits: Mapping[str, np.ndarray]
    act_bits: Mapping[str, int]

    @classmethod
    def homogeneous(cls, network: Network, weight_bits: int = FLOAT, act_bits: int = FLOAT) -> CompressionPolicy:
        """The same widths everywhere; the default is the uncompressed network."""
        return cls(
            {layer.name: np.full(layer.c_out, weight_bits, np.uint8) for layer in network.layers},
            {layer.name: act_bits for layer in network.layers},
        )

    def skipped(self, network: Network) -> Skipped:
        """The branches all of whose layers have 0 bits everywhere, and what goes with them."""
        return network.without([name for name, bits in self.weight_bits.items() if not bits.any()])

    def alive(self, network: Network) -> np.ndarray:
        """bool (n_channels,): channels that no writer has pruned, branches that are skipped being none; of these, the
        channels inside are dead."""
        skipped = self.skipped(network)
        alive = ~skipped.dead
        for layer in network.layers:
            if layer.name not in skipped.layers:
                alive[layer.writes[self.weight_bits[layer.name] == 0]] = False
        return alive

    def validate(self, network: Network) -> None:
        """Raise AjpqError, naming the layer, unless this policy fits `network` and starves no layer."""
        for table, what in ((self.weight_bits, "weight_bits"), (self.act_bits, "act_bits")):
            missing = [layer.name for layer in network.layers if layer.name not in table]
            unknown = [name for name in table if name not in network]
            if missing or unknown:
                name, rule = (missing[0], "is missing") if missing else (unknown[0], "is not a layer of this network")
                raise AjpqError(
                    f"{what} must have exactly the network's {len(network.layers)} layers, but {name!r} {rule}; "
                    "was the policy made for another network?"
                )
        for layer in network.layers:
            bits = self.weight_bits[layer.name]
            if bits.shape != (layer.c_out,):
                raise AjpqError(
                    f"weight_bits must have one width per kernel, but {layer.name!r} has {layer.c_out} kernels and "
                    f"{bits.shape} widths; was the policy made for another network?"
                )
            if not np.isin(bits, WIDTHS).all():
                bad = int(bits[~np.isin(bits, WIDTHS)][0])
                raise AjpqError(
                    f"weight_bits must be one of {WIDTHS}, but {layer.name!r} has a kernel of {bad} bits; choose "
                    "another"
                )
            if self.act_bits[layer.name] not in WIDTHS[1:]:
                raise AjpqError(
                    f"act_bits must be one of {WIDTHS[1:]}, but {layer.name!r} has {self.act_bits[layer.name]}; "
                    "choose another"
                )
        alive, skipped = self.alive(network), self.skipped(network)
        layers = [layer for layer in network.layers if layer.name not in skipped.layers]
        for layer in layers:
            pruned = self.weight_bits[layer.name] == 0
            if (pruned & ~network.prunable[layer.writes]).any():
                k = int(np.flatnonzero(pruned & ~network.prunable[layer.writes])[0])
                raise AjpqError(
                    f"a pruned kernel must be prunable, but kernel {k} of {layer.name!r} is not "
                    f"({network.why_not(layer)}); "
                    "give it at least 1 bit"
                )
            torn = ~pruned & ~alive[layer.writes]
            if torn.any():
                k = int(np.flatnonzero(torn)[0])
                space = network.spaces[network.space_of[layer.writes[k]]]
                raise AjpqError(
                    f"all writers of a channel must prune it together, but kernel {k} of {layer.name!r} has "
                    f"{int(self.weight_bits[layer.name][k])} "
                    f"bits while another of {', '.join(space.writers)} has 0; give 0 bits to all of them or to none"
                )
        for layer in layers:
            if not alive[layer.writes].any() or not alive[layer.reads].any():
                what = "kernel" if not alive[layer.writes].any() else "input channel"
                raise AjpqError(
                    f"every layer must keep at least one kernel and one input, but {layer.name!r} keeps no {what}; "
                    "prune fewer channels"
                )
        for name, ids in network.values.items():
            if name not in skipped.nodes and not alive[ids].any():
                raise AjpqError(
                    f"every tensor must keep at least one channel, but the output of {name!r} keeps none of its "
                    f"{len(ids)}; prune fewer kernels of {', '.join(network.writers_of(ids))}"
                )

    def to_json(self) -> str:
        return json.dumps(
            {
                "weight_bits": {name: bits.tolist() for name, bits in self.weight_bits.items()},
                "act_bits": {name: int(bits) for name, bits in self.act_bits.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> CompressionPolicy:
        """Raises AjpqError where the text is not a policy."""
        try:
            table = json.loads(text)
            weight_bits = {name: np.array(bits) for name, bits in table["weight_bits"].items()}
            whole = {name: bits.ndim == 1 and bits.dtype.kind == "i" for name, bits in weight_bits.items()}
            wrong = [name for name, bits in weight_bits.items() if not whole[name] or not np.isin(bits, WIDTHS).all()]
            if wrong:
                raise AjpqError(
                    f"weight_bits must be lists of widths out of {WIDTHS}, but {wrong[0]!r} is not; mend the "
                    "policy file"
                )
            return cls(
                {name: bits.astype(np.uint8) for name, bits in weight_bits.items()},
                {name: int(bits) for name, bits in table["act_bits"].items()},
            )
        except AjpqError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AjpqError(
                "a policy file must be JSON with weight_bits and act_bits, but it is not "
                f"({type(error).__name__}: {error}); use a policy.json that ajpq wrote"
            ) from error

    def digest(self) -> str:
        """Hexadecimal name of this policy, the same in every process: the memo key."""
        sha = hashlib.sha256()
        for name in sorted(self.weight_bits):
            sha.update(f"{name}:{int(self.act_bits[name])}:".encode())
            sha.update(np.ascontiguousarray(self.weight_bits[name], np.uint8).tobytes())
        return sha.hexdigest()[:16]

    def walk(self, network: Network) -> tuple:
        """Its widths in execution order: sorted by it, policies that begin alike are neighbours."""
        return tuple((self.act_bits[layer.name], self.weight_bits[layer.name].tobytes()) for layer in network.layers)

    def mean_bits(self) -> float:
        """Mean width over all kernels, pruned ones counted as 0."""
        return float(np.concatenate(list(self.weight_bits.values())).mean())
