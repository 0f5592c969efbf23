"""Networks of one layer as ONNX models, written node by node: what a latency table measures.

A model is a stem, a 1x1 convolution of one channel, then `copies` of the layer side by side that all read it, each
followed by a pooling that keeps one pixel per channel. So the layer reads and writes in the layout that the runtime has
inside a whole network. What the stem, the poolings and the call of the runtime take goes away in the difference of two
numbers of copies, where the smaller has as many poolings as the larger. In int8 the layer stands between QuantizeLinear
and DequantizeLinear with uint8 activations, as in the files that `ajpq.onnx_export` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from ajpq.layers import Geometry
from ajpq.network import LayerSpec, Network
from ajpq.onnx_export import OPSET
from ajpq.onnx_fours import FOUR
from ajpq.onnx_layers import NARROW

PRECISIONS = ("float32", "int8")
_IR = 10
_RELUS = {"relu": "relu", "relu_": "relu", "ReLU": "relu", "relu6": "relu6", "ReLU6": "relu6"}


@dataclass(frozen=True)
class Shape:
    """All of a call of a layer that its time depends on, but for the numbers of channels and the precision."""

    kind: str  # "conv", "depthwise" or "linear"
    hw: tuple[int, int]  # pixels of the input; (rows per image, 1) for linear
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1  # kernels per input channel for depthwise
    bias: bool = True
    relu: str = ""  # "relu" or "relu6" where that alone reads the layer, or its folded batch-norm

    def __str__(self) -> str:
        sizes = (self.hw, self.kernel, self.stride, self.pads, self.dilation)
        text = " ".join("x".join(map(str, size)) for size in sizes)
        return f"{self.kind} {text} {self.groups} {'bias' if self.bias else 'plain'} {self.relu or 'linear'}"

    @property
    def out_hw(self) -> tuple[int, int]:
        top, left, bottom, right = self.pads
        sizes = zip(self.hw, self.kernel, self.stride, (top + bottom, left + right), self.dilation, strict=True)
        h, w = ((n + pad - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in sizes)
        return h, w


@dataclass(frozen=True)
class Point:
    """One thing to measure. inputs: channels of a kernel (1 for depthwise); outputs: kernels."""

    shape: Shape
    inputs: int
    outputs: int
    precision: str  # one of PRECISIONS

    def __str__(self) -> str:
        return f"{self.shape} {self.inputs}>{self.outputs} {self.precision}"

    @property
    def macs(self) -> int:
        """Per image."""
        shape = self.shape
        pixels = shape.hw if shape.kind == "linear" else shape.out_hw
        return pixels[0] * pixels[1] * shape.kernel[0] * shape.kernel[1] * self.inputs * self.outputs


class _Calls(fx.Interpreter):
    """Runs a network and notes every call of its layers."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module)
        self.network = network
        self.folded = {norm.name for norm in network.norms if norm.folds_into}
        self.found: dict[str, list[Shape]] = {layer.name: [] for layer in network.layers}

    def run_node(self, node: fx.Node) -> object:
        if node.op == "call_module" and node.target in self.found:
            x = self.fetch_args_kwargs_from_env(node)[0][0]
            shape = _shape(self.network[node.target], self.fetch_attr(node.target), x.shape)
            self.found[node.target].append(replace(shape, relu=self._relu(node)))
        return super().run_node(node)

    def _relu(self, node: fx.Node) -> str:
        if len(node.users) != 1:
            return ""
        (reader,) = node.users
        if reader.op == "call_module":
            if reader.target in self.folded:
                return self._relu(reader)
            return _RELUS.get(type(self.fetch_attr(reader.target)).__name__, "")
        return _RELUS.get(getattr(reader.target, "__name__", str(reader.target)), "")


@torch.no_grad()
def calls_of(network: Network) -> Mapping[str, list[Shape]]:
    """Layer name -> the shapes that it is called with on `network.example`; several where a module is used again."""
    calls = _Calls(network)
    calls.run(network.example)
    return calls.found


