"""A policy as a list of steps with their weights bound. Every value has a key, a digest of all that it depends on (the
operations, kernels, widths and survivors before it), so equal keys are equal tensors, whichever policy they come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.matching import matching
from ajpq.scoring.kernels import Floats


class Norm:
    """A batch-norm over the surviving channels: its own statistics, until others are set. goals: of every batch of
    `norm_data` what it should put out, all channels, and their means, where it is to match the original's."""

    def __init__(
        self, module: nn.Module, kept: Tensor, arithmetic: Floats, goals: list[tuple[Tensor, Tensor]] | None
    ) -> None:
        def part(tensor: Tensor | None, default: float) -> Tensor:
            chosen = torch.full((len(kept),), default) if tensor is None else tensor.detach()[kept]
            return chosen.to(arithmetic.device, arithmetic.dtype)

        self.weight, self.bias, self.eps = part(module.weight, 1.0), part(module.bias, 0.0), module.eps
        self.mean, self.var = part(module.running_mean, 0.0), part(module.running_var, 1.0)
        whole = goals is None or len(kept) == module.num_features
        self.goals, self.kept = goals, slice(None) if whole else kept.to(arithmetic.device)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gain and shift, (C,) each."""
        gain = self.weight / (self.var + self.eps).sqrt()
        return gain, self.bias - self.mean * gain

    def batch(self, x: Tensor, number: int) -> tuple[Tensor, ...]:
        """x normalised by its own statistics, and what `set` takes the mean over batches of."""
        if self.goals is not None:
            goal, shift = (t[:, self.kept] if t.ndim > 1 else t[self.kept] for t in self.goals[number])
            return *matching(x, goal, shift, self.eps), shift
        mean, var = torch.zeros_like(self.mean), torch.ones_like(self.var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps), mean, var

    def set(self, mean: Tensor, var: Tensor, *gain_and_shift: Tensor) -> None:
        self.mean, self.var = mean, var
        if gain_and_shift:
            self.weight, self.bias = gain_and_shift


@dataclass(eq=False)
class Step:
    """run: the values it reads -> its value. norm: the batch-norm in it; observe: (number of a batch of `norm_data`,
    values) -> its value, normalised by what the batch tells, and that as well. cheap: faster to compute again than to
    keep."""

    out: str
    reads: tuple[str, ...]
    key: bytes
    run: Callable[..., Any]
    norm: str | None = None
    observe: Callable[..., tuple[Any, ...]] | None = None
    fold: Callable[[], None] | None = None  # takes the norm's statistics into the step
    work: float = 0.0  # multiply-accumulates per image
    cheap: bool = False


@dataclass(eq=False)
class Program:
    steps: list[Step]
    input: str
    output: str
    norms: Mapping[str, Norm]
    keys: Mapping[str, bytes]  # value -> its digest
    live: list[tuple[str, ...]] = field(init=False)  # before every step: the values, beside the input, still needed
    dead: list[tuple[str, ...]] = field(init=False)  # after every step: the values not needed any more

    def __post_init__(self) -> None:
        last = {self.output: len(self.steps)}
        for i, step in enumerate(self.steps):
            for name in step.reads:
                last[name] = max(i, last.get(name, 0))
        made, self.live, self.dead = set(), [], []
        for i, step in enumerate(self.steps):
            self.live.append(tuple(name for name in made if last.get(name, -1) >= i))
            made.add(step.out)
            self.dead.append(tuple(name for name in (*step.reads, step.out) if last.get(name, -1) <= i))

    def statistics_key(self, norm: str) -> bytes:
        return digest(*(step.key for step in self.steps if step.norm == norm))


def digest(*parts: bytes | str) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()
