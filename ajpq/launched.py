"""How many processes a launcher has started; apart from `ajpq.parallel`, as it needs no torch."""

import os

from ajpq.errors import AjpqError


def launched() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_alone(command: str) -> None:
    """Raise AjpqError if several processes were started of something that runs in one."""
    if launched() > 1:
        raise AjpqError(
            f"`{command}` runs in one process, but {launched()} were launched; run it alone, and fine-tune what it "
            "found with several processes by a script, see docs/finetuning.md"
        )
