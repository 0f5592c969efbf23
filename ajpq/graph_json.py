"""An fx graph as plain JSON data and back: no pickle, and no code but an allowlist of tensor functions.

A node is ``[op, target, args, kwargs]``, empty kwargs left out. Node names are not kept: fx gives its own. A value is a
JSON scalar or a list that starts with its kind: ``["node", 2]`` is the result of the node two rows up, and the others
are ``["tuple", ...]``, ``["list", ...]``, ``["dict", [key, value], ...]``, ``["slice", start, stop, step]``,
``["dtype", "float32"]``, ``["memory_format", "channels_last"]``, ``["float", "inf"]``, ``["ellipsis"]`` and
``["device"]``, which is always the CPU.

fx writes a graph out as Python source and executes it. So every word that reaches that source unquoted (paths, methods,
arguments' names) has to be an identifier, functions come from a table, and strings are quoted by fx with `repr`.
"""

from __future__ import annotations

import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ajpq.errors import AjpqError

_REFUSED = frozenset(
    "apply_ map_ map2_ set_ resize_ resize_as_ resize_as_sparse_ sparse_resize_ sparse_resize_and_clear_ "
    "share_memory_ pin_memory record_stream register_hook register_post_accumulate_grad_hook storage storage_type "
    "untyped_storage data_ptr const_data_ptr module_load as_subclass backward numpy cuda xpu ipu hpu mtia to_mkldnn "
    "reinforce new is_shared".split()
)
METHODS = frozenset(
    name
    for name in dir(Tensor)
    if not name.startswith("_") and callable(getattr(Tensor, name)) and name not in _REFUSED
)
_TORCH = (
    "adaptive_avg_pool1d adaptive_max_pool1d arange atleast_1d atleast_2d atleast_3d avg_pool1d batch_norm bilinear "
    "block_diag broadcast_shapes broadcast_tensors bucketize cartesian_prod cat cdist celu celu_ channel_shuffle "
    "column_stack concat concatenate constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d cosine_similarity dropout dstack einsum embedding empty empty_like eye "
    "fake_quantize_per_channel_affine fake_quantize_per_tensor_affine full full_like group_norm hstack instance_norm "
    "isin layer_norm linspace max_pool1d max_pool2d max_pool3d meshgrid native_channel_shuffle ones ones_like "
    "pairwise_distance pixel_shuffle pixel_unshuffle rms_norm row_stack rsub scalar_tensor searchsorted selu selu_ "
    "stack std_mean sym_float sym_int sym_max sym_min tensor tensordot threshold threshold_ tril_indices triu_indices "
    "unravel_index var_mean vstack zeros zeros_like _assert"
).split()
_OPERATOR = (
    "abs add and_ contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul index inv invert "
    "ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift "
    "setitem sub truediv truth xor"
).split()
_ATTRIBUTES = frozenset("shape ndim dtype device T mT data real imag requires_grad layout itemsize is_cuda".split())
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ROOT_NAMES = frozenset(dir(fx.GraphModule))
_OPS = frozenset(("placeholder", "get_attr", "call_module", "call_function", "call_method", "output"))


def _functions() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {"getattr": getattr}
    for name in (*_TORCH, *METHODS):
        found = vars(torch).get(name)
        if callable(found) and not isinstance(found, type):
            table[f"torch.{name}"] = found
    for name, found in vars(F).items():
        if (
            inspect.isroutine(found)
            and not name.startswith("_")
            and name not in _REFUSED | {"assert_int_or_pair"}
            and found.__module__ in ("torch", "torch.nn.functional", "torch._C._nn")
        ):
            table[f"torch.nn.functional.{name}"] = found
    table |= {f"operator.{name}": getattr(operator, name) for name in _OPERATOR}
    return table | {f"math.{name}": f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}


FUNCTIONS: Mapping[str, Callable[..., Any]] = _functions()
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


def name_of(function: object) -> str:
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', function)}"


