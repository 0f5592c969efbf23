"""A module's forward as a torch.fx graph, whose leaves are modules of torch.nn and what users derived from them."""

from __future__ import annotations

import inspect

from torch import fx, nn

from ajpq.errors import AjpqError

_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_CALLING = frozenset(("__call__", "__getattr__", "_call_impl", "_wrapped_call_impl"))
_MAKING = frozenset(("extra_repr", "reset_parameters", "reset_running_stats"))


class Tracer(fx.Tracer):
    """fx's own, to which a subclass of Conv2d with another constructor is a Conv2d."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or inherited(type(m)) is not None


def inherited(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch.nn whose forward, with all that it calls and reads, a class of somebody else has; None if
    there is none."""
    base = next(c for c in cls.__mro__ if c.__module__.startswith("torch.") and issubclass(c, nn.Module))
    public = getattr(nn, base.__name__, None) is base and base.__module__ != "torch.nn.modules.container"
    if base in (cls, nn.Module) or not public:
        return None
    theirs = base.__mro__[: base.__mro__.index(nn.Module)]
    used = {name for c in theirs for name in (*vars(c), *inspect.get_annotations(c)) if not name.startswith("__")}
    own = {name for c in cls.__mro__[: cls.__mro__.index(base)] for name in vars(c)}
    return base if own.isdisjoint(used - _MAKING | _CALLING) else None


def symbolic(model: nn.Module) -> fx.GraphModule:
    """`model` in its present mode as a graph of its first argument alone; it may be changed, and shares its modules.
    Raises AjpqError where torch.fx cannot trace it."""
    name = type(model).__name__
    _take_one_argument(model)
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except (
        Exception
    ) as error:  # torch.fx raises TraceError, TypeError, NameError, whatever the forward does with a Proxy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AjpqError(
            f"{name}.forward must be traceable by torch.fx, but: {reason}; take data-dependent `if`, "
            "`assert` and loops over values out of forward, or put them into a function under torch.fx.wrap"
        ) from error
    for node in graph.nodes:
        root = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and root in _TAKEN:
            raise AjpqError(
                f"a module or tensor of a network must not be called like an attribute of torch.fx.GraphModule, but "
                f"{name} has a {root!r}; rename it"
            )
        if node.op == "call_module":
            leaf = model.get_submodule(node.target)
            leaf.__class__ = inherited(type(leaf)) or type(leaf)
    return fx.GraphModule(model, graph, name)


def _take_one_argument(model: nn.Module) -> None:
    """Give all arguments but the first of a forward their defaults: torch.fx would make each an input."""
    cls = type(model)
    arguments = list(inspect.signature(cls.forward).parameters.values())[2:]
    if not arguments:
        return
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for argument in arguments:
        if argument.default is argument.empty and argument.kind not in free:
            raise AjpqError(
                f"forward must take one tensor, and what else it takes must have a default, but {cls.__name__}.forward "
                f"needs {argument.name!r} too; wrap it in a module that gives it"
            )

    def forward(self: nn.Module, x: object) -> object:
        return cls.forward(self, x)

    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
