"""Whole networks in int8 that a latency table is fitted to: pruned at random, each of its spaces to whole blocks."""

from __future__ import annotations

import numpy as np
import torch

from ajpq.calibration import Calibration
from ajpq.compression import compress, freeze
from ajpq.cost import inputs_per_kernel
from ajpq.latency_table import BLOCK
from ajpq.network import Network
from ajpq.onnx_export import to_onnx
from ajpq.policy import CompressionPolicy

SEED = 20201  # of the draws, so that a build goes on with the same ones
TRIES = 20  # draws for every network that is wanted, as small networks have few sizes
LEAST = 0.125  # share of its channels that a space keeps
IMAGES = 8
INT8 = 8


def unpruned(network: Network) -> CompressionPolicy:
    """8 bits everywhere."""
    return CompressionPolicy.homogeneous(network, INT8, INT8)


def pruned_networks(network: Network, n: int) -> dict[str, CompressionPolicy]:
    """Key of a table -> a policy of 8 bits and 0; how much is pruned differs from one to the next, and within each from
    space to space. Fewer, or none, for a network that cannot be pruned in so many ways."""
    shapes, found = [channels_of(network, unpruned(network))], {}
    for i in range(TRIES * n):
        if len(found) == n:
            break
        policy = drawn(network, np.random.default_rng([SEED, i]))
        if (shape := channels_of(network, policy)) not in shapes:
            shapes.append(shape)
            found[f"pruned {len(found)}"] = policy
    return found


def drawn(network: Network, random: np.random.Generator, block: int = BLOCK) -> CompressionPolicy:
    """A policy of 8 bits and 0: whole blocks of every space, how many is drawn, and all of a space without which
    something could have nothing left."""
    least, alive = random.uniform(LEAST, 1), np.ones(network.n_channels, bool)
    for space in network.spaces:
        if space.prunable:
            kept = int(np.ceil(random.uniform(least, 1) * space.size / block) * block)
            alive[random.permutation(space.channels)[kept:]] = False
    for channels in network.groups:
        if not alive[channels].any():
            for s in np.unique(network.space_of[channels]):
                alive[network.spaces[s].channels] = True
    bits = {layer.name: np.where(alive[layer.writes], INT8, 0).astype(np.uint8) for layer in network.layers}
    return CompressionPolicy(bits, dict.fromkeys(bits, INT8))


def channels_of(network: Network, policy: CompressionPolicy) -> dict[str, tuple[int, int]]:
    """Layer name -> inputs of a kernel and kernels."""
    alive = policy.alive(network)
    return {layer.name: (inputs_per_kernel(layer, alive), int(alive[layer.writes].sum())) for layer in network.layers}


def noise(network: Network) -> torch.Tensor:
    """Images that set the ranges of 8-bit networks."""
    return torch.randn(IMAGES, *network.example.shape[1:], generator=torch.Generator().manual_seed(0))


def int8_onnx(network: Network, policy: CompressionPolicy, ranges: Calibration) -> bytes:
    """A network of 8 bits and 0 as an ONNX file."""
    return to_onnx(freeze(compress(network, policy, ranges)), noise(network))
