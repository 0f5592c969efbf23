"""What `to_onnx` writes without one of its passes over the graph and with it, from one run of the exporter."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import Tensor, fx

from ajpq import onnx_export
from ajpq.onnx_graph import integer_graph


def without_and_with(
    step: str, final: fx.GraphModule, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """step: a function of `ajpq.onnx_export` that changes a model."""
    exported = onnx_export._exported(integer_graph(final, images), images, None)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "_exported", lambda *_: copy.deepcopy(exported))
        ours = onnx.load_from_string(onnx_export.to_onnx(final, images))
        patch.setattr(onnx_export, step, lambda model: None)
        return onnx.load_from_string(onnx_export.to_onnx(final, images)), ours


def outputs(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x.numpy()})[0]
