"""Models that are wrapped, or whose weights are computed from other tensors in every forward pass, as plain layers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with the same outputs in which parametrizations, `torch.nn.utils.prune`'s masks and the old hooks of
    weight_norm and spectral_norm are gone, and what they compute is a parameter; parts that torch.compile or
    DataParallel have wrapped are bare, SyncBatchNorm, which trains on GPUs alone, is BatchNorm2d, and numbers of numpy
    are Python's."""
    model = unwrapped(model)
    computed = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    private = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for module in list(private.modules()):
        for name, value in vars(module).items():
            vars(module)[name] = _number(value)
        for name, child in module._modules.items():
            module._modules[name] = child if child is None else unwrapped(child)
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = nn.BatchNorm2d
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            # torch's own way to remove them changes the class, which the model that was copied has too
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    return private


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what torch.compile and data parallel training make of it."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inside := getattr(module, "_orig_mod", None), nn.Module):
            module = inside
        else:
            return module


def _number(value: Any) -> Any:
    if isinstance(value, np.number):
        return value.item()
    return tuple(map(_number, value)) if type(value) is tuple else value
