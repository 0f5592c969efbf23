"""How much a kernel matters. A criterion is one callable, higher = keep:
(network, batches of training images, task) -> {layer name: float64 (c_out,)};
the layer controller (what to prune) and the channel controller (which kernels share a width) follow the same one.

`magnitude` and `bn_scale` look at weights only. `taylor` and `fisher` look at the gradient of the task's loss of
every single image: one forward and one backward pass over all the batches, in float32, without randomness; how the
images are batched makes no difference, and neither the network nor any gradient of it is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ajpq.errors import AjpqError
from ajpq.loaders import Batches
from ajpq.network import LayerSpec, Network
from ajpq.tasks import CLASSIFICATION, Classification, Task

Importance = Callable[[Network, Batches, Task], Mapping[str, np.ndarray]]

IMAGES = 32  # in memory at once, with all their activations
NUMBERS = 2**23  # of a layer's gradients per image, in memory at once


class Errors(dict[str, np.ndarray]):
    """Scores in a unit: what pruning the kernel's channel adds to noise over signal, summed over the outputs of the
    layers that read it. A criterion that gives these tells `agents.sensitivity` what pruning costs, too."""


def gains(network: Network) -> dict[str, np.ndarray]:
    """|gamma / sigma| of the norm folded into each layer, (c_out,)."""
    found = {}
    for norm in network.norms:
        if norm.folds_into is not None:
            module = network.module.get_submodule(norm.name)
            gain = (module.running_var + module.eps).rsqrt()
            gain = gain if module.weight is None else gain * module.weight
            found[norm.folds_into] = gain.detach().abs().double().cpu().numpy()
    return found


def magnitude(network: Network, batches: Batches = (), task: Task = CLASSIFICATION) -> dict[str, np.ndarray]:
    """Sum of |W| of a kernel (AMC, He et al. 2018), taken after folding the batch-norm, as the kernel will be
    shipped.
    """
    factors = gains(network)
    scores = {}
    for layer in network.layers:
        weight = network.module.get_submodule(layer.name).weight.detach().double()
        scores[layer.name] = weight.abs().flatten(1).sum(1).cpu().numpy() * factors.get(layer.name, 1.0)
    return scores


def bn_scale(network: Network, batches: Batches = (), task: Task = CLASSIFICATION) -> dict[str, np.ndarray]:
    """|gamma| of the batch-norm behind a kernel (network slimming, Liu et al. 2017); layers without one fall back to
    `magnitude`.
    """
    scores = magnitude(network)
    for norm in network.norms:
        if norm.folds_into is not None and (gamma := network.module.get_submodule(norm.name).weight) is not None:
            scores[norm.folds_into] = gamma.detach().abs().double().cpu().numpy()
    return scores


def taylor(network: Network, batches: Batches, task: Task = CLASSIFICATION) -> dict[str, np.ndarray]:
    """First-order Taylor expansion of what removing a kernel does to the loss (Molchanov et al. 2019, arXiv 1906.10771:
    (sum over s of g_s w_s)^2 for a group of parameters; we take the root, as Molchanov et al. 2017, arXiv 1611.06440):

        the mean over images n of | sum over s of  w_s dL_n / dw_s |

    L_n is the cross-entropy of image n; s runs over all parameters of the kernel as it will be shipped: its weights and
    its bias, the batch-norm folded in. The sum equals that of output x gradient over the positions of the kernel's
    output behind the batch-norm, the "gate" of the paper, and is so computed. The papers square or take the absolute
    value per mini-batch; per image the score does not depend on the batches, and does not vanish at a minimum.
    Layers whose output the loss does not depend on get 0. Raises AjpqError where there are no labels.
    """
    scores = {layer.name: np.zeros(layer.c_out) for layer in network.layers}
    images = 0
    for n, seen in _backward(network, batches, task):
        images += n
        for name, calls in seen.items():
            change = sum(_of_images(call.after * call.after_grad, network[name], n) for call in calls)  # (n, c_out)
            scores[name] += change.abs().sum(0).numpy()
    return {name: score / images for name, score in scores.items()}


def fisher(network: Network, batches: Batches, task: Task = CLASSIFICATION) -> dict[str, np.ndarray]:
    """What removing a kernel's weights adds to the loss by the diagonal of the Hessian (optimal brain damage, LeCun et
    al. 1990, its saliency h w^2 / 2), for which stands the diagonal of the empirical Fisher information (as in Theis et
    al. 2018, arXiv 1801.05787, there for whole feature maps):

        1/2 sum over the weights s of  F_s w_s^2,    F_s = the mean over images n of (dL_n / dw_s)^2

    L_n is the cross-entropy of image n with its label. The gradients are those of single images: the square of a
    batch's mean gradient would shrink with the size of the batch, to 0 at a minimum. Folding a batch-norm leaves every
    product w_s dL_n / dw_s, and so the score, as it is. Layers whose output the loss does not depend on get 0. Raises
    AjpqError where there are no labels.
    """
    scores = {layer.name: np.zeros(layer.c_out) for layer in network.layers}
    images = 0
    for n, seen in _backward(network, batches, task):
        images += n
        for name, calls in seen.items():
            scores[name] += _squares(network, network[name], calls, n).double().numpy()
    return {name: score / (2 * images) for name, score in scores.items()}


@dataclass(eq=False)
class _Call:
    """One call of a layer. read, output, after: its input, its output, and the output of the norm folded into it."""

    read: Tensor
    output: Tensor
    after: Tensor
    output_grad: Tensor | None = None
    after_grad: Tensor | None = None


class _Probe(fx.Interpreter):
    """Runs the traced network and keeps what its layers read and write. Layers pass on copies, so that operations in
    place cannot change what was kept."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.module)
        self.network = network
        self.folded = {norm.name: norm.folds_into for norm in network.norms if norm.folds_into is not None}
        self.calls: dict[str, list[_Call]] = {}

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        result = super().call_module(target, args, kwargs)
        if target in self.network:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            self.calls.setdefault(target, []).append(_Call(args[0].detach().clone(), result, result))
            return result.clone()
        if target in self.folded:
            self.calls[self.folded[target]][-1].after = result
            return result.clone()
        return result


