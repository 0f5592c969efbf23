"""The walk over the graph: runs the network on an example and finds out what becomes of every channel. It is total:
whatever it does not know makes the channels involved not prunable, with the reason kept, and never loses a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from ajpq import moves, ops
from ajpq.channels import ChannelSets, Value, flat
from ajpq.errors import AjpqError
from ajpq.network import LayerSpec, Move
from ajpq.rules import channelwise

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)


class Walk(fx.Interpreter):
    """Runs the graph on the example and carries a `Value` beside every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sets = ChannelSets()
        self.values: dict[str, Any] = {}  # node name -> Value, or a list of them for an operation with several outputs
        self.moves: dict[str, Move] = {}
        self.layers: dict[str, LayerSpec] = {}
        self.norm_nodes: dict[str, list[fx.Node]] = {}
        self.norm_channels: dict[str, np.ndarray] = {}
        self.layer_nodes: dict[str, list[fx.Node]] = {}
        self.fault: fx.Node | None = None  # the node whose bookkeeping, not whose execution, is under way

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        self.fault = node
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        self._flow(node, args, kwargs, out)
        self.fault = None
        return out

    # -- one node -----------------------------------------------------------------------------------------------------

    def _flow(self, node: fx.Node, args: tuple, kwargs: dict, out: Any) -> None:
        inputs = [value for n in node.all_input_nodes for value in flat(self.values.get(n.name))]
        if node.op == "placeholder":
            if not isinstance(out, Tensor) or out.ndim < 2:
                raise AjpqError(
                    f"forward must take one tensor (N, C, ...), but argument {node.target!r} is {out!r}; wrap "
                    "the module"
                )
            self.set(node, out, self.sets.fresh(out.shape[1], "network input"))
            return
        if node.op == "output":
            for value in inputs:
                self._freeze(value, "network output")
            return
        if node.op == "get_attr":
            return
        module = self.fetch_attr(node.target) if node.op == "call_module" else None
        name = ops.name_of(node, module)
        if not inputs or not any(isinstance(t, Tensor) for t in _leaves(out)):
            if any(isinstance(t, Tensor) for t in _leaves(out)):
                self._unknown(node, module, [], out)
            return
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            self._layer(node, module, inputs[0], out)
        elif isinstance(module, NORMS) and module.running_mean is not None and inputs[0].ids is not None:
            self.norm_nodes.setdefault(node.target, []).append(node)
            if node.target in self.norm_channels:
                self.sets.unite(self.norm_channels[node.target], inputs[0].ids)
            self.norm_channels[node.target] = inputs[0].ids
            self.sets.note(self.sets.norms, inputs[0].ids, node.target)
            self.set(node, out, inputs[0].ids)
        elif name in ops.MOVE:
            self._move(node, module, name, args, kwargs, out)
        elif not channelwise(self, node, module, name, args, kwargs, inputs, out):
            self._unknown(node, module, inputs, out)
        made = self.values.get(node.name)
        if ops.in_place(node, module) and isinstance(made, Value):
            for value in (inputs[0], self.values[inputs[0].root]):
                value.zero = value.zero and made.zero
            move = self.moves.get(node.all_input_nodes[0].name)
            if move is not None and move.kind == "gather" and (np.diff(move.index) != 1).any():
                root = self.values[move.root]  # a gather copies where the original may have been a view
                self.sets.freeze(root.ids, f"{ops.told(node, module)} writes into a part of it")

    def _layer(self, node: fx.Node, module: nn.Conv2d | nn.Linear, value: Value, out: Tensor) -> None:
        name, conv = str(node.target), isinstance(module, nn.Conv2d)
        c_in, c_out = (module.in_channels, module.out_channels) if conv else (module.in_features, module.out_features)
        groups = module.groups if conv else 1
        depthwise = conv and groups == c_in and groups > 1
        if conv:
            plain = value.ids is not None and len(value.shape) == 4
        else:  # on (N, ..., C)
            plain = (value.ids is not None or value.planned) and value.axis == len(value.shape) - 1
        if not plain:
            self._freeze(value, f"{name} reads it as a tensor of shape (N, {', '.join(map(str, value.shape[1:]))})")
        elif not value.zero:
            self._freeze(value, f"a removed channel would not be zero where {name} reads it")
        reads = value.along_axis if plain else self.sets.fresh(c_in, f"input of {name}")
        known = self.layers.get(name)
        if depthwise:
            writes = np.repeat(reads, c_out // c_in)
        else:
            unusual = f"{name} is not applied to (N, C, H, W)" if conv and not plain else ""
            writes = known.writes if known else self.sets.fresh(c_out, unusual)
        if known:  # a module called twice: one set of kernels
            self.sets.unite(known.reads, reads)
            self.sets.unite(known.writes, writes)
        if groups > 1 and not depthwise:  # a dense grouped conv needs equally many channels in every group
            for ids in (reads, writes):
                grouped = ids.reshape(groups, -1)
                for other in grouped[1:]:
                    self.sets.unite(grouped[0], other)
        self.sets.note(self.sets.writers, writes, name)
        hw = tuple(out.shape[2:]) if conv else (1, 1)
        positions = int(np.prod(hw)) if conv else int(np.prod(out.shape[1:-1]))
        self.layer_nodes.setdefault(name, []).append(node)
        self.layers[name] = LayerSpec(
            name,
            "depthwise" if depthwise else "conv" if conv else "linear",
            c_in,
            c_out,
            groups,
            module.kernel_size if conv else (1, 1),
            module.stride if conv else (1, 1),
            hw,
            positions + (known.positions if known else 0),
            reads,
            writes,
            module.bias is not None,
        )
        if conv or out.ndim <= 2:
            self.set(node, out, writes)
        else:
            self.set_cells(node, out, np.broadcast_to(writes, tuple(out.shape[1:])))

    def _move(self, node: fx.Node, module: nn.Module | None, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        source = self.values.get(node.all_input_nodes[0].name)
        if isinstance(source, list):  # x.chunk(2)[0]
            picked = source[args[1]] if name == "getitem" and isinstance(args[1], int) else None
            if picked is None or not isinstance(out, Tensor):
                self._unknown(node, module, flat(source), out)
                return
            if picked.cells is None:  # one of several outputs of an unknown operation
                self.set(node, out, picked.ids, picked.zero)
                return
            self.values[node.name] = outs = picked
            self._plan(node, module, name, None, args, kwargs, None, outs)
            return

        def run(index: Tensor, a: tuple, k: dict) -> Any:
            if module is not None:
                return module(index)
            k = {key: value for key, value in k.items() if key != "input"}
            return (
                node.target(index, *a[1:], **k)
                if node.op == "call_function"
                else getattr(index, node.target)(*a[1:], **k)
            )

        index = run(moves.index_of(source), args, kwargs) if source is not None else None
        several = isinstance(index, (tuple, list))
        parts = (
            []
            if source is None
            else [moves.moved(source, self.values[source.root], t) for t in (index if several else (index,))]
        )
        if not parts or any(part is None for part in parts):
            self._unknown(node, module, [] if source is None else [source], out)
            return
        self.values[node.name] = parts if several else parts[0]
        if not several:
            emitted = source.cells is None or source.planned
            self._plan(node, module, name, run, args, kwargs, source if emitted else None, parts[0])

    def _plan(
        self, node: fx.Node, module: nn.Module | None, name: str, run: Any, args: tuple, kwargs: dict,
        source: Value | None, out: Value,
    ) -> None:  # fmt: skip
        """Note how a moved value will be re-emitted. Without a way its whole root must stay as it is, unless it is
        only an intermediate of several dimensions, from which a gather may still lead back to channels."""
        move = moves.plan(node, name, run, args, kwargs, source, out, self.values[out.root])
        if move is not None:
            out.planned = True
            self.moves[node.name] = move
        elif out.ids is not None:
            self._freeze(out, f"{ops.told(node, module)} mixes channels with positions")

    def _unknown(self, node: fx.Node, module: nn.Module | None, inputs: list[Value], out: Any) -> None:
        told = ops.told(node, module)
        for value in inputs:
            self._freeze(value, f"{told} is not known to keep channels apart")
        values = [
            Value(
                tuple(t.shape),
                self.sets.fresh(t.shape[1], f"output of {told}")
                if t.ndim > 1
                else self.sets.fresh(1, f"output of {told}"),
                True,
                node.name,
            )
            for t in _leaves(out)
            if isinstance(t, Tensor)
        ]
        if isinstance(out, Tensor):
            self.values[node.name] = values[0]
        elif len(values) == len(list(_leaves(out))):
            self.values[node.name] = values

    # -- helpers ------------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, out: Tensor, ids: np.ndarray, zero: bool = True) -> None:
        self.values[node.name] = Value(tuple(out.shape), ids, zero, node.name)

    def set_cells(self, node: fx.Node, out: Tensor, cells: np.ndarray, zero: bool = True) -> None:
        """A tensor whose channels lie along another dimension than 1; cells as in `Value`."""
        self.values[node.name] = Value(tuple(out.shape), None, zero, node.name, cells=cells, planned=True)

    def _freeze(self, value: Value, why: str) -> None:
        """Freeze the channels of a value; all of its root's where it cannot be re-emitted for fewer of them."""
        bound = value if value.planned or value.cells is None else self.values[value.root]
        self.sets.freeze(bound.cells if bound.ids is None else bound.ids, why)


def _leaves(out: Any) -> list[Any]:
    return [leaf for part in out for leaf in _leaves(part)] if isinstance(out, (tuple, list)) else [out]
