"""The QONNX file: every kernel and activation at its own width, and weights that come out bit by bit."""

import functools

import numpy as np
import onnx
import pytest
import torch
from nets import conv, images_of, network_of, random_policy, traced
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import fx

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.layers import FrozenLayer
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.qonnx_export import DOMAIN, to_qonnx
from ajpq.shipping import load, ship

both = pytest.mark.parametrize("per_kernel", [True, False])


class Quant(OpRun):
    """The definition, in numpy."""

    op_domain = DOMAIN

    def _run(self, x, scale, zero, bits, signed, narrow, rounding_mode):
        assert rounding_mode == "ROUND" and bits.ndim == 0 and not (signed and bits == 1)
        low = -(2.0 ** (bits - 1)) + narrow if signed else 0
        high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
        values = (np.round(np.clip(x / scale + zero, low, high)) - zero) * scale
        return (values.astype(np.float32),)


class BipolarQuant(OpRun):
    op_domain = DOMAIN

    def _run(self, x, scale):
        return (np.where(x >= 0, scale, -scale).astype(np.float32),)


def frozen(network: Network, images: torch.Tensor, sparsity: float = 0.3, **choices) -> fx.GraphModule:
    policy = random_policy(network, 0, sparsity, **choices)
    return freeze(compress(network, policy, calibrate(network, [(images, None)])))


def layers_of(network: fx.GraphModule) -> list[FrozenLayer]:
    parts = [network.get_submodule(node.target) for node in network.graph.nodes if node.op == "call_module"]
    return [part for part in parts if isinstance(part, FrozenLayer)]


def run(model: bytes, images: torch.Tensor) -> np.ndarray:
    session = ReferenceEvaluator(onnx.load_from_string(model), new_ops=[Quant, BipolarQuant])
    return np.concatenate([session.run(None, {"images": image[None].numpy()})[0] for image in images])


