"""Distillation of features: a compressed network learns the original's inner tensors on its surviving channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.blocks import blocks_of
from ajpq.network import Network
from ajpq.policy import CompressionPolicy


def survivors(network: Network, policy: CompressionPolicy) -> dict[str, Tensor]:
    """Layers whose inputs are worth comparing -> the channels of their inputs that survive, int64 (n,).

    Our choice: every set of channels but the image's as the first layer that reads it sees it (so of a depthwise layer
    the input, not the output), every block's output, as the layer after the block reads it, and the input of the last
    layer. Blocks are those of `blocks.blocks_of` that have several layers. Layers that are skipped read nothing.
    """
    alive, skipped = policy.alive(network), policy.skipped(network)
    layers = [layer for layer in network.layers if layer.name not in skipped.layers]
    first = {layer.reads.tobytes(): layer.name for layer in reversed(layers)}
    first.pop(layers[0].reads.tobytes())
    there = [[name for name in block if name not in skipped.layers] for block in blocks_of(network)]
    blocks = [block for block in there if block]
    after = [block[0] for before, block in zip(blocks, blocks[1:], strict=False) if len(before) > 1]
    chosen = {*first.values(), *after, layers[-1].name}
    names = [layer.name for layer in layers if layer.name in chosen]
    return {name: torch.from_numpy(np.flatnonzero(alive[network[name].reads])) for name in names}


class Features:
    """Compares what layers of two networks read, while used as a context.

    kept: layer name -> the teacher's channels that the student has, int64 (n,); see `survivors`. weight: of `loss`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, kept: Mapping[str, Tensor], weight: float) -> None:
        self.student, self.teacher, self.kept, self.weight = student, teacher, kept, weight
        self._seen: dict[tuple[str, str], Tensor] = {}  # of the last call of a layer
        self._handles: list = []

    def __enter__(self) -> Features:
        for who, model in (("student", self.student), ("teacher", self.teacher)):
            for name in self.kept:
                hook = self._hook((who, name))
                self._handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()

    def loss(self) -> Tensor:
        """weight * the mean over layers of ``mean (s - t)^2 / mean t^2``, for the last batch that both networks saw:
        0 where they agree, `weight` for a student of zeros. Layers whose teacher reads zeros only count as 0. ()"""
        found = []
        for name, kept in self.kept.items():
            s, t = self._seen["student", name].float(), self._seen["teacher", name]  # (N, n, ...), (N, C, ...)
            channels = -1 if isinstance(self.teacher.get_submodule(name), nn.Linear) else 1
            t = t.index_select(channels, kept.to(t.device)).float()
            size = torch.linalg.vector_norm(t).square() / t.numel()
            found.append(F.mse_loss(s, t) / torch.where(size > 0, size, torch.inf))
        return self.weight * torch.stack(found).mean()

    def _hook(self, key: tuple[str, str]):
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._seen[key] = args[0] if args else next(iter(kwargs.values()))

        return keep
