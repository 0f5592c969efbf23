"""What tracing knows about operations, by normalised name (module class, function or method; trailing "_" dropped).

Anything not listed is an unknown operation: it runs as it is, and the channels it touches are not prunable.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

# One tensor in, the same shape out, every element on its own. Whether zero stays zero is measured, not listed.
ELEMENTWISE = frozenset(
    """
    relu relu6 hardtanh hardswish silu gelu leakyrelu leaky_relu elu selu celu mish tanh softsign tanhshrink hardshrink
    softshrink threshold sigmoid hardsigmoid logsigmoid softplus identity dropout dropout1d dropout2d dropout3d
    alphadropout alpha_dropout feature_alpha_dropout featurealphadropout stochastic_depth float to
    type type_as neg abs square sign round floor ceil clamp clip clamp_min clamp_max pow sqrt rsqrt exp log
    log1p expm1 erf sin cos
    prelu quantstub dequantstub reciprocal positive pos
""".split()
)

# Spatial: channels keep their place, positions change; a channel of zeros stays zero.
SPATIAL = frozenset(
    """
    maxpool2d max_pool2d avgpool2d avg_pool2d adaptiveavgpool2d adaptive_avg_pool2d adaptivemaxpool2d
    adaptive_max_pool2d
    lppool2d lp_pool2d upsample upsamplingnearest2d upsamplingbilinear2d interpolate boolean_dispatch
    reflectionpad2d replicationpad2d
""".split()
)

MERGE = frozenset("add iadd sub isub mul imul maximum minimum multiply subtract".split())
DIVIDE = frozenset("truediv itruediv div divide floordiv floor_divide".split())

# Elements only move: what the operation does to an index tensor is all there is to know.
MOVE = frozenset(
    """
    view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze chunk split
    tensor_split unbind narrow select getitem expand repeat tile repeat_interleave
    roll flip
    index_select pixelshuffle pixel_shuffle pixelunshuffle pixel_unshuffle channelshuffle channel_shuffle
    native_channel_shuffle contiguous clone detach
""".split()
)

EXPAND = frozenset("expand_as".split())
CONCAT = frozenset("cat concat concatenate".split())
PAD = frozenset("pad zeropad2d constantpad2d".split())
REDUCE = frozenset("mean sum amax amin".split())


def name_of(node: fx.Node, module: nn.Module | None) -> str:
    """Normalised name of the operation of a call_module, call_function or call_method node."""
    if module is not None:
        return type(module).__name__.lower()
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.rstrip("_").lower()


def told(node: fx.Node, module: nn.Module | None) -> str:
    """The operation as a user would look for it."""
    if module is not None:
        return f"{type(module).__name__} {node.target!r}"
    return f"{node.target!r}" if isinstance(node.target, str) else f"{name_of(node, None)!r}"


_IN_PLACE = frozenset((operator.iadd, operator.isub, operator.imul, operator.itruediv))


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the operation writes its result into its first input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.target in _IN_PLACE or node.kwargs.get("inplace", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    keyword = getattr(node.target, "__module__", "") == "_operator"  # operator.not_
    return name.endswith("_") and not name.startswith("_") and not keyword
