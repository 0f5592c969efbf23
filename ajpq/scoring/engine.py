"""Runs programs over images, from as deep in the network as earlier candidates allow."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.bank import WeightBank
from ajpq.matching import matched, outputs
from ajpq.policy import CompressionPolicy
from ajpq.scoring.binding import Builder
from ajpq.scoring.fusion import Skeleton, Unfit, skeleton
from ajpq.scoring.kernels import Floats
from ajpq.scoring.program import Program
from ajpq.scoring.setting import Setting
from ajpq.scoring.shelf import Shelf, size_of
from ajpq.surgery import smaller_graph

SKELETONS, STATISTICS = 64, 20_000  # kept of the latest
GOAL_BYTES = 2**28  # for what batch-norms are matched to

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, perhaps over threads


class Engine:
    """What all candidates of one setting share: weights at every width, graphs, activations, norm statistics."""

    def __init__(self, setting: Setting, arithmetic: Floats, cache_bytes: int) -> None:
        self.network, self.calibration, self.arithmetic = setting.network, setting.calibration, arithmetic
        self.bank, self.shelf = WeightBank(setting.network), Shelf(cache_bytes)
        self.in_flight = 0  # most bytes of activations that one batch has needed at once
        self.norm_data = [self.ready(x) for x, *_ in setting.norm_data]
        self._skeletons: OrderedDict[tuple, Skeleton] = OrderedDict()
        self._statistics: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()
        calls = Counter(str(node.target) for node in self.network.module.graph.nodes if node.op == "call_module")
        self._again = [norm.name for norm in self.network.norms if calls[norm.name] > 1]
        self.goals = self._goals(setting) if setting.correction == "least_squares" else {}
        self.modules = {
            name: module if not _has_tensors(module) else copy.deepcopy(module).to(arithmetic.device, arithmetic.dtype)
            for name, module in self._other_modules().items()
        }

    def _other_modules(self) -> dict[str, nn.Module]:
        found, norms = {}, {norm.name for norm in self.network.norms}
        for node in self.network.module.graph.nodes:
            module = self.network.module.get_submodule(node.target) if node.op == "call_module" else None
            if module is not None and node.target not in self.network and node.target not in norms:
                found[str(node.target)] = module
        return found

    def _goals(self, setting: Setting) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Of every batch-norm that can be matched and every batch of `norm_data`: what the original puts out, thinned
        so that all together need no more than GOAL_BYTES, and its means (C,)."""
        original, names = setting.original or setting.network, matched(setting.network)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
        step = 0
        for x, *_ in setting.norm_data:
            batch = outputs(original, names, x)
            if not step:  # the first batch tells how much there will be
                size = 2 * len(setting.norm_data) * sum(z.numel() for z in batch.values())
                step = max(1, math.ceil((size / GOAL_BYTES) ** 0.5))
            for name, z in batch.items():
                z = z.to(self.arithmetic.device, self.arithmetic.dtype)
                mean = z.mean([d for d in range(z.ndim) if d != 1])
                z = z[:, :, ::step, ::step] if z.ndim == 4 else z
                z = z.to(torch.float16) if self.arithmetic.dtype == torch.float32 else z
                found[name].append((self.ready(z, z.dtype), mean))
        return found

    def ready(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A batch of images on the device, in the layout that kernels like best."""
        x = x.to(self.arithmetic.device, dtype or self.arithmetic.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def forget(self) -> None:
        """Drop what earlier candidates have found out: activations and norm statistics."""
        self.shelf.clear(), self._statistics.clear()

    def program(self, policy: CompressionPolicy) -> Program:
        """Raises Unfit where only the reference can run this network."""
        strange = [name for name, module in self.modules.items() if isinstance(module, _BatchNorm)]
        if strange:
            raise Unfit(f"{strange[0]} normalises channels that are not known, or by each batch alone")
        if self.norm_data and self._again:
            raise Unfit(f"{self._again[0]} is called again: what is kept would depend on what comes later")
        alive, skipped = policy.alive(self.network), policy.skipped(self.network)
        key = alive.tobytes(), skipped.layers
        if key in self._skeletons:
            self._skeletons.move_to_end(key)
        else:
            self._skeletons[key] = skeleton(self.network, *smaller_graph(self.network, alive, skipped))
            while len(self._skeletons) > SKELETONS:
                self._skeletons.popitem(last=False)
        return Builder(
            self.network, self.calibration, self.bank, self.arithmetic, self.modules, self.goals,
            self._skeletons[key], policy,
        ).program()  # fmt: skip

    def estimate_norms(self, program: Program, each: Each) -> None:
        """Correct every batch-norm (see `ajpq.correction`) by means over the batches of `norm_data`, each of which
        normalises by its own on the way; what an earlier candidate with the same prefix has found is taken over."""
        if not self.norm_data or not program.norms:
            return
        keys = {name: program.statistics_key(name) for name in program.norms}
        missing = {name for name, key in keys.items() if key not in self._statistics}
        places = [i for i, step in enumerate(program.steps) if step.norm in missing]
        if places:
            seen = each(lambda b: self._observe(program, b, min(places), max(places)), range(len(self.norm_data)))
            sums: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in missing}
            for batch in seen:
                for name, *found in batch:
                    if name in missing:
                        sums[name].append(tuple(found))
            for name, found in sums.items():
                self._statistics[keys[name]] = tuple(torch.stack(part).mean(0) for part in zip(*found, strict=True))
        for name, norm in program.norms.items():
            self._statistics.move_to_end(keys[name])
            norm.set(*self._statistics[keys[name]])
        while len(self._statistics) > STATISTICS:
            self._statistics.popitem(last=False)
        for step in program.steps:
            if step.fold is not None:
                step.fold()

    def _observe(self, program: Program, batch: int, first: int, last: int) -> list[tuple[Any, ...]]:
        found = []

        def run(place: int, values: list[Any]) -> Any:
            step = program.steps[place]
            if step.observe is None:
                return step.run(*values)
            y, *parts = step.observe(batch, *values)
            found.append((step.norm, *parts))
            return y

        self._run(program, self.norm_data[batch], ("norm", batch), run, first, last + 1)
        return found

    def logits(self, program: Program, x: Tensor, batch: int) -> Tensor:
        """Outputs for one prepared batch; batch: its number, under which activations are kept."""
        steps = program.steps
        end = len(steps)
        return self._run(program, x, ("search", batch), lambda i, values: steps[i].run(*values), end, end)

    def _run(
        self, program: Program, x: Tensor, place: tuple, run: Callable[[int, list], Any], latest: int, end: int
    ) -> Any:
        """Steps up to `end`, from the deepest cut, `latest` or before, whose values are all kept."""
        with torch.inference_mode():
            start, values = self._resume(program, place, latest)
            values[program.input] = x
            worth = sum(step.work for step in program.steps[:start])
            for i in range(start, end):
                step = program.steps[i]
                read = [values[name] for name in step.reads]
                value = values[step.out] = run(i, read)
                worth += step.work
                self.in_flight = max(self.in_flight, sum(map(size_of, values.values())))
                if not step.cheap and i + 1 < end and not _is_view(value, read):
                    self.shelf.offer((step.key, *place), value, worth, step.key)
                for name in program.dead[i]:
                    values.pop(name, None)
            self.shelf.settle()
            return values.get(program.output)

    def _resume(self, program: Program, place: tuple, latest: int) -> tuple[int, dict[str, Any]]:
        if self.shelf.capacity:
            for i in range(min(latest, len(program.steps) - 1), 0, -1):
                names = [name for name in program.live[i] if name != program.input]
                keys = [(program.keys[name], *place) for name in names]
                if self.shelf.holds(keys) and (found := self.shelf.take(keys)) is not None:
                    return i, dict(zip(names, found, strict=True))
        return 0, {}


def _is_view(value: Any, read: list[Any]) -> bool:
    """Whether the value lies in the memory of what it was made from, and is made again at no cost."""
    if not isinstance(value, Tensor):
        return False
    place = value.untyped_storage().data_ptr()
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == place for t in read)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
