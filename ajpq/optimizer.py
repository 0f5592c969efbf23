"""How a training steps: three kinds of parameters, SGD or Adam, and a learning rate that rises and falls."""

from __future__ import annotations

import math

import torch
from torch import nn

from ajpq.errors import AjpqError

OPTIMIZERS = ("sgd", "adam")


def optimizer_of(
    kind: str, model: nn.Module, lr: float, momentum: float, weight_decay: float, scale_lr: float
) -> torch.optim.Optimizer:
    """Of kind "sgd", with Nesterov momentum, or "adam": AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), where
    `momentum` is the first of two decay rates.

    Both over three groups, whose `factor` their learning rates are multiplied by. Parameters of two or more dimensions
    decay, the others do not, unless their module says otherwise: `parameter_kinds`, a mapping from names of its
    parameters to "decayed", "plain" or "steps", step sizes that do not decay and have the factor `scale_lr`. Raises
    AjpqError if nothing can be trained.
    """
    groups: dict[str, dict] = {
        "decayed": {"params": [], "weight_decay": weight_decay, "factor": 1.0},
        "plain": {"params": [], "weight_decay": 0.0, "factor": 1.0},
        "steps": {"params": [], "weight_decay": 0.0, "factor": scale_lr},
    }
    seen: set[int] = set()
    for module in model.modules():
        kinds = getattr(module, "parameter_kinds", {})
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                groups[kinds.get(name, "decayed" if p.ndim > 1 else "plain")]["params"].append(p)
                seen.add(id(p))
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise AjpqError(
            "Training needs at least one parameter that requires a gradient, but the model has none: "
            "unfreeze it or use epochs=0."
        )
    if kind == "adam":
        return torch.optim.AdamW(filled, lr=lr, betas=(momentum, 0.999))
    return torch.optim.SGD(filled, lr=lr, momentum=momentum, nesterov=momentum > 0)


def rate(step: int, steps: int, lr: float, warmup: float) -> float:
    """The learning rate of a step, counted from 0: linear to `lr` over the fraction `warmup` of all steps, then along a
    cosine to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    rise = round(warmup * steps)
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(steps - rise, 1), 1.0)))
