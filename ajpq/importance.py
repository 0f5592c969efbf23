"""How much a kernel matters. A criterion is one callable, higher = keep:
(network, batches of training images) -> {layer name: float64 (c_out,)};
the layer controller (what to prune) and the channel controller (which kernels share a width) follow the same one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ajpq.data import Batches
from ajpq.network import Network

Importance = Callable[[Network, Batches], Mapping[str, np.ndarray]]


def _gains(network: Network) -> dict[str, np.ndarray]:
    """|gamma / sigma| of the norm folded into each layer, (c_out,)."""
    found = {}
    for norm in network.norms:
        if norm.folds_into is not None:
            module = network.module.get_submodule(norm.name)
            gain = (module.running_var + module.eps).rsqrt()
            gain = gain if module.weight is None else gain * module.weight
            found[norm.folds_into] = gain.detach().abs().double().cpu().numpy()
    return found


def magnitude(network: Network, batches: Batches = ()) -> dict[str, np.ndarray]:
    """Sum of |W| of a kernel (AMC, He et al. 2018), taken after folding the batch-norm, as the kernel will be
    shipped.
    """
    gains = _gains(network)
    scores = {}
    for layer in network.layers:
        weight = network.module.get_submodule(layer.name).weight.detach().double()
        scores[layer.name] = weight.abs().flatten(1).sum(1).cpu().numpy() * gains.get(layer.name, 1.0)
    return scores


def bn_scale(network: Network, batches: Batches = ()) -> dict[str, np.ndarray]:
    """|gamma| of the batch-norm behind a kernel (network slimming, Liu et al. 2017); layers without one fall back to
    `magnitude`.
    """
    scores = magnitude(network)
    for norm in network.norms:
        if norm.folds_into is not None and (gamma := network.module.get_submodule(norm.name).weight) is not None:
            scores[norm.folds_into] = gamma.detach().abs().double().cpu().numpy()
    return scores


def of_channels(network: Network, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 (n_channels,): the mean over a channel's writers of each kernel's share of its layer's mean score."""
    total, count = np.zeros(network.n_channels), np.zeros(network.n_channels)
    for layer in network.layers:
        score = scores[layer.name]
        np.add.at(total, layer.writes, score / max(score.mean(), 1e-12))
        np.add.at(count, layer.writes, 1)
    return total / np.maximum(count, 1)
