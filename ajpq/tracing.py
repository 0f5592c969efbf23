"""`trace(model, example)`: any torch.fx-traceable CNN -> `Network`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ajpq.bitstream import words_of
from ajpq.channels import Value
from ajpq.errors import AjpqError
from ajpq.network import Network, NormSpec, Space
from ajpq.plain import plain_copy, unwrapped
from ajpq.proof import proven
from ajpq.symbolic import symbolic
from ajpq.tidying import tidy
from ajpq.walk import Walk


def trace(model: nn.Module, example: Tensor) -> Network:
    """Prove which channels of `model` belong together.

    model: any module that torch.fx can trace with one tensor argument, further ones having their defaults; a copy is
    taken to the CPU, the model is not modified.
    example: float (N, C, H, W), one input of the size the network will see.
    Raises AjpqError if a weight is not finite or not float32, torch.fx cannot trace the module, or it has no conv or
    linear layer.
    """
    model = unwrapped(model)
    _check(model)
    private = plain_copy(model).cpu().eval().requires_grad_(False)
    module = symbolic(private)
    tidy(module)
    example = example.detach()[:2].float().cpu()
    example = example if len(example) == 2 else example.repeat(2, *([1] * (example.ndim - 1)))
    walk = Walk(module)
    try:
        with torch.no_grad():
            walk.run(example)
    except AjpqError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if walk.fault is not None:
            raise
        raise AjpqError(
            f"{type(model).__name__} must accept the example input, but an input of shape "
            f"{tuple(example.shape)} gives: "
            f"{str(error).strip().splitlines()[0]}; pass an example as the network will see it"
        ) from error
    if not walk.layers:
        raise AjpqError(
            f"a network must have a Conv2d or Linear module that its forward calls, but {type(model).__name__} "
            "has none (F.conv2d is invisible as a layer, and so is a subclass with a forward of its own); use modules"
        )
    return proven(assemble(walk, private, example))


def _check(model: nn.Module) -> None:
    """Raises AjpqError for models that are known not to be traceable, or whose weights nothing can be made of."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise AjpqError(
                f"a network must be made of Python modules, but {name or 'it'} is a {type(module).__name__}, compiled "
                "by torch.jit; give the module that it was made from"
            )
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise AjpqError(f"parameters must have their shapes, but {name!r} has none yet; call the model once before")
        if tensor.dtype != torch.float32 and (tensor.is_floating_point() or tensor.is_complex()):
            raise AjpqError(
                f"parameters must be float32, but {name!r} is {tensor.dtype}; call model.float(), and give float32 "
                "images"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AjpqError(
                f"weights must be finite, but {name!r} has {int((~torch.isfinite(tensor)).sum())} NaN or inf values "
                "of " + f"{tensor.numel()}; load another checkpoint or train with a lower learning rate"
            )


def assemble(walk: Walk, original: nn.Module, example: Tensor) -> Network:
    """The network that a finished walk over `original` has seen."""
    sets = walk.sets
    for name in walk.norm_nodes:  # a norm called several times cannot be folded into one layer
        sets.note(sets.norms, walk.norm_channels[name], name)
    all_roots = sets.roots(np.arange(len(sets.parent)))
    dense = {root: i for i, root in enumerate(dict.fromkeys(all_roots.tolist()))}
    rank = np.array([dense[root] for root in all_roots.tolist()])

    norms = tuple(_norm(walk, name) for name in walk.norm_nodes)
    folded = {norm.folds_into for norm in norms}
    layers = tuple(
        replace(layer, reads=rank[layer.reads], writes=rank[layer.writes], bias=layer.bias or layer.name in folded)
        for layer in walk.layers.values()
    )
    norms = tuple(replace(norm, channels=rank[norm.channels]) for norm in norms)

    grouped: dict[tuple, list[int]] = {}
    order = {name: i for i, name in enumerate(walk.layers)}
    for root, channel in dense.items():
        writers = tuple(sorted(sets.writers.get(root, ()), key=order.__getitem__))
        why = sets.frozen.get(root, "" if writers else "no layer writes it")
        grouped.setdefault((writers, tuple(sets.norms.get(root, ())), why), []).append(channel)
    spaces = tuple(
        Space(np.array(channels), not why, why, writers, norm_names)
        for (writers, norm_names, why), channels in grouped.items()
    )

    values = {
        name: rank[value.ids]
        for name, value in walk.values.items()
        if isinstance(value, Value) and value.ids is not None
    }
    plans = {
        name: replace(move, channels=None if move.channels is None else rank[move.channels])
        for name, move in walk.moves.items()
    }
    used = {str(n.target) for n in walk.module.graph.nodes if n.op == "call_module"}
    seen = {str(n.target).rpartition(".")[0] for n in walk.module.graph.nodes if n.op == "get_attr"}  # traced through
    unused = tuple(
        name
        for name, m in original.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
        and name not in used | seen
        and not any(name.startswith(leaf + ".") for leaf in used)
    )
    known = set(walk.layers) | set(walk.norm_nodes)
    tensors = {**dict(walk.module.named_parameters()), **dict(walk.module.named_buffers())}
    others = sum(words_of(name, t) for name, t in tensors.items() if name.rpartition(".")[0] not in known)
    return Network(walk.module, example, layers, spaces, norms, values, plans, unused, others)


def _norm(walk: Walk, name: str) -> NormSpec:
    nodes = walk.norm_nodes[name]
    source = nodes[0].all_input_nodes[0]
    layer = walk.layers.get(str(source.target)) if source.op == "call_module" else None
    absorbed = (
        layer is not None
        and len(nodes) == len(walk.layer_nodes[layer.name]) == len(source.users) == 1
        and np.array_equal(walk.norm_channels[name], layer.writes)
    )
    into = layer.name if absorbed else None
    order = list(walk.module.graph.nodes)
    later = [n for n in order[order.index(nodes[0]) :] if n.op == "call_module" and n.target in walk.layers]
    return NormSpec(name, walk.norm_channels[name], into, str(later[0].target) if later else list(walk.layers)[-1])
