"""Settings against the signatures that take them: a wrong name or type is told before anything is spent."""

from __future__ import annotations

import inspect
import pkgutil
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ajpq.errors import AjpqError, closest

OURS = ("ajpq", "envs", "agents")
_LATER = re.compile(r"^\?\?\?$|\$\{")  # a value that the user has to set, or that refers to another
_PLAIN = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, str)),
    Path: ("a path", lambda value: isinstance(value, str | Path)),
    types.NoneType: ("null", lambda value: value is None),
}
_LISTS, _MAPPINGS = (list, tuple, Sequence, Collection, Iterable), (dict, Mapping)


def check_targets(config: Mapping[str, Any], key: str = "") -> None:
    """Raise AjpqError where a `_target_` of ours, anywhere in a configuration, would get a value of another type than
    is annotated there. What users bring may be annotated as they like."""
    target, hints = config.get("_target_"), {}
    if isinstance(target, str) and target.split(".")[0] in OURS:
        try:
            hints = hints_of(pkgutil.resolve_name(target))
        except (ImportError, AttributeError, ValueError, TypeError):
            pass  # Hydra tells what is wrong with the name
    for name, value in config.items():
        path = f"{key}.{name}" if key else str(name)
        if name in hints:
            check_type(path, value, hints[name])
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                check_targets(part, path)


def check_keywords(
    key: str, given: Mapping[str, Any], *takers: Callable[..., Any], taken: Collection[str] = (), **more: Any
) -> None:
    """Raise AjpqError unless every name in `given`, the settings `key`, is a keyword of one of the takers, or of `more`
    (name -> type), and its value is of the type that is annotated there. taken: keywords that are not for settings."""
    known = {name: hint for taker in takers for name, hint in hints_of(taker).items() if name not in taken} | more
    for name, value in given.items():
        if name not in known:
            raise AjpqError(
                f"`{key}.{name}` must be a keyword of {' or '.join(_name(taker) for taker in takers)}, but there is no "
                f"`{name}`{closest(name, list(known))}"
            )
        check_type(f"{key}.{name}", value, known[name])


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raise AjpqError unless a plain value, as it is in a configuration, is of a type."""
    if not agrees(value, hint):
        found = "null" if value is None else repr(value)
        raise AjpqError(f"`{key}` must be {told(hint)}, but it is {found}; give another")


def hints_of(taker: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> its type, `Any` where none is told or what is told cannot be found."""
    function = taker.__init__ if inspect.isclass(taker) else taker
    space = getattr(inspect.unwrap(function), "__globals__", {})
    found = {}
    for name, parameter in inspect.signature(taker).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, space)  # as typing.get_type_hints does, but one by one
            except Exception:
                hint = Any
        found[name] = Any if hint is parameter.empty else hint
    return found


def agrees(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; of one that is not plain every value is, and so are parts to be made and what
    refers to another key."""
    if (isinstance(value, Mapping) and "_target_" in value) or (isinstance(value, str) and _LATER.search(value)):
        return True
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in _PLAIN:
        return _PLAIN[origin][1](value)
    if hint is None:
        return value is None
    if origin in (Union, types.UnionType):
        return any(agrees(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in _LISTS:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and parts and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(agrees, value, parts))
        return not parts or all(agrees(one, parts[0]) for one in value)
    if origin in _MAPPINGS:
        return isinstance(value, Mapping) and (len(parts) < 2 or all(agrees(one, parts[1]) for one in value.values()))
    return True


def told(hint: Any) -> str:
    """A type as a sentence names it."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if hint is None:
        return "null"
    if origin in _PLAIN:
        return _PLAIN[origin][0]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(told(part) for part in parts))
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in _LISTS:
        if origin is tuple and parts and parts[-1] is not Ellipsis:
            return f"a list of {len(parts)}: {', '.join(map(told, parts))}"
        return f"a list, each {told(parts[0])}" if parts else "a list"
    if origin in _MAPPINGS:
        return f"keys with values, each {told(parts[1])}" if len(parts) > 1 else "keys with values"
    return getattr(hint, "__name__", str(hint))


def _name(taker: Callable[..., Any]) -> str:
    return f"{taker.__module__}.{taker.__qualname__}"
