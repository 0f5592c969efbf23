"""What a network puts out inside, at some positions, and its run node by node: for solving layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ajpq.errors import AjpqError
from ajpq.image_order import channels_last
from ajpq.loaders import Batches
from ajpq.matching import matched
from ajpq.network import Network
from ajpq.training import device_of

LEAST, MOST = 2048, 8192  # see `samples_of`
MEMORY = 2**31  # bytes for the activations of all images together, from one node to the next


class Goals:
    """What layers and batch-norms of the original put out for the first images of `batches`, each at some positions.

    images: the images themselves, (N, C, H, W) of every batch. channels: of every module that has goals, int64 (C,).
    The positions are drawn for every batch and module, as many in all as `samples_of` says, or all there are. Raises
    AjpqError if there is no image.
    """

    @torch.no_grad()
    def __init__(self, original: Network, batches: Batches, images: int | None = 400, seed: int = 0) -> None:
        calls = Counter(map(called, original.module.graph.nodes))
        self.channels = {layer.name: layer.writes for layer in original.layers} | matched(original)  # (C,) each
        self.channels = {name: channels for name, channels in self.channels.items() if calls[name] == 1}
        self.images = _affordable(original.module, batches, images)
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.channels}
        self._random, self._count = torch.Generator().manual_seed(seed), sum(map(len, self.images))
        handles = [original.module.get_submodule(n).register_forward_hook(self._hook(n)) for n in self.channels]
        try:
            for x in self.images:
                original.module(x)
        finally:
            for handle in handles:
                handle.remove()

    def of(self, name: str, alive: np.ndarray, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Of every batch the positions, int64 (p,), rows of the output one after another, and the surviving outputs
        there, (N, p, c)."""
        rows = torch.from_numpy(alive[self.channels[name]].nonzero()[0])
        return [(at.to(device), y[:, :, rows.to(y.device)].to(device)) for at, y in self._found[name]]

    def _hook(self, name: str):
        def keep(module: nn.Module, args: Any, y: Tensor) -> None:
            linear, norm = isinstance(module, nn.Linear), isinstance(module, _BatchNorm)
            flat = y.reshape(len(y), -1, y.shape[-1]) if linear else rows_of(y)  # (N, positions, C)
            samples = samples_of(1 if norm else module.weight[0].numel())
            wanted = min(-(-samples // self._count), flat.shape[1])
            at = torch.randperm(flat.shape[1], generator=self._random)[:wanted].sort().values
            self._found[name].append((at, flat[:, at.to(y.device)]))

        return keep


def samples_of(weights: int) -> int:
    """Images times output positions that a kernel of so many weights is fitted to: 16 per weight between 2,048 and
    8,192, and at least 2. Our choice."""
    return max(LEAST, min(MOST, 16 * weights), 2 * weights)


class Stages:
    """Runs all batches through a graph node by node: iterating gives every node before it runs."""

    def __init__(self, network: fx.GraphModule, images: list[Tensor]) -> None:
        self.interpreter, self.nodes = fx.Interpreter(network), list(network.graph.nodes)
        self.environments: list[dict[fx.Node, Any]] = [{} for _ in images]
        self.images = images

    def values(self, node: fx.Node) -> list[Any]:
        return [environment[node] for environment in self.environments]

    def __iter__(self) -> Iterator[fx.Node]:
        last = {read: node for node in self.nodes for read in node.all_input_nodes}
        for node in self.nodes:
            if node.op == "output":
                return
            yield node
            for x, environment in zip(self.images, self.environments, strict=True):
                self.interpreter.env = environment
                environment[node] = x if node.op == "placeholder" else self.interpreter.run_node(node)
                for read in node.all_input_nodes:
                    if last[read] is node:
                        del environment[read]

    def bytes(self) -> int:
        """Of all values that are still to be read."""
        found = tree_leaves([list(environment.values()) for environment in self.environments])
        return sum(t.numel() * t.element_size() for t in found if isinstance(t, Tensor))


def _affordable(module: fx.GraphModule, batches: Batches, images: int | None) -> list[Tensor]:
    """The first images, on the device of the module, as many as their activations fit into MEMORY."""
    device = device_of(module)
    found, left = [], images
    for x, *_ in batches:
        if not found:
            stages = Stages(module, [x[:1].to(device)])
            most = max(MEMORY // max(stages.bytes() for _ in stages), 1)
            left = most if left is None else min(left, most)
        if left <= 0:
            break
        found.append(channels_last(x[:left].to(device)))
        left -= len(x)
    if not sum(map(len, found)):
        raise AjpqError("Reconstruction needs at least one image, but there is none: check the calibration split.")
    return found


def rows_of(x: Tensor) -> Tensor:
    """(N, C, ...) -> (N, positions, C)."""
    return x.flatten(2).mT if x.ndim > 2 else x[:, None]


def called(node: fx.Node) -> str:
    """The module that a node calls, or nothing."""
    return str(node.target) if node.op == "call_module" else ""
