"""The one exception that means "your input, not our bug"."""

from __future__ import annotations

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
