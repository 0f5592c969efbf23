"""The evaluator of one machine: exact accuracy of candidates at the cost of the smaller network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from ajpq.errors import AjpqError
from ajpq.memory import KEPT, give_back, keep_freed_memory
from ajpq.policy import CompressionPolicy
from ajpq.scoring.engine import Engine
from ajpq.scoring.fusion import Unfit
from ajpq.scoring.kernels import Floats, Int8, integers_are_exact
from ajpq.scoring.program import Program
from ajpq.scoring.racing import LOOKS, hopeless
from ajpq.scoring.reference import Reference
from ajpq.scoring.setting import Measured, Setting
from ajpq.scoring.tally import Tally, exact, summed, tally
from ajpq.tasks import check_task, is_binary

ARITHMETICS = ("auto", "int8", "float32", "float64", "bfloat16")
TOLERANCE = 0.005  # of accuracy, for bfloat16


class Local:
    """policies -> accuracy, cross-entropy and divergence on the search split, without training.

    workers: threads, each of which runs its share of the images on one core; None = as many as torch has
    cache_bytes: of memory beside the network and the images, for activations: those that are being worked on, and
        those that are kept, so that a candidate that begins like an earlier one starts where they part
    arithmetic: "int8" multiplies codes as integers, exactly; "float32", "float64"; "bfloat16" rounds the operands and
        results of convolutions; "auto" is int8 on a CPU that does it exactly, else float32
    risk: of giving up, after an eighth, a quarter or half of the images, a candidate that would have become the best;
        0 = every candidate sees all images
    device: "cpu", "cuda" or one of several; images and weights stay there
    Results do not depend on workers and cache_bytes. Raises AjpqError for settings that this machine cannot meet.
    """

    def __init__(
        self, setting: Setting, *, workers: int | None = None, cache_bytes: int = 2**30, arithmetic: str = "auto",
        risk: float = 0.0, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.check(workers=workers, arithmetic=arithmetic, risk=risk, device=device)
        keep_freed_memory()
        self.setting, self.risk, self.cache_bytes = setting, risk, cache_bytes
        self.solves = setting.correction == "reconstruction" and bool(setting.norm_data)
        self.workers = workers or (torch.get_num_threads() if device == "cpu" else 1)
        self.engine = Engine(setting, _arithmetic(arithmetic, device), _room(cache_bytes))
        self.batches = [(self.engine.ready(x), y.to(self.engine.arithmetic.device)) for x, y, *_ in setting.search_data]
        if not self.batches:
            raise AjpqError("accuracy needs at least one image, but the search split holds none; check the data")
        x, y = (part[:2].cpu() for part in self.batches[0])
        check_task(setting.task, setting.network.module, x.float().contiguous(), y)
        if risk:
            if not is_binary(setting.task):
                raise AjpqError(
                    f"candidates can be given up early where every image is right or wrong, but the task measures "
                    f"{setting.task.metric}; use evaluator.risk=0"
                )
            self.batches = _shuffled(self.batches)
        self.images = sum(len(y) for _, y in self.batches)
        self.original = self._outputs_of((setting.original or setting.network).module)
        self._pool: ThreadPoolExecutor | None = None
        self._reference: Reference | None = None
        if arithmetic == "bfloat16":
            self._check_rounding(device)

    @staticmethod
    def check(
        *, workers: int | None = None, arithmetic: str = "auto", risk: float = 0.0, device: str = "cpu", **others: Any
    ) -> None:
        """Raise AjpqError for settings that can only fail; for callers that want to know before they spend time."""
        if workers is not None and workers < 1:
            raise AjpqError(f"`workers >= 1` must hold for evaluator=local, but {workers=}; null takes every core")
        if not 0 <= risk < 1:
            raise AjpqError(f"`0 <= risk < 1` must hold for evaluator=local, but {risk=}; 0 never gives up")
        _arithmetic(arithmetic, device)

    def __call__(
        self, policies: Sequence[CompressionPolicy], floor: float | None = None
    ) -> Iterator[tuple[int, Measured]]:
        for i, policy in enumerate(policies):
            yield i, self.measure(policy, floor)

    def measure(self, policy: CompressionPolicy, floor: float | None = None) -> Measured:
        """floor: the accuracy that a candidate must beat, or may be given up where `risk` allows it."""
        try:
            if self.solves:
                raise Unfit("every candidate has weights of its own")
            program = self.engine.program(policy)
        except Unfit:
            self._reference = self._reference or Reference(self.setting)
            return self._reference.measure(policy)
        self.engine.estimate_norms(program, self._each)
        tallies = []
        for part in self._parts(floor):
            tallies += self._each(lambda b: self._tally(program, b), part)
            seen, hits = (round(sum(t[i] for t in tallies)) for i in (0, 1))
            if seen < self.images and hopeless(hits, seen, round(floor * self.images), self.images, self.risk):
                return summed(tallies, whole=False)
        self.engine.shelf.remember(step.key for step in program.steps)
        self.engine.shelf.limit(_room(self.cache_bytes) - 2 * self.workers * self.engine.in_flight)
        return summed(tallies)

    def close(self) -> None:
        """Let kept activations and threads go; they come back when they are needed."""
        self.engine.forget()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        give_back()

    def logits(self, policy: CompressionPolicy) -> Tensor:
        """Outputs for the whole search split, (images, classes). Raises Unfit where only the reference can."""
        program = self.engine.program(policy)
        self.engine.estimate_norms(program, self._each)
        return torch.cat([self.engine.logits(program, x, b) for b, (x, _) in enumerate(self.batches)])

    def _tally(self, program: Program, batch: int) -> Tally:
        x, y = self.batches[batch]
        return tally(self.setting.task, self.engine.logits(program, x, batch), y, self.original[batch])

    def _outputs_of(self, module: nn.Module) -> list[Tensor]:
        """Of the uncompressed network, per batch; in float32, so that every arithmetic compares to the same."""
        with torch.inference_mode():
            return [exact(module(x.to("cpu", torch.float32).contiguous())) for x, _ in self.batches]

    def _parts(self, floor: float | None) -> list[range]:
        """Numbers of batches, in the slices after which a candidate may be given up."""
        count = len(self.batches)
        ends = [round(count * look) for look in LOOKS] if self.risk and floor is not None else []
        ends = sorted({end for end in ends if end} | {count})
        return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def _each(self, function, items) -> list:
        if self.engine.arithmetic.device.type != "cpu":
            return list(map(function, items))
        if self._pool is None:
            self._pool = _single_threaded(self.workers)
        return list(self._pool.map(function, items))

    def _check_rounding(self, device: str) -> None:
        exact = Local(self.setting, workers=self.workers, cache_bytes=0, device=device)
        for bits in (8, 4):
            policy = CompressionPolicy.homogeneous(self.setting.network, bits, 8)
            rounded, right = self.measure(policy).accuracy, exact.measure(policy).accuracy
            if abs(rounded - right) > TOLERANCE:
                raise AjpqError(
                    f"arithmetic=bfloat16 must keep accuracies within {TOLERANCE}, but {bits} bits everywhere score "
                    f"{rounded:.4f} instead of {right:.4f}; use arithmetic=auto"
                )


def _single_threaded(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads run every operation alone, so that scores do not depend on how many cores there are."""
    threads, all_here = torch.get_num_threads(), Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # or the first operation would take over what another thread has set by then
        all_here.wait()

    pool = ThreadPoolExecutor(workers, "ajpq-score", start)
    list(pool.map(lambda _: None, range(workers)))
    torch.set_num_threads(threads)
    return pool


def _arithmetic(name: str, device: str) -> Floats:
    if name not in ARITHMETICS:
        raise AjpqError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, but it is {name!r}; choose another")
    if device != "cpu" and not torch.cuda.is_available():
        raise AjpqError(f"device must be one that torch has, but {device!r} is not there; use device=cpu")
    integers = device == "cpu" and name in ("auto", "int8") and integers_are_exact()
    if name == "int8" and not integers:
        raise AjpqError(
            "arithmetic=int8 must be exact, but this device's convolutions of bytes are not; use arithmetic=auto"
        )
    if integers:
        return Int8()
    dtype = torch.float64 if name == "float64" else torch.float32
    return Floats(dtype, torch.bfloat16 if name == "bfloat16" else None, device)


def _room(cache_bytes: int) -> int:
    """Bytes for kept activations: a sixteenth goes to holes between them, and the allocator keeps some freed ones."""
    return max(cache_bytes * 15 // 16 - 2 * KEPT, 0)


def _shuffled(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same images in a fixed random order, in batches of the first one's size."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
    size = len(batches[0][1])
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return [
        (a.contiguous(memory_format=layout), b) for a, b in zip(x[order].split(size), y[order].split(size), strict=True)
    ]
