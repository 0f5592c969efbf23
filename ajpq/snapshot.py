"""What a resumed search is checked against (`search.json`) and continues from (`search.pt`)."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ajpq.errors import AjpqError
from ajpq.files import replacing, write_text
from ajpq.loaders import Batches, take
from ajpq.network import Network
from ajpq.preparing import Prepared
from ajpq.problem import CALIBRATION_IMAGES, Problem, SearchBackend
from ajpq.report import versions
from ajpq.resume import SEARCH, is_free, overrides_in

STATE = "search.pt"
EVERY, SECONDS = 20, 30.0  # a state is kept after so many evaluations, or so long
SHARE = 0.05  # of the time, at most, goes into keeping states
_MESSAGES = {
    "graph": "the network differs",
    "weights": "the weights of the network differ",
    "original": "the weights of the original network differ",
    "calibration": "the calibration images differ",
    "search": "the search images differ",
}
# Beside tensors and plain data, what a state may be made of: torch reads nothing else, so a file cannot run code.
_SAFE = [
    np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]  # fmt: skip


def fingerprint(settings: Mapping[str, Any], job: Prepared, backend: SearchBackend) -> dict[str, Any]:
    """All that the evaluations of a search depend on, as plain data. settings: the resolved configuration, of which
    `checkpoint` counts by its weights."""
    kind = type(backend)
    return {
        "version": versions().get("ajpq"),
        "backend": f"{kind.__module__}.{kind.__qualname__}",
        "config": {key: value for key, value in settings.items() if not is_free(key) and key != "checkpoint"},
        "graph": _digest([str(job.network.module).encode()]),
        "weights": _weights(job.network),
        "original": _weights(job.original),
        "calibration": _images(take(job.data.calibration, CALIBRATION_IMAGES)),
        "search": _images(take(job.data.search, settings["search_images"])),
    }


def check_same(now: Mapping[str, Any], folder: Path) -> None:
    """Raise AjpqError, naming the first difference, unless the search of `folder` had the same fingerprint."""
    try:
        then = json.loads((folder / SEARCH).read_text())
    except (OSError, ValueError) as error:
        raise AjpqError(
            f"a search can be resumed only where {SEARCH} is, but {folder / SEARCH} cannot be read "
            f"({type(error).__name__}); start a new run"
        ) from error
    found = _difference(then, json.loads(json.dumps(now)))
    if found:
        raise AjpqError(f"a search can be resumed only as it was, but {found}; start a new run in another folder")


def keep(now: Mapping[str, Any], folder: Path) -> None:
    """Write search.json: the fingerprint, and the overrides of the command line, if there is one."""
    write_text(folder / SEARCH, json.dumps({**now, "overrides": overrides_in(folder)}, indent=1))


@dataclass
class Keeper:
    """A `Problem.checkpoint` that writes the state of a backend to `path`, now and then."""

    path: Path
    problem: Problem
    before: Callable[[], None] | None = None  # called before a state is written

    def __post_init__(self) -> None:
        self._evaluations, self._time, self._cost = self.problem.evaluations, time.perf_counter(), 0.0

    def __call__(self, backend: SearchBackend) -> None:
        passed, new = time.perf_counter() - self._time, self.problem.evaluations - self._evaluations
        due = new >= EVERY or (new > 0 and passed >= SECONDS)
        if due and hasattr(backend, "state_dict") and self._cost <= SHARE * passed:
            start = time.perf_counter()
            if self.before is not None:
                self.before()
            save_state(self.path, backend, self.problem)
            self._evaluations, self._time = self.problem.evaluations, time.perf_counter()
            self._cost = self._time - start


def save_state(path: Path, backend: Any, problem: Problem) -> None:
    """Write the state of a backend, the evaluations that it belongs to, and that of the random numbers; the file
    appears complete or not at all."""
    state = {
        "backend": backend.state_dict(),
        "evaluations": problem.evaluations,
        "policies": _digest(e.policy.digest().encode() for e in problem.history),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, backend: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[int, str | None]:
    """Give a backend the state in `path`, and this process its random numbers.

    Returns the number of rows that the state belongs to, and why it could not be used; (0, None) where there is none.
    """
    if not path.is_file() or not hasattr(backend, "load_state_dict"):
        return 0, None
    try:
        with torch.serialization.safe_globals(_SAFE):
            state = torch.load(path, map_location="cpu", weights_only=True)
        done = state["evaluations"]
        if state["policies"] != _digest(row["policy"].encode() for row in rows[:done]):
            raise ValueError("it belongs to another record")
        generators = state["torch"], state["numpy"], state["python"]
        own = state["backend"]
    except Exception as error:  # a damaged archive can fail in any way
        return 0, (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    backend.load_state_dict(own)
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    random.setstate(generators[2])
    return done, None


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for key in ("version", "backend"):
        if then.get(key) != now[key]:
            return f"its {'ajpq version' if key == 'version' else key} was {then.get(key)} and is {now[key]} now"
    if change := changed(then.get("config", {}), now["config"]):
        return change
    return next((said for key, said in _MESSAGES.items() if then.get(key) != now[key]), None)


def changed(before: Any, after: Any, where: str = "") -> str | None:
    """The first setting, by its dotted name, in which two trees differ, told as a clause with the place of `before`."""
    then, now = _flat(before), _flat(after)
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            return f"{key} was {then.get(key)}{where} and is {now.get(key)} now"
    return None


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def _weights(network: Network) -> str:
    module = network.module
    return _tensors({**dict(module.named_parameters()), **dict(module.named_buffers())}.items())


def _images(batches: Batches) -> str:
    return _tensors((str(i), part) for x, y, *_ in batches for i, part in enumerate((x, y)))


def _tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    def parts():
        for name, tensor in named:
            tensor = tensor.detach().cpu().contiguous()
            yield f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode()
            yield tensor.flatten().view(torch.uint8).numpy()

    return _digest(parts())


def _digest(parts: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()
