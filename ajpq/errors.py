"""The one exception that means "your input, not our bug"."""

from __future__ import annotations

from difflib import get_close_matches
from numbers import Integral


class AjpqError(ValueError):
    """Bad input, told in one sentence: the thing, the rule, the value and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


def check_counts(least: int, **counts: int | None) -> None:
    """Raise AjpqError for a setting that is no whole number of at least `least`; None is not given."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise AjpqError(f"`{name} >= {least}` must hold for a whole number, but {name}={value!r}; give another")


def check_alike(alike: bool, how: str) -> None:
    """Raises AjpqError where images of two loaders cannot be those of one."""
    if not alike:
        raise AjpqError(
            f"images of two splits can be joined where they are {how}, but these are not; make both of one data set, "
            "or learn from one of them"
        )


def closest(word: str, known: list[str], prefix: str = "") -> str:
    """A question whether another word was meant, if there is one like it; else nothing."""
    same_end = [name for name in known if name.split(".")[-1] == word.split(".")[-1]]
    near = list(dict.fromkeys([*get_close_matches(word, known, n=2, cutoff=0.6), *same_end]))[:3]
    return f"; did you mean {' or '.join(f'`{prefix}{name}`' for name in near)}" if near else ""