def weights_of(model: bytes) -> list[np.ndarray]:
    """What the convolutions and products of a model are given as weights, (c_out, ...) each, in order."""
    graph = onnx.load_from_string(model)
    names = [node.input[1] for node in graph.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    products = [node.op_type != "Conv" for node in graph.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    found = ReferenceEvaluator(graph, new_ops=[Quant, BipolarQuant]).run(None, {"images": np.zeros(shape, np.float32)})
    return [w.T if product else w for w, product in zip(found, products, strict=True)]


def quants(model: bytes) -> list[tuple[str, int]]:
    """The nodes of the domain that read constants: name and bit-width."""
    graph = onnx.load_from_string(model).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [node for node in graph.node if node.domain == DOMAIN and node.input[0] in constants]
    return [(node.op_type, 1 if node.op_type == "BipolarQuant" else int(constants[node.input[3]])) for node in nodes]


IMAGES = images_of("digits_cnn", 3, seed=3)


@functools.cache
def digits(per_kernel: bool) -> tuple[fx.GraphModule, bytes]:
    """A finished network with kernels of all widths, and its file."""
    network = frozen(network_of("digits_cnn"), IMAGES, act_bits=(1, 2, 4, 8))
    return network, to_qonnx(network, IMAGES, per_kernel=per_kernel)


def weights_are_those_of(network: fx.GraphModule, model: bytes) -> bool:
    pairs = zip(weights_of(model), layers_of(network), strict=True)
    return all(np.array_equal(found, layer.weight.numpy()) for found, layer in pairs)


@both
def test_weights_come_out_bit_by_bit_and_outputs_agree(per_kernel: bool) -> None:
    network, model = digits(per_kernel)
    onnx.checker.check_model(model)
    assert weights_are_those_of(network, model)
    with torch.no_grad():
        np.testing.assert_allclose(run(model, IMAGES), network(IMAGES).numpy(), rtol=1e-4, atol=1e-4)


def test_a_layer_has_a_node_for_every_width_or_one_as_wide_as_needed() -> None:
    widths = [set(layer.bits.tolist()) for layer in layers_of(digits(True)[0])]
    assert set.union(*widths) == {1, 2, 3, 4, 5, 6, 7, 8, 32}
    coded = [sorted(found - {32}) for found in widths]
    assert quants(digits(True)[1]) == [("BipolarQuant" if b == 1 else "Quant", b) for found in coded for b in found]
    assert quants(digits(False)[1]) == [("Quant", max(b + (b <= 3) for b in found)) for found in coded]


@both
def test_a_layer_of_one_width_is_one_node_and_signs_of_scales_do_not_matter(per_kernel: bool) -> None:
    parts = {"a": conv(3, 5), "b": conv(5, 4, bias=False), "c": conv(4, 6), "d": conv(6, 5), "e": conv(5, 4)}
    network = traced(lambda m, x: m.e(m.d(m.c(m.b(m.a(x))))), **parts)
    widths = dict(zip("abcde", (1, 2, 3, 8, 2), strict=True))
    policy = CompressionPolicy(
        {layer.name: np.full(layer.c_out, widths[layer.name], np.uint8) for layer in network.layers},
        dict.fromkeys(widths, 32),
    )
    final = freeze(compress(network, policy))
    for layer in layers_of(final):
        layer.scale.neg_()  # as a folded batch-norm does
        layer.weight.neg_()
    final.e.scale[1], final.e.weight[1] = 0, 0
    model = to_qonnx(final, torch.zeros(1, 3, 8, 8), per_kernel=per_kernel)
    bits = (1, 2, 3, 8, 2) if per_kernel else (1, 3, 4, 8, 3)
    assert quants(model) == [("BipolarQuant" if b == 1 else "Quant", b) for b in bits]
    kinds = [node.op_type for node in onnx.load_from_string(model).graph.node]
    assert kinds.count("Concat") == kinds.count("Gather") == 1  # the kernel of zeros
    assert weights_are_those_of(final, model)


def test_activations_lie_on_the_grid() -> None:
    """Signed and unsigned, of 1, 3 and 8 bits, with values beyond both ends."""
    names = [f"{kind}{bits}" for kind in ("signed", "unsigned") for bits in (1, 3, 8)]
    network = traced(
        lambda m, x: torch.cat([getattr(m, n)(x if n[0] == "s" else x.abs()) for n in names], 1),
        **{name: conv(3, 2, 1) for name in names},
    )
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2
    policy = CompressionPolicy(
        {name: np.full(2, 32, np.uint8) for name in names}, {name: int(name[-1]) for name in names}
    )
    final = freeze(compress(network, policy, calibrate(network, [(images / 4, None)])))
    assert [final.get_submodule(name).act.signed for name in names] == [True] * 3 + [False] * 3
    with torch.no_grad():
        np.testing.assert_allclose(run(to_qonnx(final, images), images), final(images).numpy(), rtol=1e-4, atol=1e-5)


@both
def test_the_executor_of_qonnx_agrees(per_kernel: bool, monkeypatch) -> None:
    names = ("core.modelwrapper", "core.onnx_exec", "transformation.infer_shapes", "transformation.infer_datatypes")
    parts = [pytest.importorskip(f"qonnx.{name}", reason="needs the package qonnx") for name in names]
    wrapper, execution, shapes, types = parts
    make = execution.qonnx_make_model  # the newest onnx writes files that ONNX Runtime is not yet able to read
    monkeypatch.setattr(execution, "qonnx_make_model", lambda graph: make(graph, ir_version=10))
    network, file = digits(per_kernel)
    model = wrapper.ModelWrapper(onnx.load_from_string(file))
    model = model.transform(shapes.InferShapes()).transform(types.InferDataTypes(allow_scaledint_dtypes=True))
    if not per_kernel:  # to qonnx these weights are integers with a scale
        constants = {tensor.name for tensor in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.input[0] in constants]
        assert nodes and all(model.get_tensor_datatype(node.output[0]).name.startswith("SCALEDINT") for node in nodes)
    found = [execution.execute_onnx(model, {"images": image[None].numpy()})["outputs"] for image in IMAGES]
    with torch.no_grad():
        np.testing.assert_allclose(np.concatenate(found), network(IMAGES).numpy(), rtol=1e-4, atol=1e-4)


def test_a_shipped_folder_has_the_same_weights(tmp_path) -> None:
    network, model = digits(True)
    ship(network, tmp_path)
    again = to_qonnx(load(tmp_path), IMAGES)
    assert weights_are_those_of(network, again) and quants(again) == quants(model)


def test_what_onnx_lacks_is_told() -> None:
    network = traced(lambda m, x: torch.digamma(m.a(x)), a=conv(3, 4))
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(AjpqError, match="an ONNX model needs operations"):
        to_qonnx(frozen(network, images, sparsity=0), images)
