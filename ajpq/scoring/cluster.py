"""`evaluator=ray`: policies measured by Ray actors, on one machine or on a cluster."""

from __future__ import annotations

import os
import pickle
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ajpq.errors import AjpqError
from ajpq.policy import CompressionPolicy
from ajpq.scoring.connection import connect, disconnect, first_sentence, ray_package
from ajpq.scoring.setting import Evaluator, Measured, Setting

RUN = 16  # policies sent to an actor at once, at most
LIVES = 3  # actors that one policy may end
PATIENCE = 300.0  # seconds until the first actor must have started


class Ray:
    """Measures policies with the actors of a Ray cluster; answers in the order of the policies, whoever measured them.

    Every actor runs an evaluator of its own. It gets runs of consecutive policies, so that those that begin alike meet
    in one actor; runs become shorter towards the end, so that no actor waits long. An actor that dies is replaced and
    its policies are measured again. What an evaluator raises is raised here.

    setting: sent once, to Ray's object store, with its batches as lists
    workers: actors; None = as many as the cluster has room for
    address: of a running cluster, "auto" for the one of this machine; None = a new one on this machine, which ends with
        the last evaluator that uses it; not asked for where this process is connected to a cluster
    threads, gpus: CPUs and GPUs that an actor takes; a part of a GPU will do
    evaluator: (setting, **options) -> what an actor runs; None = `ajpq.scoring.local.Local` with `threads` workers
    options: of that evaluator; what it says of a policy must depend on the policy and the floor alone
    Raises AjpqError if Ray is not installed, the cluster is not there or too small, or the setting does not pickle.
    """

    def __init__(
        self, setting: Setting, *, workers: int | None = None, address: str | None = None, threads: int = 1,
        gpus: float = 0, evaluator: Callable[..., Evaluator] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.check(workers=workers, threads=threads, evaluator=evaluator, **options)
        make = partial(_local, workers=threads, **options) if evaluator is None else partial(evaluator, **options)
        self._ray, parts = ray_package(), _pickled(make, setting)
        ours = connect(address, workers and workers * threads)
        self._actors: list[Any] = []
        self._loading: list[Any] = []  # what `load` of every actor answers
        self.close: Callable[[], Any] = weakref.finalize(self, _stop, self._ray, self._actors, ours)
        """Ends the actors, and with the last evaluator the Ray that we started; also at exit."""
        self._threads, self._parts = threads, self._ray.put(parts)
        self._actor = self._ray.remote(_actor_class()).options(num_cpus=threads, num_gpus=gpus)
        for slot in range(workers or self._room(threads, gpus)):
            self._replace(slot)

    @staticmethod
    def check(
        *,
        workers: int | None = None,
        threads: int = 1,
        evaluator: Callable[..., Evaluator] | None = None,
        **options: Any,
    ) -> None:
        """Raise AjpqError for settings that can only fail; for callers that want to know before they spend time."""
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and value < 1:
                raise AjpqError(f"`{name} >= 1` must hold for evaluator=ray, but {name}={value}; give at least 1")
        ray_package()
        if evaluator is None and options.get("device", "cpu") == "cpu":  # a GPU need only be where the actors are
            from ajpq.scoring.local import Local

            Local.check(**options)

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        if not self.close.alive:
            raise AjpqError("an evaluator must be open to measure, but this evaluator=ray was closed; make a new one")
        rest, done, deaths = deque(range(len(policies))), {}, Counter()
        idle: set[int] = set()
        running = {ref: (slot, self._actors[slot], ()) for slot, ref in enumerate(self._loading)}
        for place in range(len(policies)):
            while place not in done:
                ref = self._first(running)
                slot, actor, places = running.pop(ref)
                try:
                    answer = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except self._ray.exceptions.RayError as death:
                    _count(deaths, places, death)
                    rest.extendleft(reversed(places))
                    if self._actors[slot] is actor:
                        self._replace(slot)
                    running[self._loading[slot]] = slot, self._actors[slot], ()
                else:
                    idle.add(slot)
                    done.update((i, answer[k]) for k, i in enumerate(places))
                while idle and rest:
                    slot, places = idle.pop(), self._next_run(rest, deaths)
                    actor, sent = self._actors[slot], pickle.dumps([policies[i] for i in places])
                    running[actor.measure.remote(sent, floor)] = slot, actor, places
            yield place, done.pop(place)

    def _room(self, threads: int, gpus: float) -> int:
        has = self._ray.cluster_resources()
        room = int(min(has.get("CPU", 0) // threads, has.get("GPU", 0) // gpus if gpus else float("inf")))
        if not room:
            self.close()
            raise AjpqError(
                f"a Ray cluster must have room for an actor of {threads} CPUs and {gpus} GPUs, but it has "
                f"{has.get('CPU', 0):g} and {has.get('GPU', 0):g}; give fewer threads or gpus"
            )
        return room

    def _next_run(self, rest: deque[int], deaths: Counter) -> tuple[int, ...]:
        """Places taken off `rest`: an actor's share of half of them, but one that saw an actor die goes alone."""
        size = 1 if deaths[rest[0]] else min(RUN, -(-len(rest) // (2 * len(self._actors))))
        return tuple(rest.popleft() for _ in range(size))

    def _first(self, running: dict[Any, tuple[int, Any, tuple[int, ...]]]) -> Any:
        """The first reference of `running` that has an answer."""
        measuring = any(places for _, _, places in running.values())
        ready, _ = self._ray.wait(list(running), timeout=None if measuring else PATIENCE)
        if not ready:
            free = self._ray.available_resources()
            raise AjpqError(
                f"an actor of evaluator=ray must find room within {PATIENCE:.0f} s, but {free.get('CPU', 0):g} CPUs "
                f"and {free.get('GPU', 0):g} GPUs of the cluster are free; end other jobs or give fewer of them"
            )
        return ready[0]

    def _replace(self, slot: int) -> None:
        """A new actor at `slot`, at work on loading the setting."""
        for actor in self._actors[slot : slot + 1]:
            self._ray.kill(actor)
        actor = self._actor.remote()
        path = [os.path.abspath(folder) for folder in sys.path]
        self._actors[slot : slot + 1] = [actor]
        self._loading[slot : slot + 1] = [actor.load.remote(path, self._threads, self._parts)]


def _count(deaths: Counter, places: tuple[int, ...], death: Exception) -> None:
    for place in places or (None,):
        deaths[place] += 1
        if deaths[place] == LIVES:
            what = "loading the setting" if place is None else f"policy {place}"
            raise AjpqError(
                f"an actor of evaluator=ray must outlive its work, but {what} ended {LIVES} actors in a row (the last: "
                f"{first_sentence(death)}); give fewer workers if memory is short, or use evaluator=local"
            ) from death


def _actor_class() -> type:
    """A class that cannot be imported: so Ray sends its code, and an actor can start on a machine that has yet to be
    told where `ajpq` and the user's modules lie."""

    class Actor:
        def load(self, path: list[str], threads: int, parts: bytes) -> None:
            import pickle
            import sys

            sys.path[:0] = [folder for folder in path if folder not in sys.path]
            import torch

            torch.set_num_threads(threads)
            make, setting = pickle.loads(parts)
            self.evaluate = make(setting)

        def measure(self, policies: bytes, floor: float | None) -> dict:
            import pickle

            return dict(self.evaluate(pickle.loads(policies), floor))

    return Actor


def _local(setting: Setting, **options: Any) -> Evaluator:
    from ajpq.scoring.local import Local

    return Local(setting, **options)


def _pickled(make: Callable[[Setting], Evaluator], setting: Setting) -> bytes:
    from ray import cloudpickle

    whole = replace(setting, norm_data=list(setting.norm_data), search_data=list(setting.search_data))
    try:
        return cloudpickle.dumps((make, whole))
    except Exception as error:  # whatever an object's own reduction raises
        raise AjpqError(
            f"what evaluator=ray sends to its actors must pickle, but {first_sentence(error)}; keep open "
            "files and locks out of it, or use evaluator=local"
        ) from error


def _stop(ray: Any, actors: list[Any], ours: bool) -> None:
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
    if ours:
        disconnect()
