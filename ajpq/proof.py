"""The last step of tracing: remove channels for a try, and take nothing for granted that does not come out right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.network import Network
from ajpq.surgery import shrink

TOLERANCE = 1e-4  # of the largest output


def proven(network: Network) -> Network:
    """`network`, with every space frozen whose removal changed the outputs of the rest when it was tried.

    Two random halves of all channels are removed. Only if the smaller network then differs from the masked one are the
    spaces tried one by one: a forward that counts its channels, or writes into a view of them, is found this way.
    """
    random = np.random.default_rng(0)
    prunable = [i for i, space in enumerate(network.spaces) if space.prunable]
    if all(faithful(network, _without(network, prunable, random)) for _ in range(2)):
        return network
    bad = {i for i in prunable if not faithful(network, _without(network, [i], random))}
    rest = [i for i in prunable if i not in bad]
    if not all(faithful(network, _without(network, rest, random)) for _ in range(2)):
        bad = set(prunable)
    why = "removing its channels changed other outputs when it was tried"
    spaces = tuple(replace(s, prunable=False, why_not=why) if i in bad else s for i, s in enumerate(network.spaces))
    return replace(network, spaces=spaces)


def _without(network: Network, spaces: list[int], random: np.random.Generator) -> np.ndarray:
    """bool (n_channels,): about half of the channels of these spaces removed, but no tensor's last one."""
    alive = np.ones(network.n_channels, bool)
    for s in spaces:
        alive[network.spaces[s].channels] = random.random(network.spaces[s].size) < 0.5
    for ids in network.groups:
        if not alive[ids].any():
            alive[random.choice(ids)] = True
    return alive


@torch.no_grad()
def faithful(network: Network, alive: np.ndarray) -> bool:
    """Whether the network without its dead channels computes what it computes with them set to zero."""
    expected = masked(network, alive)(network.example.clone())
    try:
        found = shrink(network, alive).forward(network.example.clone())  # a failing __call__ would print
    except Exception:  # whatever the forward makes of fewer channels
        return False
    pairs = list(zip(_tensors(expected), _tensors(found), strict=False))
    return bool(pairs) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=TOLERANCE * _largest(a), equal_nan=True)
        for a, b in pairs
    )


@torch.no_grad()
def masked(network: Network, alive: np.ndarray) -> fx.GraphModule:
    """A copy of the network in which every dead kernel, its bias and its norm entries are zero. Layers that share
    weights do not here, as they do not when they are smaller."""
    module = copy.deepcopy(network.module)
    entries = [(layer.name, layer.writes) for layer in network.layers]
    for name, channels in entries + [(norm.name, norm.channels) for norm in network.norms]:
        part, alive_here = module.get_submodule(name), torch.from_numpy(alive[channels])
        for key, tensor in part.named_parameters(recurse=False):
            rows = alive_here.reshape(-1, *[1] * (tensor.ndim - 1))
            setattr(part, key, nn.Parameter(torch.where(rows, tensor, 0), requires_grad=False))
        if isinstance(part, _BatchNorm) and not part.affine:
            part.running_mean = torch.where(alive_here, part.running_mean, 0)
    return module


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list, dict)):
        for part in out.values() if isinstance(out, dict) else out:
            yield from _tensors(part)


def _largest(t: Tensor) -> float:
    finite = t[torch.isfinite(t)].abs()
    return float(finite.max()) if finite.numel() else 0.0
