"""ONNX files: `to_onnx` of a finished network (int8, Q/DQ) and `float_onnx` of any other, with a dynamic batch."""

from __future__ import annotations

import warnings

import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from ajpq.errors import AjpqError
from ajpq.onnx_floats import keep_floats
from ajpq.onnx_fours import fill_fours
from ajpq.onnx_graph import integer_graph
from ajpq.onnx_pads import fold_pads
from ajpq.onnx_stems import fold_stems

FILE = "model.onnx"
OPSET = 18


def to_onnx(network: fx.GraphModule, images: Tensor) -> bytes:
    """A finished network as an ONNX model that runtimes compute in int8.

    images (n, C, H, W): training images as the network reads them, a hundred or so; the ranges of residual sums and the
        like are taken from them (see `ajpq.onnx_graph`), and the shape of the input but for the batch.
    Widths of up to 8 bits and activations keep their values exactly; a layer with a kernel of 32 bits stays float.
    On x86 processors with AVX2 but without VNNI, ONNX Runtime saturates sums of two products of 8-bit activations and
    8-bit kernels; narrower ones cannot saturate. Raises AjpqError if the network has an operation that ONNX lacks.
    """
    model = _exported(integer_graph(network, images), images, None)
    fill_fours(model)
    keep_floats(model)
    fold_stems(model)
    return model.SerializeToString(deterministic=True)


def float_onnx(network: nn.Module, images: Tensor, batch: int | None = None) -> bytes:
    """A module of one input as an ONNX model of any batch or of one. images (n, C, H, W): of its input."""
    return _exported(network, images, batch).SerializeToString(deterministic=True)


@torch.no_grad()
def _exported(network: nn.Module, images: Tensor, batch: int | None) -> ModelProto:
    """Without the places in the source that the exporter notes, and paddings within convolutions."""
    _check_pools(network)
    example = images[:1].expand(batch or 2, *images.shape[1:]).contiguous()
    free = None if batch else ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings():
            # The exporter of torch 2.11 copies parts of torch that torch 2.11 calls deprecated.
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            program = torch.onnx.export(
                network, (example,), dynamo=True, dynamic_shapes=free, opset_version=OPSET,
                input_names=["images"], output_names=["outputs"], verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises its own kinds, and those of all it calls
        reason = (str(error).splitlines() or [""])[0][:200]
        raise AjpqError(
            f"an ONNX model needs operations that torch.onnx can export, but it stopped ({type(error).__name__}: "
            f"{reason}); use the packed file, or other operations"
        ) from error
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.ClearField("metadata_props")
    fold_pads(model)
    return model


def _check_pools(network: nn.Module) -> None:
    """Raises AjpqError for an argument of average pooling that the exporter leaves out."""
    modules = dict(network.named_modules())
    nodes = network.graph.nodes if isinstance(network, fx.GraphModule) else ()
    calls = [(node.name, node.kwargs.get("divisor_override", (*node.args, *[None] * 7)[6]))
             for node in nodes if "avg_pool2d" in str(node.target)]  # fmt: skip
    calls += [(name, module.divisor_override) for name, module in modules.items() if isinstance(module, nn.AvgPool2d)]
    for name, divisor in calls:
        if divisor is not None:
            raise AjpqError(
                f"average pooling in an ONNX model divides by what it covers, but {name!r} has a divisor_override of "
                f"{divisor}; multiply by a factor behind it instead"
            )
