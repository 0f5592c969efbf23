"""Operations that only move elements: run them on an index tensor, read off what became of every channel, and decide
how surgery can re-emit them for fewer channels. What cannot be re-emitted is reported, and its channels are not
pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ajpq.channels import Value
from ajpq.network import Move

SIZED = frozenset("view reshape expand".split())  # operations whose arguments are the sizes of their output


def index_of(value: Value) -> Tensor:
    """int64, the value's shape: the flat index of every element in its root."""
    if value.index is not None:
        return torch.from_numpy(value.index)
    return torch.arange(int(np.prod(value.shape))).reshape(value.shape)


def moved(value: Value, root: Value, index: Tensor) -> Value | None:
    """The value that results from moving `value` so that its elements are `index`; None if batch and channels mix."""
    per_image = int(np.prod(root.shape[1:]))
    if index.ndim < 2 or index.shape[0] != root.shape[0]:
        return None
    batch = torch.arange(len(index)).reshape(-1, *([1] * (index.ndim - 1)))
    if not torch.equal(index // per_image, batch.expand_as(index)):
        return None
    inside = (index[0] % per_image).numpy()
    if root.cells is not None:
        cells = root.cells.reshape(-1)[inside]
    else:
        cells = root.ids[inside // int(np.prod(root.shape[2:]))]
    out = Value(tuple(index.shape), None, value.zero, value.root, index.numpy(), cells)
    if out.axis == 1:
        out.ids = out.along_axis
    return out


def with_size(args: tuple, kwargs: dict, name: str, axis: int, size: int, old: int | None = None) -> tuple[tuple, dict]:
    """Arguments of a sized operation with the literal at `axis` replaced; node references and -1 are left alone."""
    if name not in SIZED:
        return args, kwargs
    listed = len(args) > 1 and isinstance(args[1], (tuple, list))
    sizes = list(args[1] if listed else args[1:])
    if axis < len(sizes) and isinstance(sizes[axis], int) and sizes[axis] != -1 and old in (None, sizes[axis]):
        sizes[axis] = size
    return (args[0], tuple(sizes)) if listed else (args[0], *sizes), kwargs


def plan(
    node: fx.Node,
    name: str,
    run: Callable[[Tensor, tuple, dict], Any],
    args: tuple,
    kwargs: dict,
    source: Value | None,
    out: Value,
    root: Value,
) -> Move | None:
    """How to re-emit `node`, or None. `source` is the node's tensor input (None when it reads a tuple of tensors)."""
    index = torch.from_numpy(out.index)
    if out.ids is not None:
        if (
            index.numel() == int(np.prod(root.shape))
            and torch.equal(index.reshape(-1), torch.arange(index.numel()))
            and index.ndim == 2
        ):
            return Move("flatten", out.root)
        if index.ndim == len(root.shape) and index.shape[2:] == root.shape[2:] and root.ids is not None:
            spatial = int(np.prod(root.shape[2:]))
            inside = index[0].reshape(index.shape[1], -1) % int(np.prod(root.shape[1:]))
            straight = torch.equal(inside % spatial, torch.arange(spatial).expand_as(inside))
            if straight and bool((inside // spatial == inside[:, :1] // spatial).all()):
                return Move("gather", out.root, (inside[:, 0] // spatial).numpy())
    if (
        source is not None
        and out.axis is not None
        and source.axis is not None
        and _resizable(name, run, args, kwargs, source, out)
    ):
        return Move("resize", out.root, axis=out.axis, channels=out.along_axis)
    return None


def _resizable(
    name: str, run: Callable[[Tensor, tuple, dict], Any], args: tuple, kwargs: dict, source: Value, out: Value
) -> bool:
    """Whether the operation, run on fewer channels, gives exactly the surviving part of its output. Tried on
    subsets.
    """
    before, after = source.along_axis, out.along_axis
    assert before is not None and after is not None and source.axis is not None and out.axis is not None
    distinct = np.unique(before)
    if len(distinct) == 1:
        return True
    index_in, index_out = index_of(source), torch.from_numpy(out.index)
    for gone in (distinct[:1], distinct[-1:], distinct[::2], distinct[: len(distinct) // 2]):
        keep_in = torch.from_numpy(np.flatnonzero(~np.isin(before, gone)))
        keep_out = torch.from_numpy(np.flatnonzero(~np.isin(after, gone)))
        small_args, small_kwargs = with_size(args, kwargs, name, out.axis, len(keep_out), len(after))
        try:
            small = run(index_in.index_select(source.axis, keep_in), small_args, small_kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        if not isinstance(small, Tensor) or not torch.equal(small, index_out.index_select(out.axis, keep_out)):
            return False
    return True
