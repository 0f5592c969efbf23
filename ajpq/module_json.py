"""Leaf modules of torch.nn as plain JSON data and back: a class name and the constructor's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_overloads

import torch
from torch import Tensor, nn

from ajpq.errors import AjpqError
from ajpq.graph_json import decode, encode, name_of, tensors_of

_MODULES = {
    name: cls
    for name, cls in vars(nn).items()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith("torch.nn.modules.")
}


def module_to_json(path: str, module: nn.Module) -> list[Any]:
    """``[class name, arguments]`` of a leaf module of torch.nn; arguments equal to their default are left out."""
    cls = type(module)
    if _MODULES.get(cls.__name__) is not cls:
        raise AjpqError(
            f"a leaf module of a shipped network must be a layer of torch.nn, but {path} is a "
            f"{name_of(cls)}; write it with torch.nn modules so that tracing sees through it"
        )
    kwargs = {}
    declared = next(iter(get_overloads(cls.__init__)), cls.__init__)  # nn.LSTM itself takes *args
    for name, parameter in inspect.signature(declared).parameters.items():
        value = getattr(module, name, parameter.default)
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            value = value is not None  # bias=True became a tensor, bias=False became None
        kept = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        kept &= name not in ("self", "device", "dtype") and value is not parameter.default
        if kept and value != parameter.default:
            kwargs[name] = _encoded(path, value)
    try:
        twin = module_from_json([cls.__name__, kwargs])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise AjpqError(
            f"a leaf module of a shipped network must keep its constructor's arguments as attributes, but {path}, a "
            f"{cls.__name__}, does not ({str(error).splitlines()[0]}); use another layer"
        ) from error
    mine, its = (
        [[(k, t.shape, t.dtype) for k, t in tensors_of(m)], [(k, type(c)) for k, c in m.named_modules()]]
        for m in (module, twin)
    )
    different = [k for k, v in vars(twin).items() if k[0] != "_" and k != "training" and vars(module).get(k) != v]
    hooks = [k for k in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, k)]
    if mine != its or different or hooks:
        raise AjpqError(
            "a leaf module of a shipped network must be what its constructor makes in float32, but "
            f"{path}, a {cls.__name__}, differs in its "
            f"{', '.join(different + hooks) or 'tensors or children'}; undo the change"
        )
    return [cls.__name__, kwargs]


def _encoded(path: str, value: Any) -> Any:
    try:
        return encode(value, lambda node: 0)
    except AjpqError as error:
        raise AjpqError(f"{path}: {error}") from error


def module_from_json(spec: list[Any]) -> nn.Module:
    """The module on the meta device: `set_tensors` gives it its values."""
    name, kwargs = spec
    if name not in _MODULES:
        raise AjpqError(
            f"a leaf module of a packed network must be a layer of torch.nn, but this one asks for "
            f"{str(name)[:80]!r}; do not use the file, or update ajpq and torch"
        )
    with torch.device("meta"):
        return _MODULES[name](**{k: decode(v, lambda distance: None) for k, v in kwargs.items()})


def set_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` in place of the parameters and buffers of these qualified names."""
    parameters = dict(module.named_parameters())
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        setattr(
            module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False) if path in parameters else value
        )
