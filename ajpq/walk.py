"""The walk over the graph: runs the network on an example and finds out what becomes of every channel. It is total:
whatever it does not know makes the channels involved not prunable, with the reason kept, and never loses a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ajpq import moves, ops
from ajpq.channels import ChannelSets, Value
from ajpq.errors import AjpqError
from ajpq.network import LayerSpec, Move

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
        inputs = [value for n in node.all_input_nodes for value in _flat(self.values.get(n.name))]
        if node.op == "placeholder":
            if not isinstance(out, Tensor) or out.ndim < 2:
                raise AjpqError(
                    f"forward must take one tensor (N, C, ...), but argument {node.target!r} is {out!r}; wrap "
                    "the module"
                )
            self._set(node, out, self.sets.fresh(out.shape[1], "network input"))
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
            self._set(node, out, inputs[0].ids)
        elif name in ops.MOVE:
            self._move(node, module, name, args, kwargs, out)
        elif not self._channelwise(node, module, name, args, kwargs, inputs, out):
            self._unknown(node, module, inputs, out)
        made = self.values.get(node.name)
        if ops.in_place(node, module) and isinstance(made, Value):
            for value in (inputs[0], self.values[inputs[0].root]):
                value.zero = value.zero and made.zero
            move = self.moves.get(node.all_input_nodes[0].name)
            if move is not None and move.kind == "gather" and (np.diff(move.index) != 1).any():
                root = self.values[move.root]  # a gather copies where the original may have been a view
                self.sets.freeze(root.ids, f"{ops.told(node, module)} writes into a part of it")

    def _channelwise(
        self,
        node: fx.Node,
        module: nn.Module | None,
        name: str,
        args: tuple,
        kwargs: dict,
        inputs: list[Value],
        out: Any,
    ) -> bool:
        """Operations that keep channels where they are, merge or list them. False if this is none of them."""
        if not isinstance(out, Tensor) or any(value.ids is None for value in inputs):
            return False
        first = inputs[0]
        scalar_const = all(t.numel() == 1 for t in self._constants(node))
        if name in ops.ELEMENTWISE or (len(inputs) == 1 and name in (ops.MERGE | ops.DIVIDE) and scalar_const):
            if (
                len(inputs) > 1
                or out.shape != first.shape
                or (name == "prelu" and module is not None and module.weight.numel() > 1)
            ):
                return False
            self._set(node, out, first.ids, first.zero and self._keeps_zero(node, args, kwargs, first.shape))
        elif name in ops.SPATIAL:
            if out.ndim != len(first.shape) or out.shape[1] != first.shape[1]:
                return False
            self._set(node, out, first.ids, first.zero)
        elif name in ops.MERGE and len(inputs) == len(node.all_input_nodes) and kwargs.get("alpha", 1) == 1:
            return self._merge(node, name, inputs, out)
        elif name in ops.CONCAT:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.ndim
            given = node.args[0] if node.args else node.kwargs.get("tensors", ())
            nodes = [given] if isinstance(given, fx.Node) else given  # one node that gives a list, or a list of nodes
            listed = [value for n in nodes for value in _flat(self.values.get(n.name))]
            if dim == 0 or len(listed) != len(args[0] if args else kwargs.get("tensors", ())):
                return False
            if dim != 1:
                for value in listed[1:]:
                    self.sets.unite(first.ids, value.ids)
            ids = np.concatenate([value.ids for value in listed]) if dim == 1 else first.ids
            self._set(node, out, ids, all(value.zero for value in listed))
        elif name in ops.EXPAND:
            other = inputs[-1]
            if len(inputs) > 2 or out.shape != other.shape or len(first.ids) != len(other.ids):
                return False
            self.sets.unite(first.ids, other.ids)
            self._set(node, out, first.ids, first.zero)
        elif name in ops.PAD:
            return self._pad(node, module, args, kwargs, first, out)
        elif name in ops.REDUCE:
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = [dims] if isinstance(dims, int) else dims
            if dims is None or any(d % len(first.shape) < 2 for d in dims):
                return False
            self._set(node, out, first.ids, first.zero)
        else:
            return False
        return True

    def _layer(self, node: fx.Node, module: nn.Conv2d | nn.Linear, value: Value, out: Tensor) -> None:
        name, conv = str(node.target), isinstance(module, nn.Conv2d)
        c_in, c_out = (module.in_channels, module.out_channels) if conv else (module.in_features, module.out_features)
        groups = module.groups if conv else 1
        depthwise = conv and groups == c_in and groups > 1
        plain = value.ids is not None and len(value.shape) == (4 if conv else 2)
        if not plain:
            self._freeze(value, f"{name} reads it as a tensor of shape (N, {', '.join(map(str, value.shape[1:]))})")
        elif not value.zero:
            self._freeze(value, f"a removed channel would not be zero where {name} reads it")
        reads = value.ids if plain else self.sets.fresh(c_in, f"input of {name}")
        known = self.layers.get(name)
        if depthwise:
            writes = np.repeat(reads, c_out // c_in)
        else:
            writes = (
                known.writes if known else self.sets.fresh(c_out, "" if plain else f"{name} is not applied to (N, C)")
            )
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
        if plain:
            self._set(node, out, writes)
        else:
            self._set(node, out, self.sets.fresh(out.shape[1], f"output of {name}") if conv is False else writes)
            if not conv:
                self.sets.freeze(writes, f"{name} is applied to more than (N, C)")

    def _merge(self, node: fx.Node, name: str, inputs: list[Value], out: Tensor) -> bool:
        if len(inputs) == 1:  # x + x, x * x
            inputs = inputs * 2
        a, b = inputs
        if (
            len(inputs) != 2
            or len(a.shape) != len(b.shape)
            or a.shape[0] != b.shape[0]
            or out.shape[1] != max(a.shape[1], b.shape[1])
        ):
            return False
        zero = (a.zero or b.zero) if name.strip("i") in ("mul", "multiply") else (a.zero and b.zero)
        if a.shape[1] == b.shape[1]:
            self.sets.unite(a.ids, b.ids)
            self._set(node, out, a.ids, zero)
        else:
            one, many = (a, b) if a.shape[1] == 1 else (b, a)
            self.sets.freeze(one.ids, f"{node.name} broadcasts it over channels")
            self._set(node, out, many.ids, many.zero if "mul" in name else False)
        return True

    def _pad(
        self, node: fx.Node, module: nn.Module | None, args: tuple, kwargs: dict, value: Value, out: Tensor
    ) -> bool:
        if module is not None:
            pads, fill, mode = list(module.padding), getattr(module, "value", 0), "constant"
        else:
            pads = list(kwargs.get("pad", args[1] if len(args) > 1 else ()))
            mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
            fill = kwargs.get("value", args[3] if len(args) > 3 else 0) or 0
        pads += [0] * (2 * out.ndim - len(pads))
        channel = pads[2 * (out.ndim - 2) : 2 * (out.ndim - 1)]  # pads are listed from the last dimension backwards
        if any(pads[2 * (out.ndim - 1) :]) or min(channel) < 0:
            return False
        if not any(channel):
            self._set(node, out, value.ids, value.zero and (fill == 0 or mode != "constant"))
            return True
        if mode != "constant" or fill != 0:
            return False
        before, after = (self.sets.fresh(n) for n in channel)
        self._set(node, out, np.concatenate([before, value.ids, after]), value.zero)
        self.moves[node.name] = Move("pad", value.root, np.array(pads))
        return True

    def _move(self, node: fx.Node, module: nn.Module | None, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        source = self.values.get(node.all_input_nodes[0].name)
        if isinstance(source, list):  # x.chunk(2)[0]
            picked = source[args[1]] if name == "getitem" and isinstance(args[1], int) else None
            if picked is None or not isinstance(out, Tensor):
                self._unknown(node, module, _flat(source), out)
                return
            if picked.cells is None:  # one of several outputs of an unknown operation
                self._set(node, out, picked.ids, picked.zero)
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

    def _set(self, node: fx.Node, out: Tensor, ids: np.ndarray, zero: bool = True) -> None:
        self.values[node.name] = Value(tuple(out.shape), ids, zero, node.name)

    def _freeze(self, value: Value, why: str) -> None:
        """Freeze the channels of a value; all of its root's where it cannot be re-emitted for fewer of them."""
        bound = value if value.planned or value.cells is None else self.values[value.root]
        self.sets.freeze(bound.cells if bound.ids is None else bound.ids, why)

    def _constants(self, node: fx.Node) -> list[Tensor]:
        found = [self.env[n] for n in node.all_input_nodes if n.name not in self.values and n in self.env]
        return [t for t in found if isinstance(t, Tensor)]

    def _keeps_zero(self, node: fx.Node, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> bool:
        def swap(a: Any) -> Any:
            return torch.zeros(shape) if isinstance(a, Tensor) and tuple(a.shape) == shape else a

        return not bool(
            getattr(self, node.op)(node.target, tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}).any()
        )


def _flat(value: Any) -> list[Value]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _leaves(out: Any) -> list[Any]:
    return [leaf for part in out for leaf in _leaves(part)] if isinstance(out, (tuple, list)) else [out]