def encode(value: Any, distance: Callable[[fx.Node], int]) -> Any:
    def inner(item: Any) -> Any:
        return encode(item, distance)

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else ["float", repr(value)]
        case fx.Node():
            return ["node", distance(value)]
        case tuple():
            return ["tuple", *map(inner, value)]
        case list():
            return ["list", *map(inner, value)]
        case dict():
            return ["dict", *([inner(k), inner(v)] for k, v in value.items())]
        case slice():
            return ["slice", inner(value.start), inner(value.stop), inner(value.step)]
        case torch.dtype() | torch.memory_format():
            return [type(value).__name__, str(value).removeprefix("torch.")]
        case torch.device():
            return ["device"]
    if value is ...:
        return ["ellipsis"]
    raise AjpqError(
        "an argument in a shipped network must be a number, string, slice, dtype or a tuple, list or dict "
        f"of these, but one is a {name_of(type(value))}; keep it out of forward or make it a buffer"
    )


def decode(value: Any, node: Callable[[int], fx.Node]) -> Any:
    def inner(item: Any) -> Any:
        return decode(item, node)

    match value:
        case None | bool() | int() | str() | float():
            return value
        case ["float", ("inf" | "-inf" | "nan") as name]:
            return float(name)
        case ["node", int() as distance]:
            return node(distance)
        case ["tuple", *items]:
            return tuple(map(inner, items))
        case ["list", *items]:
            return list(map(inner, items))
        case ["dict", *items]:
            return {inner(k): inner(v) for k, v in items}
        case ["slice", start, stop, step]:
            return slice(inner(start), inner(stop), inner(step))
        case ["dtype", str() as name] if isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        case ["memory_format", str() as name] if isinstance(vars(torch).get(name), torch.memory_format):
            return vars(torch)[name]
        case ["device"]:
            return torch.device("cpu")
        case ["ellipsis"]:
            return ...
    raise AjpqError(f"a value in a packed graph must be of a known kind, but one is {str(value)[:80]!r}; ship it again")


def _word(kind: str, word: Any) -> str:
    plain = isinstance(word, str) and word.isascii() and word.isidentifier() and not word.startswith("__")
    if plain and not keyword.iskeyword(word):
        return word
    raise AjpqError(
        f"{kind} in a shipped network must be a plain Python identifier, but one is {str(word)[:80]!r}; rename it"
    )


def _target(op: str, target: Any, args: tuple) -> Any:
    """`target` if it is safe as the target of `op`, otherwise an AjpqError."""
    if op == "placeholder":
        return _word("an input's name", target)
    if op == "call_method":
        if _word("a method", target) in METHODS:
            return target
        raise AjpqError(
            f"a method that a shipped network calls must be one of torch.Tensor's computations, but one is "
            f"{target!r}; write it with another one"
        )
    if op == "output":
        return "output"
    if op == "call_function":
        attribute = args[1] if target is getattr and len(args) == 2 else None
        if target is getattr and not (isinstance(attribute, str) and attribute in _ATTRIBUTES):
            raise AjpqError(
                "an attribute that a shipped network reads must be one of "
                f"{', '.join(sorted(_ATTRIBUTES))}, but one is {str(attribute)[:80]!r}; compute it another "
                "way"
            )
        return target
    if not (isinstance(target, str) and _PATH.fullmatch(target)) or any(map(keyword.iskeyword, target.split("."))):
        raise AjpqError(
            "the path of a module or tensor in a shipped network must consist of letters, digits, '_' and "
            f"'-', but one is {str(target)[:80]!r}; rename it in the model"
        )
    if any(part.startswith("__") for part in target.split(".")) or target.split(".")[0] in _ROOT_NAMES:
        raise AjpqError(
            "a module or tensor in a shipped network must not be called like an attribute of every "
            f"module, but one is {target!r}; rename it in the model"
        )
    return target


