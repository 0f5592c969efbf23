"""Whole networks in int8 that a latency table is fitted to: pruned at random, each of its spaces to whole blocks."""

from __future__ import annotations

import numpy as np
import torch

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.cost import inputs_per_kernel
from ajpq.latency_table import BLOCK
from ajpq.network import Network
from ajpq.onnx_export import to_onnx
from ajpq.padding import pad, padded_alive
from ajpq.policy import CompressionPolicy

SEED = 20201  # of the draws, so that a build goes on with the same ones
LEAST = 0.125  # share of its channels that a space keeps
IMAGES = 8  # of noise, to set the ranges of 8-bit networks
INT8 = 8


def unpruned(network: Network) -> CompressionPolicy:
    """8 bits everywhere."""
    return CompressionPolicy.homogeneous(network, INT8, INT8)


def pruned_networks(network: Network, n: int) -> dict[str, CompressionPolicy]:
    """Key of a table -> a policy of 8 bits and 0; how much is pruned differs from one to the next, and within each from
    space to space. None for a network that cannot be pruned."""
    if not network.prunable.any():
        return {}
    return {f"pruned {i}": _drawn(network, np.random.default_rng([SEED, i])) for i in range(n)}


def _drawn(network: Network, random: np.random.Generator) -> CompressionPolicy:
    least, alive = random.uniform(LEAST, 1), np.ones(network.n_channels, bool)
    for space in network.spaces:
        if space.prunable:
            kept = int(np.ceil(random.uniform(least, 1) * space.size / BLOCK) * BLOCK)
            alive[random.permutation(space.channels)[kept:]] = False
    bits = {layer.name: np.where(alive[layer.writes], INT8, 0).astype(np.uint8) for layer in network.layers}
    policy = CompressionPolicy(bits, dict.fromkeys(bits, INT8))
    policy.validate(network)
    return policy


def channels_of(network: Network, policy: CompressionPolicy) -> dict[str, tuple[int, int]]:
    """Layer name -> inputs of a kernel and kernels of `int8_onnx`."""
    alive = padded_alive(network, policy, BLOCK)
    return {layer.name: (inputs_per_kernel(layer, alive), int(alive[layer.writes].sum())) for layer in network.layers}


def int8_onnx(network: Network, policy: CompressionPolicy) -> bytes:
    """A network of 8 bits and 0 as an ONNX file, its channels in whole blocks; ranges are those of noise."""
    shape = network.example.shape[1:]
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    final = freeze(compress(network, policy, calibrate(network, [(images, None)])))
    return to_onnx(pad(final, network, policy, BLOCK), images)