def _shape(layer: LayerSpec, module: nn.Module, size: torch.Size) -> Shape:
    if layer.kind == "linear":
        return Shape("linear", (size[1:-1].numel(), 1), bias=layer.bias)
    geometry = Geometry.of(module)
    if geometry.padding == "same":
        total = [d * (k - 1) for d, k in zip(geometry.dilation, layer.kernel, strict=True)]
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        pads = (0, 0, 0, 0) if geometry.padding == "valid" else (*geometry.padding, *geometry.padding)
    groups = layer.c_out // layer.c_in if layer.kind == "depthwise" else geometry.groups
    hw = (int(size[2]), int(size[3]))
    return Shape(layer.kind, hw, layer.kernel, layer.stride, pads, geometry.dilation, groups, layer.bias)


def empty_model() -> bytes:
    """A model that does next to nothing, for "images" of one number: what a call of the runtime takes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "outputs")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["outputs"])], "empty", ends[:1], ends[1:])
    return _written(graph)


def model_of(point: Point, copies: int, poolings: int = 1) -> bytes:
    """An ONNX model; its input "images" is what `images_of` gives. poolings: behind every copy; linear layers have
    none."""
    if point.shape.kind == "linear":
        return _Linear(point).model(copies)
    return _Conv(point).model(copies, poolings)


def images_of(point: Point, batch: int) -> np.ndarray:
    """Noise: (batch, 1, H, W), for a linear layer (rows, features); uint8 for int8, otherwise float32."""
    shape = (batch, 1, *point.shape.hw)
    if point.shape.kind == "linear":
        shape = (batch * point.shape.hw[0], point.inputs)
    values = np.random.default_rng(0).integers(0, 256, shape)
    return values.astype(np.uint8) if point.precision == "int8" else ((values - 128) / 64).astype(np.float32)


class _Model:
    """Nodes and initializers of a model in the making."""

    def __init__(self, point: Point) -> None:
        self.point, self.shape, self.int8 = point, point.shape, point.precision == "int8"
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.step = self.tensor("step", np.float32(0.02))
        self.zero = {n: self.tensor(f"zero{n}", np.uint8(n)) for n in (0, 128)}

    def tensor(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def weight(self, name: str, shape: tuple[int, ...], axis: int, coded: bool = True) -> str:
        values = (self.random.random(shape, np.float32) - 0.5) * np.sqrt(12 * shape[axis] / np.prod(shape))
        if not self.int8 or not coded:
            return self.tensor(name, values.astype(np.float32))
        codes = np.clip(np.round(values / np.abs(values).max() * 127), -127, 127).astype(np.int8)
        scale = self.tensor(f"{name}_scale", np.full(shape[axis], np.abs(values).max() / 127, np.float32))
        zero = self.tensor(f"{name}_zero", np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", [self.tensor(f"{name}_codes", codes), scale, zero], name, axis=axis)

    def bias(self, name: str) -> str:
        return self.tensor(name, (self.random.standard_normal(self.point.outputs) / 8).astype(np.float32))

    def dequantized(self, name: str, zero: int) -> str:
        return self.node("DequantizeLinear", [name, self.step, self.zero[zero]], f"{name}_values")

    def finished(self, shape: list[int | str], ends: list[str], kind: int, dims: list[int | str]) -> bytes:
        source = TensorProto.UINT8 if self.int8 else TensorProto.FLOAT
        images = helper.make_tensor_value_info("images", source, shape)
        outputs = [helper.make_tensor_value_info(end, kind, dims) for end in ends]
        graph = helper.make_graph(self.nodes, "layer", [images], outputs, self.tensors)
        return _written(graph)


def _written(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR)
    return model.SerializeToString()


class _Conv(_Model):
    @property
    def inputs(self) -> int:
        """Of a kernel; in int8 in fours, as `onnx_fours` fills them."""
        fours = self.int8 and self.shape.kind == "conv" and self.shape.groups == 1
        return -(-self.point.inputs // FOUR) * FOUR if fours else self.point.inputs

    def model(self, copies: int, poolings: int) -> bytes:
        point, shape = self.point, self.shape
        depthwise = shape.kind == "depthwise"
        c_in = point.outputs // shape.groups if depthwise else self.inputs * shape.groups
        x = self.dequantized("images", 128) if self.int8 else "images"
        x = self.convolved(x, "stem", self.weight("stem", (c_in, 1, 1, 1), 0), None, "relu")
        ends = []
        for i in range(copies):
            y = self.layer(x, f"layer{i}", c_in if depthwise else shape.groups)
            ends += [self.pixel(y, f"layer{i}_{j}", j) for j in range(poolings)]
        kind = TensorProto.UINT8 if self.int8 else TensorProto.FLOAT
        return self.finished(["n", 1, *shape.hw], ends, kind, ["n", point.outputs, 1, 1])

    def layer(self, x: str, name: str, groups: int) -> str:
        point, shape = self.point, self.shape
        narrow = self.int8 and shape.kind == "depthwise" and point.outputs < NARROW  # as in the files that are shipped
        if narrow:
            ends = [self.tensor(f"{name}_{end}", np.float32(end)) for end in (-128 * 0.02, 127 * 0.02)]
            x = self.node("Clip", [x, *ends], f"{name}_input")
        weight = self.weight(name, (point.outputs, self.inputs, *shape.kernel), 0, coded=not narrow)
        bias = self.bias(f"{name}_bias") if shape.bias else None
        return self.convolved(
            x, name, weight, bias, shape.relu, kernel_shape=shape.kernel, strides=shape.stride, pads=shape.pads,
            dilations=shape.dilation, group=groups,
        )  # fmt: skip

    def pixel(self, y: str, name: str, number: int) -> str:
        """The first pixel of every channel. Strides differ by number, as runtimes merge equal poolings."""
        strides = [size + number for size in self.shape.out_hw]
        pixel = self.node("MaxPool", [y], f"{name}_pixel", kernel_shape=(1, 1), strides=strides)
        if not self.int8:
            return pixel
        zero = self.zero[0 if self.shape.relu else 128]
        return self.node("QuantizeLinear", [pixel, self.step, zero], f"{name}_pixel_codes")

    def convolved(self, x: str, name: str, weight: str, bias: str | None, relu: str, **geometry: object) -> str:
        """Values of a convolution and its ReLU; in int8 rounded to codes and back."""
        y = self.node("Conv", [x, weight, *([bias] if bias else [])], f"{name}_sum", **geometry)
        if relu == "relu":
            y = self.node("Relu", [y], f"{name}_relu")
        elif relu == "relu6":
            limits = [self.tensor(f"{name}_{end}", np.float32(end)) for end in (0, 6)]
            y = self.node("Clip", [y, *limits], f"{name}_relu")
        if not self.int8:
            return y
        zero = 0 if relu else 128
        return self.dequantized(self.node("QuantizeLinear", [y, self.step, self.zero[zero]], f"{name}_codes_out"), zero)


class _Linear(_Model):
    def model(self, copies: int) -> bytes:
        point = self.point
        x = self.dequantized("images", 128) if self.int8 else "images"
        ends = [self.layer(x, f"layer{i}") for i in range(copies)]
        return self.finished(["n", point.inputs], ends, TensorProto.FLOAT, ["n", point.outputs])

    def layer(self, x: str, name: str) -> str:
        """A float layer is one Gemm; in int8 the bias is of integers, as in the files that are shipped."""
        point, shape = self.point, self.shape
        if not self.int8:
            weight = self.weight(name, (point.outputs, point.inputs), 0)
            inputs = [x, weight, *([self.bias(f"{name}_bias")] if shape.bias else [])]
            y = self.node("Gemm", inputs, f"{name}_sum", transB=1)
        else:
            y = self.node("MatMul", [x, self.weight(name, (point.inputs, point.outputs), 1)], f"{name}_sum")
            if shape.bias:
                y = self.node("Add", [y, self._whole_bias(name)], f"{name}_biased")
        return self.node("Relu", [y], f"{name}_relu") if shape.relu else y

    def _whole_bias(self, name: str) -> str:
        n = self.point.outputs
        scale = next(numpy_helper.to_array(t) for t in self.tensors if t.name == f"{name}_scale") * np.float32(0.02)
        inputs = [
            self.tensor(f"{name}_bias", self.random.integers(-999, 999, n).astype(np.int32)),
            self.tensor(f"{name}_bias_scale", scale),
            self.tensor(f"{name}_bias_zero", np.zeros(n, np.int32)),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_bias_values", axis=0)
