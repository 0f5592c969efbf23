"""Operations that keep channels where they are, merge them or list them: one rule each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import ops
from ajpq.channels import Value, flat
from ajpq.network import Move

if TYPE_CHECKING:
    from ajpq.walk import Walk


def channelwise(
    walk: Walk,
    node: fx.Node,
    module: nn.Module | None,
    name: str,
    args: tuple,
    kwargs: dict,
    inputs: list[Value],
    out: Any,
) -> bool:
    """Operations that keep channels where they are, merge or list them. False if this is none of them."""
    if not isinstance(out, Tensor) or any(value.ids is None and not value.planned for value in inputs):
        return False
    first = inputs[0]
    scalar_const = all(t.numel() == 1 for t in _constants(walk, node))
    if name in ops.ELEMENTWISE or (len(inputs) == 1 and name in (ops.MERGE | ops.DIVIDE) and scalar_const):
        if (
            len(inputs) > 1
            or out.shape != first.shape
            or (name == "prelu" and module is not None and module.weight.numel() > 1)
        ):
            return False
        zero = first.zero and _keeps_zero(walk, node, args, kwargs, first.shape)
        if first.ids is None:
            walk.set_cells(node, out, first.cells, zero)
        else:
            walk.set(node, out, first.ids, zero)
    elif any(value.ids is None for value in inputs):
        return False
    elif name in ops.SPATIAL:
        if out.ndim != len(first.shape) or out.shape[1] != first.shape[1]:
            return False
        walk.set(node, out, first.ids, first.zero)
    elif name in ops.MERGE and len(inputs) == len(node.all_input_nodes) and kwargs.get("alpha", 1) == 1:
        return _merge(walk, node, name, inputs, out)
    elif name in ops.CONCAT:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.ndim
        given = node.args[0] if node.args else node.kwargs.get("tensors", ())
        nodes = [given] if isinstance(given, fx.Node) else given  # one node that gives a list, or a list of nodes
        listed = [value for n in nodes for value in flat(walk.values.get(n.name))]
        if dim == 0 or len(listed) != len(args[0] if args else kwargs.get("tensors", ())):
            return False
        if dim != 1:
            for value in listed[1:]:
                walk.sets.unite(first.ids, value.ids)
        ids = np.concatenate([value.ids for value in listed]) if dim == 1 else first.ids
        walk.set(node, out, ids, all(value.zero for value in listed))
    elif name in ops.EXPAND:
        other = inputs[-1]
        if len(inputs) > 2 or out.shape != other.shape or len(first.ids) != len(other.ids):
            return False
        walk.sets.unite(first.ids, other.ids)
        walk.set(node, out, first.ids, first.zero)
    elif name in ops.PAD:
        return _pad(walk, node, module, args, kwargs, first, out)
    elif name in ops.REDUCE:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        if dims is None or any(d % len(first.shape) < 2 for d in dims):
            return False
        walk.set(node, out, first.ids, first.zero)
    else:
        return False
    return True


def _merge(walk: Walk, node: fx.Node, name: str, inputs: list[Value], out: Tensor) -> bool:
    if len(inputs) == 1:  # x + x, x * x
        inputs = inputs * 2
    a, b = inputs
    if (
        len(inputs) != 2
        or len(a.shape) != len(b.shape)
        or a.shape[0] != b.shape[0]
        or out.shape[1] != max(a.shape[1], b.shape[1])
    ):
        return False
    zero = (a.zero or b.zero) if name.strip("i") in ("mul", "multiply") else (a.zero and b.zero)
    if a.shape[1] == b.shape[1]:
        walk.sets.unite(a.ids, b.ids)
        walk.set(node, out, a.ids, zero)
    else:
        one, many = (a, b) if a.shape[1] == 1 else (b, a)
        walk.sets.freeze(one.ids, f"{node.name} broadcasts it over channels")
        walk.set(node, out, many.ids, many.zero if "mul" in name else False)
    return True


def _pad(
    walk: Walk, node: fx.Node, module: nn.Module | None, args: tuple, kwargs: dict, value: Value, out: Tensor
) -> bool:
    if module is not None:
        pads, fill, mode = list(module.padding), getattr(module, "value", 0), "constant"
    else:
        pads = list(kwargs.get("pad", args[1] if len(args) > 1 else ()))
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        fill = kwargs.get("value", args[3] if len(args) > 3 else 0) or 0
    pads += [0] * (2 * out.ndim - len(pads))
    channel = pads[2 * (out.ndim - 2) : 2 * (out.ndim - 1)]  # pads are listed from the last dimension backwards
    if any(pads[2 * (out.ndim - 1) :]) or min(channel) < 0:
        return False
    if not any(channel):
        walk.set(node, out, value.ids, value.zero and (fill == 0 or mode != "constant"))
        return True
    if mode != "constant" or fill != 0:
        return False
    before, after = (walk.sets.fresh(n) for n in channel)
    walk.set(node, out, np.concatenate([before, value.ids, after]), value.zero)
    walk.moves[node.name] = Move("pad", value.root, np.array(pads))
    return True


def _constants(walk: Walk, node: fx.Node) -> list[Tensor]:
    found = [walk.env[n] for n in node.all_input_nodes if n.name not in walk.values and n in walk.env]
    return [t for t in found if isinstance(t, Tensor)]


def _keeps_zero(walk: Walk, node: fx.Node, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> bool:
    def swap(a: Any) -> Any:
        return torch.zeros(shape) if isinstance(a, Tensor) and tuple(a.shape) == shape else a

    return not bool(
        getattr(walk, node.op)(node.target, tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}).any()
    )
