"""Blocks of a network, found by its graph: what residual and concatenating architectures repeat."""

from __future__ import annotations

from torch import fx

from ajpq import ops
from ajpq.network import Network


def blocks_of(network: Network) -> list[list[str]]:
    """Names of the layers of every block, in execution order, found by graph: the layers between a tensor and the
    addition or concatenation in which its paths meet again. Where such regions contain each other, a layer belongs to
    the smallest; a layer outside all of them is a block of its own."""
    before: dict[fx.Node, list[fx.Node]] = {}
    dominator: dict[fx.Node, fx.Node] = {}
    depth: dict[fx.Node, int] = {}
    regions = []
    for node in network.module.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in depth]
        if not sources and node.op != "placeholder":  # a constant
            continue
        before[node], meet = sources, sources[0] if sources else None
        for other in sources[1:]:
            while meet is not other:
                if depth[meet] >= depth[other]:
                    meet = dominator[meet]
                else:
                    other = dominator[other]
        depth[node] = 0 if meet is None else depth[meet] + 1
        if meet is not None:
            dominator[node] = meet
        module = network.module.get_submodule(node.target) if node.op == "call_module" else None
        if len(sources) > 1 and ops.name_of(node, module) in {"add", "iadd", *ops.CONCAT}:
            regions.append(_between(before, meet, node, network))
    owner: dict[str, int] = {}
    for i, region in enumerate(sorted(regions, key=len)):
        for name in region:
            owner.setdefault(name, i)
    found: dict[object, list[str]] = {}
    for layer in network.layers:
        found.setdefault(owner.get(layer.name, layer.name), []).append(layer.name)
    return list(found.values())


def _between(before: dict[fx.Node, list[fx.Node]], fork: fx.Node, merge: fx.Node, network: Network) -> set[str]:
    seen, open_ = set(), [merge]
    while open_:
        node = open_.pop()
        if node not in seen and node is not fork:
            seen.add(node)
            open_ += before[node]
    return {str(node.target) for node in seen if node.op == "call_module" and node.target in network}
