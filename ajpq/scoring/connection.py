"""This process and Ray: the package, one connection that several evaluators may share, and its end."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from typing import Any

from ajpq.errors import AjpqError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU of their own still see those of the machine
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a setting",  # it is replaced
}
_holders = 0  # evaluators that use the connection that we made


def ray_package() -> Any:
    """Raises AjpqError where Ray is not installed."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError as error:
        raise AjpqError(f"evaluator=ray must find the package Ray, but {error}; pip install ajpq[ray]") from error
    return ray


def connect(address: str | None, cpus: int | None) -> bool:
    """Connect this process to the cluster at `address`, or start one of `cpus` CPUs, unless it is connected.

    Returns whether `disconnect` must be called, which is where no one else had connected it.
    """
    global _holders
    ray = ray_package()
    if not ray.is_initialized():
        _holders = 0
        started: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
        try:
            if address not in (None, "auto"):  # Ray itself gives up after minutes only
                host, _, port = address.rpartition("://")[2].rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **started)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError, OSError and more
            what, way = "start Ray on this machine", "use evaluator=local"
            if address is not None:
                what, way = (
                    f"find a Ray cluster at address={address!r}",
                    "give the host:port of one, and RAY_AUTH_MODE=token if it has a token",
                )
            raise AjpqError(f"evaluator=ray must {what}, but {first_sentence(error)}; {way}") from error
    elif not _holders:
        return False
    _holders += 1
    return True


def disconnect() -> None:
    """The last one ends the connection, and the cluster if `connect` started it."""
    global _holders
    _holders -= 1
    if not _holders:
        ray_package().shutdown()


def first_sentence(error: BaseException) -> str:
    """Of its message, without the full stop; the name of its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")
