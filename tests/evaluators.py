"""Evaluators that Ray's actors run in the tests; a file of its own, because every actor imports it."""

import os
import signal
import time
from collections.abc import Iterator, Sequence

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.scoring.setting import Measured, Setting


class Marked(ValueError):
    """An error of a type that no library has."""


class MeanWidth:
    """The accuracy is the mean width in units of 32 bits; `images` is the process that said so.

    seconds: per policy. log: a file that gets a letter per policy. deadly, faulty: a policy of this mean width kills
    the process, or is an error. broken: the setting cannot be loaded.
    """

    def __init__(
        self, setting: Setting, *, seconds: float = 0.0, log: str | None = None, deadly: float = -1, faulty: float = -1,
        broken: bool = False,
    ) -> None:  # fmt: skip
        if broken:
            raise AjpqError("the setting must load, but it is broken; mend it")
        self.seconds, self.log, self.deadly, self.faulty = seconds, log, deadly, faulty

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        for i in reversed(range(len(policies))):
            bits = policies[i].mean_bits()
            if self.log is not None:
                with open(self.log, "a") as file:
                    file.write("x")
            if bits == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if bits == self.faulty:
                raise Marked(f"{bits} bits")
            time.sleep(self.seconds)
            yield i, Measured(bits / 32, os.getpid(), whole=floor is None or bits / 32 >= floor)
