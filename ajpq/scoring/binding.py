"""Programs made: the weights of one policy, bound to the skeleton of its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import ops
from ajpq.bank import WeightBank
from ajpq.calibration import Calibration, range_of
from ajpq.layers import Geometry
from ajpq.network import LayerSpec, Network
from ajpq.policy import CompressionPolicy
from ajpq.quantize import FLOAT, container_scale
from ajpq.scoring.fusion import Group, Skeleton, Unfit, caller, inputs_of
from ajpq.scoring.kernels import FloatLayer, Floats, Grid, Int8Conv, LayerWeights
from ajpq.scoring.program import Norm, Program, Step, digest
from ajpq.surgery import kept_weights


class Builder:
    """Binds the weights of one policy to a skeleton."""

    def __init__(
        self, network: Network, calibration: Calibration, bank: WeightBank, arithmetic: Floats,
        modules: Mapping[str, nn.Module], goals: Mapping[str, list[tuple[Tensor, Tensor]]], skeleton: Skeleton,
        policy: CompressionPolicy,
    ) -> None:  # fmt: skip
        self.network, self.calibration, self.bank, self.arithmetic = network, calibration, bank, arithmetic
        self.modules, self.goals, self.skeleton, self.policy = modules, goals, skeleton, policy
        self.alive = policy.alive(network)
        self.tensors = {
            name: t.to(arithmetic.device, arithmetic.dtype if t.is_floating_point() else t.dtype)
            for name, t in skeleton.tensors.items()
        }
        self.steps: list[Step] = []
        self.keys: dict[str, bytes] = {skeleton.input.name: b"input"}
        self.norms: dict[str, Norm] = {}
        self.channels = {norm.name: norm.channels for norm in network.norms}

    def program(self) -> Program:
        if not isinstance(self.skeleton.output, fx.Node):
            raise Unfit("forward does not return one tensor")
        for group in self.skeleton.groups:
            if group.layer is not None:
                self._layer(group, self.network[group.layer])
            elif group.norm is not None:
                self._norm(group)
            else:
                self._other(group)
        return Program(self.steps, self.skeleton.input.name, self.skeleton.output.name, self.norms, self.keys)

    # -- layers -------------------------------------------------------------------------------------------------------

    def _layer(self, group: Group, layer: LayerSpec) -> None:
        source, grid = inputs_of(group.head)[0], self._grid(layer.name)
        reads = [source.name if grid is None else self._codes(source, grid)]
        if group.other is not None:
            reads.append(group.other.name)
        bits, kept = self.policy.weight_bits[layer.name], self.alive[layer.writes]
        kernel = self.arithmetic.layer(self._weights(layer), self._geometry(layer), grid)
        norm = None if group.norm is None else self._norm_of(group.norm)
        tail = [self._tail(node) for node in group.tail]
        relu = [ops.name_of(node, self._module(node)) == "relu" for node in group.tail]
        out = self._fused_grid(group, kernel, relu)
        run, observe = _layer_step(self.arithmetic, kernel, norm, tail, relu, out)
        fold = None if norm is None else lambda: kernel.affine(*norm.affine())
        if fold is not None:
            fold()
        key = digest(
            "layer", layer.name, bits[kept].tobytes(), _pattern(kept), _pattern(self.alive[layer.reads]), str(grid),
            *self._followers(group), *(self.keys[name] for name in reads),
        )  # fmt: skip
        work = layer.positions * kept.sum() * self.alive[layer.reads].sum() / layer.groups * np.prod(layer.kernel)
        self._add(Step(group.last.name, tuple(reads), key, run, group.norm, norm and observe, fold, work), out)

    def _weights(self, layer: LayerSpec) -> LayerWeights:
        bits, bias = self.policy.weight_bits[layer.name], self.network.module.get_submodule(layer.name).bias
        kernels, inputs = kept_weights(layer, self.alive)
        rows = np.flatnonzero(bits[kernels] == FLOAT)
        chosen = torch.from_numpy(kernels)
        widths = torch.from_numpy(bits[kernels])
        step = container_scale(widths, self.bank.scales(layer, bits)[chosen])
        step[torch.from_numpy(rows)] = 0
        raw = self.bank.weight(layer)[chosen[rows]][:, torch.from_numpy(inputs)] if len(rows) else None
        return LayerWeights(
            self.bank.gather(layer, bits, kernels, inputs),
            step,
            None if bias is None else bias.detach()[chosen],
            torch.from_numpy(rows) if len(rows) else None,
            raw,
        )

    def _geometry(self, layer: LayerSpec) -> Geometry:
        geometry = Geometry.of(self.network.module.get_submodule(layer.name))
        return replace(geometry, groups=int(self.alive[layer.reads].sum())) if layer.kind == "depthwise" else geometry

    def _grid(self, layer: str) -> Grid | None:
        bits = self.policy.act_bits[layer]
        if bits == FLOAT:
            return None
        seen = range_of(layer, bits, self.calibration)
        return Grid(bits, seen.signed, float(np.float32(seen.step(bits))))

    def _fused_grid(self, group: Group, kernel: Int8Conv | FloatLayer, relu: list[bool]) -> Grid | None:
        """The grid of all readers of the group's value, where they agree and the kernel can write codes."""
        readers = list(group.last.users)
        layers = all(n.op == "call_module" and n.target in self.network for n in readers)
        if not (kernel.fused and group.other is None and all(relu) and readers and layers):
            return None
        grids = {self._grid(str(n.target)) for n in readers}
        return grids.pop() if len(grids) == 1 else None

    def _codes(self, source: fx.Node, grid: Grid) -> str:
        name = _codes_name(source.name, grid)
        if name not in self.keys:
            key = digest("codes", str(grid), self.keys[source.name])
            self.keys[name] = key
            run = lambda x: self.arithmetic.quantize(x, grid)  # noqa: E731
            self.steps.append(Step(name, (source.name,), key, run, cheap=True))
        return name

    # -- everything else ----------------------------------------------------------------------------------------------

    def _norm(self, group: Group) -> None:
        norm, (source,) = self._norm_of(group.norm), inputs_of(group.head)
        tail = [self._tail(node) for node in group.tail]

        def run(x: Tensor) -> Tensor:
            gain, shift = (t.reshape(1, -1, *([1] * (x.ndim - 2))) for t in norm.affine())
            return _through(tail, torch.addcmul(shift, x, gain))

        def observe(number: int, x: Tensor) -> tuple[Tensor, ...]:
            y, *found = norm.batch(x, number)
            return _through(tail, y), *found

        pattern = _pattern(self.alive[self.channels[group.norm]]) if group.norm in self.channels else b""
        key = digest("norm", group.norm, pattern, *self._followers(group), self.keys[source.name])
        self._add(Step(group.last.name, (source.name,), key, run, group.norm, observe))

    def _other(self, group: Group) -> None:
        head, reads = group.head, tuple(n.name for n in inputs_of(group.head))
        call, tail = caller(head, self.modules, self.tensors), [self._tail(node) for node in group.tail]
        writes = ops.in_place(head, self._module(head))

        def run(*values: Any) -> Any:
            if writes:
                values = (values[0].clone(), *values[1:])
            return _through(tail, call(*values))

        self._add(Step(group.last.name, reads, digest(*self._followers(group), *self._said(head)), run))

    def _add(self, step: Step, out: Grid | None = None) -> None:
        self.keys[step.out] = step.key
        if out is not None:
            step.out, step.key = _codes_name(step.out, out), digest("codes", str(out), step.key)
            self.keys[step.out] = step.key
        self.steps.append(step)

    def _norm_of(self, name: str) -> Norm:
        if name not in self.norms:
            module = self.network.module.get_submodule(name)
            channels = self.channels.get(name)
            kept = np.arange(module.num_features) if channels is None else np.flatnonzero(self.alive[channels])
            self.norms[name] = Norm(module, torch.from_numpy(kept), self.arithmetic, self.goals.get(name))
        return self.norms[name]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.skeleton.modules[str(node.target)] if node.op == "call_module" else None

    def _tail(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        relu = ops.name_of(node, self._module(node)) == "relu"
        return torch.relu_ if relu else caller(node, self.modules, self.tensors)

    def _followers(self, group: Group) -> list[str]:
        absorbed = [node for node in group.nodes if node is not group.head]
        return [f"{node.op} {_target(node)} {_plain(node.args)} {_plain(node.kwargs)}" for node in absorbed]

    def _said(self, node: fx.Node) -> list[str]:
        """An operation and its arguments, values named by their keys, tensors by their bytes."""

        def told(n: fx.Node) -> str:
            if n.op != "get_attr":
                return self.keys[n.name].hex()
            tensor = self.skeleton.tensors[n.target]
            return digest(str(tensor.dtype), str(tensor.shape), tensor.detach().cpu().numpy().tobytes()).hex()

        said = fx.node.map_arg((node.args, node.kwargs), told)
        return [node.op, _target(node), repr(said)]


def _layer_step(
    arithmetic: Floats, kernel: Int8Conv | FloatLayer, norm: Norm | None, tail: list, relu: list[bool], out: Grid | None
) -> tuple[Callable, Callable]:
    first = bool(relu) and relu[0] and kernel.fused

    def run(x: Tensor, other: Tensor | None = None) -> Tensor:
        if out is not None:
            return kernel(x, out, bool(relu))
        if other is None:
            return _through(tail[1:], kernel(x, None, True)) if first else _through(tail, kernel(x))
        return _through(tail, _plus(kernel(x), other))

    def observe(number: int, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        y, *found = norm.batch(kernel.plain(x), number)
        y = _through(tail, y if other is None else _plus(y, other))
        return y if out is None else arithmetic.quantize(y, out), *found

    return run, observe


def _plus(y: Tensor, other: Tensor) -> Tensor:
    return y.add_(other) if y.shape == other.shape else y + other


def _through(tail: list[Callable[[Tensor], Tensor]], y: Tensor) -> Tensor:
    for function in tail:
        y = function(y)
    return y


def _codes_name(value: str, grid: Grid) -> str:
    return f"{value}|{grid.bits}{'s' if grid.signed else 'u'}{grid.step!r}"


def _target(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else f"{target.__module__}.{getattr(target, '__qualname__', target)}"


def _plain(args: Any) -> str:
    return repr(fx.node.map_arg(args, lambda n: "-"))


def _pattern(kept: np.ndarray) -> bytes:
    return np.packbits(kept).tobytes()
