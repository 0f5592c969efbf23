"""How this process's allocator treats memory that is freed."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
KEPT = 2**25  # bytes of freed memory that each heap holds on to


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library (glibc) hand freed activations out again instead of returning them to the system; whether it
    could be told so. For the whole process. A tensor of some megabytes is otherwise unmapped when it is freed, and the
    next one costs a page fault for each of its pages: measured on ResNet-20, a forward pass takes up to 2.4 times as
    long.
    """
    libc = _libc()
    if libc is None:
        return False
    largest = 2**25  # the largest threshold that glibc takes
    settings = {_MMAP_THRESHOLD: largest, _TOP_PAD: KEPT, _TRIM_THRESHOLD: KEPT}
    return all([libc.mallopt(name, value) for name, value in settings.items()])


def give_back() -> None:
    """Return all freed memory to the system: values of many sizes that come and go leave holes."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # another C library
        return None
