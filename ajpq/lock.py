"""One run in a folder at a time. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ajpq.errors import AjpqError

try:
    import fcntl
except ImportError:  # Windows: nothing to lock a folder with, so nobody is kept out
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock goes with the process, however it ends.

    Raises AjpqError if another process is in it. A file system without locks keeps nobody out.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AjpqError(
                f"one run at a time may use a folder, but another process is running in {folder}; wait for it, or set "
                "another hydra.run.dir"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
