"""The end of tracing: what a walk over the graph has seen -> `Network`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ajpq.channels import Value
from ajpq.network import Network, NormSpec, Space

if TYPE_CHECKING:
    from ajpq.tracing import Walk


def assemble(walk: Walk, original: nn.Module, example: Tensor) -> Network:
    """The network that a finished walk over `original` has seen."""
    sets = walk.sets
    for i, name in enumerate(walk.norm_nodes):  # a norm called several times cannot be folded into one layer
        sets.note(sets.norms, walk.norm_channels[name], name)
    all_roots = sets.roots(np.arange(len(sets.parent)))
    dense = {root: i for i, root in enumerate(dict.fromkeys(all_roots.tolist()))}
    rank = np.array([dense[root] for root in all_roots.tolist()])

    norms = tuple(_norm(walk, name) for name in walk.norm_nodes)
    folded = {norm.folds_into for norm in norms}
    layers = tuple(replace(layer, reads=rank[layer.reads], writes=rank[layer.writes], bias=layer.bias or layer.name in folded)
                   for layer in walk.layers.values())
    norms = tuple(replace(norm, channels=rank[norm.channels]) for norm in norms)

    grouped: dict[tuple, list[int]] = {}
    order = {name: i for i, name in enumerate(walk.layers)}
    for root, channel in dense.items():
        writers = tuple(sorted(sets.writers.get(root, ()), key=order.__getitem__))
        why = sets.frozen.get(root, "" if writers else "no layer writes it")
        grouped.setdefault((writers, tuple(sets.norms.get(root, ())), why), []).append(channel)
    spaces = tuple(Space(np.array(channels), not why, why, writers, norm_names)
                   for (writers, norm_names, why), channels in grouped.items())

    values = {name: rank[value.ids] for name, value in walk.values.items()
              if isinstance(value, Value) and value.ids is not None}
    plans = {name: replace(move, channels=None if move.channels is None else rank[move.channels])
             for name, move in walk.moves.items()}
    used = {str(n.target) for n in walk.module.graph.nodes if n.op == "call_module"}
    unused = tuple(name for name, m in original.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and name not in used
                   and not any(name.startswith(leaf + ".") for leaf in used))
    known = set(walk.layers) | set(walk.norm_nodes)
    tensors = {**dict(walk.module.named_parameters()), **dict(walk.module.named_buffers())}
    others = sum(t.numel() for name, t in tensors.items() if name.rpartition(".")[0] not in known and t.is_floating_point())
    return Network(walk.module, example, layers, spaces, norms, values, plans, unused, others)


def _norm(walk: Walk, name: str) -> NormSpec:
    nodes = walk.norm_nodes[name]
    source = nodes[0].all_input_nodes[0]
    alone = len(nodes) == 1 and source.op == "call_module" and len(source.users) == 1
    into = str(source.target) if alone and len(walk.layer_nodes.get(str(source.target), ())) == 1 else None
    order = list(walk.module.graph.nodes)
    later = [n for n in order[order.index(nodes[0]):] if n.op == "call_module" and n.target in walk.layers]
    return NormSpec(name, walk.norm_channels[name], into, str(later[0].target) if later else list(walk.layers)[-1])
