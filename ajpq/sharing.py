"""One set of weights that serves all policies within a budget, as slimmable (Yu et al., arXiv 1812.08928) and
once-for-all networks (Cai et al., arXiv 1908.09791) have one: trained for a short while, every step under a policy of
its own. With them the accuracy of a policy that was not fine-tuned tells what it would be after it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq.bank import WeightBank
from ajpq.budget import Budget
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.draft import Draft
from ajpq.errors import AjpqError
from ajpq.loaders import Batches
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.recipe import PRECISIONS
from ajpq.space import SearchSpace
from ajpq.surgery import kept_weights
from ajpq.tasks import CLASSIFICATION, Task
from ajpq.training import recalibrate

Draw = Callable[[np.random.Generator], CompressionPolicy]


def check_settings(*, steps: int = 0, lr: float = 0.02, precision: str = "float32", **others) -> None:
    """Raise AjpqError where `share` would not take these settings."""
    if precision not in PRECISIONS:
        raise AjpqError(f"precision of shared weights must be float32 or bfloat16, but it is {precision!r}; choose one")
    if steps < 0 or not 0 < lr < math.inf:
        raise AjpqError(f"`steps >= 0` and `lr > 0` must hold for shared weights, but {steps=} and {lr=}; change them")


def share(
    network: Network, draw: Draw, calibration: Batches, train: Batches, *, steps: int, lr: float = 0.02,
    momentum: float = 0.9, weight_decay: float = 5e-4, distill: float = 0.5, temperature: float = 4.0,
    clip_grad: float = 5.0, precision: str = "float32", seed: int = 0,
    task: Task = CLASSIFICATION, on_step: Callable[[int, float], None] | None = None,
) -> Network:  # fmt: skip
    """The same network with weights that were trained under sampled policies; `network` is not modified.

    Every step draws a policy (e.g. by `sampler`), compresses the present weights by it, and takes one step of SGD
    on what survives: loss (1 - distill) * the task's loss + distill * its divergence from the original network, the
    learning rate falling from `lr` to 0 along a cosine. The statistics of batch-norms are re-estimated at the end.
    calibration: training images in fixed order, for activation steps and those statistics. precision: of the forward
    and backward passes, "float32" or "bfloat16" (autocast). on_step(step, loss): after each, counted from 1.
    Raises AjpqError for bad settings and when the loss is not finite.
    """
    check_settings(steps=steps, lr=lr, precision=precision)
    teacher, module = network.module, copy.deepcopy(network.module)
    shared, ranges = replace(network, module=module), calibrate(network, calibration)
    weights = {name: p.requires_grad_(True) for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(weights.values(), lr=lr, momentum=momentum, nesterov=True, weight_decay=weight_decay)
    rng, stream = np.random.default_rng(seed), _endless(train)
    device = next(iter(weights.values())).device.type
    cast = torch.autocast(device, PRECISIONS[precision], enabled=precision != "float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            policy, (x, y) = draw(rng), next(stream)
            student = compress(shared, policy, ranges, WeightBank(shared)).train()
            with cast:
                outputs = student(x).float()  # (N, ...)
                with torch.no_grad():
                    target = teacher(x).float()
            soft = task.divergences(outputs, target, temperature).mean()
            loss = (1 - distill) * task.losses(outputs, y).mean() + distill * soft
            if not torch.isfinite(loss):
                raise AjpqError(
                    f"the loss of shared weights must stay finite, but it is {loss.item()} at step {step} with {lr=}; "
                    "lower lr"
                )
            loss.backward()
            for weight in weights.values():
                weight.grad = torch.zeros_like(weight)
            _hand_over(student, network, policy, weights)
            nn.utils.clip_grad_norm_(weights.values(), clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimizer.step()
            if on_step is not None:
                on_step(step, loss.item())
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    recalibrate(module, calibration)
    return shared


def sampler(space: SearchSpace, budget: Budget) -> Draw:
    """Draws policies within budget of the kinds that searches see: every third has independent answers, the others are
    nearly homogeneous at a random level of every kind of decision, half of those hardly pruned."""
    return lambda rng: _sample(Draft(space, budget), rng)


def _sample(draft: Draft, rng: np.random.Generator) -> CompressionPolicy:
    kinds = ("sparsity", "act", "width")
    independent, level = rng.random() < 1 / 3, {kind: rng.random() for kind in kinds}
    if rng.random() < 0.5:
        level["sparsity"] = 0.0
    while (decision := draft.decision) is not None:
        options = decision.options
        u = rng.random() if independent else float(np.clip(level[decision.kind] + rng.normal(0, 0.18), 0, 1))
        draft.take(
            options[0] + u * (options[-1] - options[0])
            if decision.kind == "sparsity"
            else options[min(int(u * len(options)), len(options) - 1)]
        )
    return draft.policy()


def _hand_over(
    student: fx.GraphModule, network: Network, policy: CompressionPolicy, weights: Mapping[str, Tensor]
) -> None:
    """Gradients of a compressed network to the weights that it was made of."""
    alive = policy.alive(network)
    norms = {norm.name: torch.from_numpy(np.flatnonzero(alive[norm.channels])) for norm in network.norms}
    for name, parameter in student.named_parameters():
        if parameter.grad is None or name not in weights:  # step sizes are not shared
            continue
        owner, _, kind = name.rpartition(".")
        target = weights[name].grad
        if owner in network:
            kernels, inputs = (torch.from_numpy(part) for part in kept_weights(network[owner], alive))
            if kind == "weight":
                target[kernels[:, None], inputs[None]] = parameter.grad
            else:
                target[kernels] = parameter.grad
        elif owner in norms:
            target[norms[owner]] = parameter.grad
        else:
            target.copy_(parameter.grad)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        some = False
        for x, y, *_ in batches:
            some = True
            yield x, y
        if not some:
            raise AjpqError("shared weights need training images, but the batches hold none; check the training split")
