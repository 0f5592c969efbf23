"""The picture of a comparison: best-so-far per evaluation, with the range over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ajpq.study import Run, Study

# Okabe and Ito (2008), told apart by the colour-blind; without yellow, which is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"


def plot(study: Study, path: str | Path) -> None:
    """Write `draw(study)`; the suffix of `path` says which kind of picture (png, svg, pdf)."""
    draw(study).savefig(path, dpi=150)


def draw(study: Study) -> Figure:
    """Best-so-far of every search.

    Line: median over seeds of the best reward within budget so far. Shade: from the worst to the best seed. A search
    that ended early keeps its last value, dashed. The legend is in the order of the final medians. What the
    first tenth of the evaluations found may lie below the picture.
    """
    most = max(2, *(len(run.rows) for run in study.runs))
    curves = {name: _padded(runs, most) for name, runs in study.searches.items()}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    handles = {}
    for i, (name, runs) in enumerate(study.searches.items()):
        ended = max(len(run.rows) for run in runs)
        first = min(i * most // (8 * len(curves)), ended - 1)
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markevery": [*range(first, ended - 1, max(most // 8, 1)), ended - 1],
        }
        handles[name] = _draw(axes, curves[name], ended, style)
        seeds = "no seed" if runs[0].seed is None else f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        handles[name].set_label(f"{name} ({seeds})")
    _window(axes, [np.median(curve, axis=0) for curve in curves.values()], [c[:, -1] for c in curves.values()])
    axes.set_xlim(1 - 0.01 * most, 1.01 * most)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("evaluations")
    axes.set_ylabel(f"best {study.reward}\non the search split so far")
    axes.set_title("Best policy within " + ", ".join(f"{name} ≤ {limit:g}" for name, limit in study.limits.items()))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    order = sorted(handles, key=lambda name: -np.median(curves[name][:, -1]))
    keys: list[Line2D | Patch] = [handles[name] for name in order]
    keys.append(Line2D([], [], color=GREY, label="median over seeds"))
    if any(len(curve) > 1 for curve in curves.values()):
        keys.append(Patch(color=GREY, alpha=0.2, linewidth=0, label="worst to best seed"))
    if any(max(len(run.rows) for run in runs) < most for runs in study.searches.values()):
        keys.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="search has ended"))
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _padded(runs: list[Run], length: int) -> np.ndarray:
    """float64 (runs, length): every curve goes on with its last value."""
    return np.stack([np.pad(run.curve(), (0, length - len(run.rows)), mode="edge") for run in runs])


def _draw(axes: Axes, curves: np.ndarray, ended: int, style: Mapping[str, Any]) -> Line2D:
    at, middle = np.arange(1, curves.shape[1] + 1), _finite(np.median(curves, axis=0))
    plain = {"color": style["color"], "drawstyle": "steps-post"}
    axes.plot(at[ended - 1 :], middle[ended - 1 :], **plain, linewidth=1.2, linestyle="--", zorder=2)
    if len(curves) > 1:
        low, high = _finite(curves.min(0)), _finite(curves.max(0))
        axes.fill_between(at, low, high, step="post", color=style["color"], alpha=0.16, linewidth=0)
    (line,) = axes.plot(at[:ended], middle[:ended], **{**plain, **style}, linewidth=2, markersize=5, zorder=3)
    return line


def _window(axes: Axes, medians: list[np.ndarray], finals: list[np.ndarray]) -> None:
    """Show all final values, and the medians from a tenth of the evaluations on."""
    seen = np.concatenate([*finals, *(median[len(median) // 10 :] for median in medians)])
    seen = seen[np.isfinite(seen)]
    if not len(seen):
        return
    margin = max(np.ptp(seen), 1e-3) * 0.06
    axes.set_ylim(seen.min() - margin, seen.max() + margin)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