def _backward(network: Network, batches: Batches, task: Task) -> Iterator[tuple[int, dict[str, list[_Call]]]]:
    """(number of images, layer name -> its calls with gradients of the summed loss), a few images at a
    time."""
    images = 0
    for x, *rest in batches:
        y = rest[0] if rest else None
        if y is None:
            raise AjpqError(
                "this importance needs labels, but the calibration batches have none; give batches (x, y) or use "
                "importance=magnitude"
            )
        for part, labels in zip(x.cpu().split(IMAGES), y.cpu().split(IMAGES), strict=True):
            images += len(part)
            yield len(part), _gradients(network, part, labels, task)
    if not images:
        raise AjpqError("this importance needs at least one image, but the calibration gave 0; pass training images")


def _gradients(network: Network, x: Tensor, y: Tensor, task: Task) -> dict[str, list[_Call]]:
    with torch.inference_mode(False), torch.enable_grad():
        probe = _Probe(network)
        logits = probe.run(x.clone())
        if isinstance(task, Classification) and (
            not isinstance(logits, Tensor)
            or logits.ndim != 2
            or not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]
        ):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise AjpqError(
                f"this importance needs logits (images, classes) and labels among the classes, but the network gives "
                f"{found} and the labels reach from {int(y.min())} to {int(y.max())}; use importance=magnitude"
            )
        calls = [call for found in probe.calls.values() for call in found]
        kept = [tensor for call in calls for tensor in (call.output, call.after)]
        found = torch.autograd.grad(task.losses(logits, y).sum(), kept, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(kept, found, strict=True)]
    for call, of_output, of_after in zip(calls, grads[::2], grads[1::2], strict=True):
        call.output_grad, call.after_grad = of_output, of_after
        call.output, call.after = call.output.detach(), call.after.detach()
    return probe.calls


def _of_images(values: Tensor, layer: LayerSpec, images: int) -> Tensor:
    """Values of a layer's output, summed over its positions: float64 (images, c_out)."""
    values = values.movedim(-1, 1) if layer.kind == "linear" else values
    return values.double().reshape(len(values), layer.c_out, -1).sum(2).reshape(images, -1, layer.c_out).sum(1)


@torch.inference_mode(False)  # inside inference mode torch.func.grad of torch 2.11 gives 0
def _squares(network: Network, layer: LayerSpec, calls: Sequence[_Call], images: int) -> Tensor:
    """The sum over images of the squares of a kernel's weights times their gradients: (c_out,)."""
    module = network.module.get_submodule(layer.name)
    weight = module.weight.detach()
    if len(calls) == 1 and calls[0].read.ndim == 2 and len(calls[0].read) == images:  # the gradient is an outer product
        return (calls[0].output_grad.square() * F.linear(calls[0].read.square(), weight.square())).sum(0)

    def product(weight: Tensor, read: Tensor, grad: Tensor) -> Tensor:
        return (torch.func.functional_call(module, {"weight": weight}, (read,)) * grad).sum()

    gradient = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))
    total = torch.zeros(layer.c_out)
    step = max(1, NUMBERS // layer.weights)
    for first in range(0, images, step):
        g = 0
        for call in calls:
            read, grad = (t.reshape(images, -1, *t.shape[1:]) for t in (call.read, call.output_grad))
            g = g + gradient(weight, read[first : first + step], grad[first : first + step])  # (step, *weight.shape)
        total += (g * weight).square().flatten(2).sum((0, 2))
    return total


def of_channels(network: Network, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 (n_channels,): the mean over a channel's writers of each kernel's share of its layer's mean score.

    A layer whose scores are all 0 adds 0 to each. Raises AjpqError unless every layer has one finite score per kernel.
    """
    total, count = np.zeros(network.n_channels), np.zeros(network.n_channels)
    for layer in network.layers:
        score = np.asarray(scores[layer.name] if layer.name in scores else [], float)
        if score.shape != (layer.c_out,) or not np.isfinite(score).all():
            raise AjpqError(
                f"an importance must give every layer one finite number per kernel, but {layer.name!r} has "
                f"{layer.c_out} kernels and its scores are of shape {score.shape}, {int(np.isfinite(score).sum())} of "
                "them finite; mend the criterion"
            )
        mean = np.abs(score).mean()
        np.add.at(total, layer.writes, score / mean if mean > 0 else score)
        np.add.at(count, layer.writes, 1)
    return total / np.maximum(count, 1)
