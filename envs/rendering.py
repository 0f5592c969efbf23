"""A draft as text."""

from __future__ import annotations

import numpy as np

from ajpq.draft import Draft


def table(draft: Draft) -> str:
    """One line per layer: kernels left, their widths, the width of the input; open where nothing is decided yet, and an
    arrow at the layer of the next decision. Below, the part of every budget that is not spoken for."""
    network = draft.space.network
    present = network.index[draft.decision.layer.name] if draft.decision is not None else len(network.layers)
    rows = [("", "layer", "kernels", "bits", "input")]
    for i, layer in enumerate(network.layers):
        mark = "->" if i == present else ""
        if i > present:
            rows.append((mark, layer.name, "open", "open", "open"))
            continue
        bits = draft.weight_bits(layer.name)
        left = bits[bits > 0]
        widths = str(left.min()) if left.min() == left.max() else f"{left.min()}-{left.max()}, mean {left.mean():.2f}"
        rows.append((mark, layer.name, f"{len(left)} of {layer.c_out}", widths, str(draft.act_bits(layer.name))))
    sizes = np.array([[len(cell) for cell in row] for row in rows]).max(axis=0)
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    slack = ", ".join(f"{name} {value:.4f}" for name, value in zip(draft.budget.names, draft.slack, strict=True))
    return "\n".join([*lines, f"left of each budget: {slack}"])
