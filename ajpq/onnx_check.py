"""Whether a shipped model.onnx, on ONNX Runtime, says what the finished network says: seen on images, not claimed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx

from ajpq.errors import AjpqError
from ajpq.layers import FrozenLayer
from ajpq.loaders import Batches
from ajpq.outputs import module_of, quantizer_of
from ajpq.tasks import Answering, Task

IMAGES = 1000  # that both are shown
CLOSE = 0.01  # of a task's quality that counts as the same answer, where the task knows no answers: our choice
STEP, DEVIATION = "steps of the last layer's input", "standard deviations of the outputs"


@torch.no_grad()
def seen(model: bytes, network: fx.GraphModule, batches: Batches, task: Task, images: int = IMAGES) -> dict[str, Any]:
    """What ONNX Runtime gives for a split, in one pass over it, beside the finished network for its first images.

    runtime: its version. metric: of the whole split, the task's. images: how many both were shown. agreement: the
    fraction of these with the same answer. answer: what that is, see `tasks.Answering`. largest_difference: of any
    output, and difference_unit: see `unit_of`; 1 step is what an output moves by, at most, where every input of the
    last layer moves by one quantization step.

    model: written for `network`. images: at least 1. Raises AjpqError for a split without images, and where ONNX
    Runtime cannot run the model, with its reason.
    """
    run = _Session(model)
    found, known, targets = [], [], []
    for x, y, *_ in batches:  # (N, C, H, W), (N, ...)
        found.append(run(x))
        targets.append(y.cpu())
        left = images - sum(map(len, known))
        if left > 0:
            known.append(network(x[:left]))
    if not sum(map(len, known)):
        raise AjpqError("model.onnx is compared on test images, but there are none; check the data split")
    outputs, theirs, goal = torch.cat(found), torch.cat(known), torch.cat(targets)
    ours, n = outputs[: len(theirs)], len(theirs)
    name, same = _same(task, ours, theirs, goal[:n])
    unit, size = unit_of(network, theirs)
    return {
        "runtime": onnxruntime.__version__,
        "metric": task.metrics(outputs, goal)[task.metric],
        "images": n,
        "agreement": same.double().mean().item(),
        "answer": name,
        "largest_difference": ((ours - theirs).abs() / size).max().item(),
        "difference_unit": unit,
    }


def _same(task: Task, ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[str, Tensor]:
    """Whether the answers are the same, bool (N,); of tasks that know no answers, whether they are as good."""
    if isinstance(task, Answering):
        (name, mine), (_, others) = task.answers(ours), task.answers(theirs)
        return name, mine == others
    qualities = [task.quality(outputs, targets) for outputs in (ours, theirs)]
    return f"{task.metric} to {CLOSE:g}", (qualities[0] - qualities[1]).abs() <= CLOSE


def unit_of(network: fx.GraphModule, outputs: Tensor) -> tuple[str, Tensor]:
    """What differences of outputs (N, ...) are counted in: its name, and its size for every channel, or for all.
    Steps where the outputs come straight out of a layer with a quantized input; for other networks standard deviations
    of all outputs."""
    last = next(node for node in network.graph.nodes if node.op == "output").args[0]
    act = quantizer_of(network, last) if isinstance(last, fx.Node) else None
    layer = module_of(network, last) if act is not None else None
    if isinstance(layer, FrozenLayer):
        size = layer.weight.flatten(1).abs().sum(1) * act.scale.abs()  # (C,)
        name, size = STEP, size.reshape(-1, 1, 1) if layer.geometry.conv else size
    else:
        name, size = DEVIATION, outputs.std(correction=0)
    return name, size.clamp(min=torch.finfo(size.dtype).tiny)


class _Session:
    """ONNX Runtime on the processor with as many threads as torch: images -> outputs."""

    def __init__(self, model: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it raises its own kinds
            raise _stopped("load", error) from error
        self.name = self.session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        try:
            (outputs, *_) = self.session.run(None, {self.name: np.ascontiguousarray(images.cpu().numpy())})
        except Exception as error:
            raise _stopped("run", error) from error
        return torch.from_numpy(outputs)


def _stopped(verb: str, error: Exception) -> AjpqError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return AjpqError(
        f"model.onnx must run on ONNX Runtime, but version {onnxruntime.__version__} could not {verb} it "
        f"({type(error).__name__}: {reason}); use the packed file, or another version"
    )
