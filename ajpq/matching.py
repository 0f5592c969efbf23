"""Batch-norms of a compressed network matched to those of the original, in closed form.

Means and variances are re-estimated, and gain and shift are set so that the output comes as close as it can to that of
the same batch-norm in the original network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.loaders import Batches
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.training import recalibrate


def matched(network: Network) -> dict[str, np.ndarray]:
    """The batch-norms that can be matched to those of the original, those that run once on known channels: name ->
    its channels (C,)."""
    calls = Counter(str(node.target) for node in network.module.graph.nodes if node.op == "call_module")
    return {norm.name: norm.channels for norm in network.norms if calls[norm.name] == 1}


def matching(x: Tensor, goal: Tensor, mean_goal: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C, ...) scaled and shifted to come closest to goal (N, C, ...), per channel: with u = x normalised by its
    own mean and variance, the least squares solution is correlation * u + mean(goal), correlation = mean(u goal).

    goal may hold every s-th row and column of x only, from which the correlation is then estimated. Returns the result,
    and mean, unbiased variance and correlation, (C,) each.
    """
    mean, var = torch.zeros_like(mean_goal), torch.ones_like(mean_goal)
    u = F.batch_norm(x, mean, var, None, None, True, 1.0, eps)
    step = -(-x.shape[2] // goal.shape[2]) if x.ndim == 4 else 1
    seen = u[:, :, ::step, ::step] if step > 1 else u
    correlation = (seen * goal).mean([d for d in range(x.ndim) if d != 1])
    shape = (1, -1, *([1] * (x.ndim - 2)))
    return torch.addcmul(mean_goal.view(shape), u, correlation.view(shape)), mean, var, correlation


def outputs(network: Network, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """What the modules `names` of a network put out for one batch: name -> (N, C, ...)."""
    found: dict[str, Tensor] = {}

    def keeper(name: str):
        return lambda module, args, y: found.__setitem__(name, y.detach().clone())

    handles = [network.module.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        with torch.no_grad():
            network.module(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def match(student: fx.GraphModule, original: Network, policy: CompressionPolicy, batches: Batches) -> None:
    """Set statistics, gain and shift of the student's batch-norms to match those of the original, in place.

    One pass: later layers see the corrected output of earlier ones. All are means over batches, as in
    `training.recalibrate`, which sets the statistics; batch-norms that run more than once keep gain and shift.
    """
    alive, skipped = policy.alive(original), policy.skipped(original)
    kept = {
        name: torch.from_numpy(alive[channels].nonzero()[0])
        for name, channels in matched(original).items()
        if name not in skipped.norms and isinstance(student.get_submodule(name), _BatchNorm)
    }
    goals: dict[str, Tensor] = {}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in kept}

    def hook(name: str):
        def instead(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            goal = goals[name]
            shift = goal.mean([d for d in range(goal.ndim) if d != 1])
            y, _, _, correlation = matching(args[0], goal, shift, module.eps)
            found[name].append((correlation, shift))
            return y

        return instead

    def stream():
        for x, y, *_ in batches:
            goals.update({name: z[:, kept[name]] for name, z in outputs(original, kept, x).items()})
            yield x, y

    handles = [student.get_submodule(name).register_forward_hook(hook(name)) for name in kept]
    try:
        recalibrate(student, stream())
    finally:
        for handle in handles:
            handle.remove()
    for name, columns in found.items():
        correlation, shift = (torch.stack(column).mean(0) for column in zip(*columns, strict=True))
        norm = student.get_submodule(name)
        norm.weight, norm.bias, norm.affine = nn.Parameter(correlation), nn.Parameter(shift), True