def _is_identity(node: fx.Node) -> bool:
    """torchvision's stochastic depth, switched off: it returns its input."""
    if node.op != "call_function" or name_of(node.target) != "torchvision.ops.stochastic_depth.stochastic_depth":
        return False
    values = dict(zip(("input", "p", "mode", "training"), node.args, strict=False)) | node.kwargs
    if values.get("training", True) is not False:
        raise AjpqError(
            "a shipped network must not drop blocks at random, but stochastic depth is on at node "
            f"{node.name}; call model.eval() before tracing it"
        )
    return True


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """The graph as ``{"nodes": [[op, target, args, kwargs], ...]}``; AjpqError if a node cannot be shipped."""
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise AjpqError(
            "a shipped network must be traced without concrete_args, but this graph has a code generator "
            "of its own; trace it with torch.fx.symbolic_trace(model)"
        )
    rows: list[list[Any]] = []
    row_of: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if _is_identity(node):
            row_of[node] = row_of[node.kwargs.get("input", node.args[0] if node.args else None)]
            continue
        target = _target(node.op, node.target, node.args)
        if node.op == "call_function":
            if target not in _NAMES:
                raise AjpqError(
                    "a shipped network may call tensor functions of torch, torch.nn.functional, operator "
                    f"and math only, but node {node.name} calls {name_of(target)}; write it with those, "
                    "without torch.fx.wrap"
                )
            target = _NAMES[target]

        def distance(other: fx.Node, here: int = len(rows)) -> int:
            return here - row_of[other]

        row = [node.op, target, [encode(a, distance) for a in node.args]]
        if node.kwargs:
            row.append({_word("an argument's name", k): encode(v, distance) for k, v in node.kwargs.items()})
        row_of[node] = len(rows)
        rows.append(row)
    return {"nodes": rows}


def targets(spec: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Paths of the modules called and of the tensors read, each once and in order of first use.

    A tensor inside a called module is left out."""
    modules, tensors = (
        list(dict.fromkeys(_target(op, row[1], ()) for row in spec["nodes"] if row[0] == op))
        for op in ("call_module", "get_attr")
    )
    inside = tuple(f"{path}." for path in modules)
    return modules, [path for path in tensors if not path.startswith(inside)]


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, by qualified name."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def graph_from_json(
    spec: Mapping[str, Any], modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> fx.GraphModule:
    """The inverse of `graph_to_json`, with the modules and tensors of `targets` by path.

    Whatever else the data asks for is an AjpqError or, where it is malformed, another exception; it is never executed.
    """
    graph, made = fx.Graph(), []
    ops = [row[0] for row in spec["nodes"]]
    inputs = ops.count("placeholder")
    ordered = not set(ops[:inputs]) - {"placeholder"} and ops.count("output") == 1 and ops[-1] == "output"
    if not ordered or not _OPS.issuperset(ops):
        raise AjpqError(
            "a packed graph must start with its inputs and end with one output, but this one does not; ship it again"
        )

    def node(distance: int) -> fx.Node:
        if not 0 < distance <= len(made):
            raise AjpqError(
                f"a node of a packed graph must read rows above it, but row {len(made)} reads {distance} "
                "rows up; ship it again"
            )
        return made[-distance]

    for op, target, args, *rest in spec["nodes"]:
        if op == "call_function":
            if target not in FUNCTIONS:
                raise AjpqError(
                    "a packed network may call tensor functions of torch, torch.nn.functional, operator "
                    f"and math only, but this one asks for {str(target)[:80]!r}; do not use the file, or "
                    "update ajpq"
                )
            target = FUNCTIONS[target]
        values = tuple(decode(a, node) for a in args)
        named = {_word("an argument's name", k): decode(v, node) for k, v in (rest[0] if rest else {}).items()}
        made.append(graph.create_node(op, _target(op, target, values), values, named))
    root = nn.Module()
    for path, module in modules.items():
        owner, name = _owner(root, path)
        owner.add_module(name, module)
    for path, tensor in tensors.items():
        owner, name = _owner(root, path)
        owner.register_buffer(name, tensor)
    known = {path for path, _ in tensors_of(root)}
    for path in (row[1] for row in spec["nodes"] if row[0] == "get_attr"):
        if path not in known:
            raise AjpqError(f"a packed graph may read tensors only, but it reads {path!r}; ship it again")
    return fx.GraphModule(root, graph)


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    return root, name
