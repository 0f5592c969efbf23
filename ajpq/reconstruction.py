"""Weights of a compressed network, solved for layer by layer from a few hundred images, without training.

What was pruned and rounded before a layer changes what it reads. Its surviving weights are set to the least squares
solution that, from what it reads now, gives what the original gave, and are then rounded so that errors cancel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.compensation import round_compensated
from ajpq.goals import Goals, Stages, called, rows_of
from ajpq.layers import Geometry, QuantLayer
from ajpq.loaders import Batches
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.quantize import FLOAT
from ajpq.step_sizes import fit_scale
from ajpq.training import device_of

LARGEST = 4608  # weights of a kernel, 3 x 3 x 512: layers with larger ones stay, for their moments fill the memory
RIDGE = 0.01  # of the mean second moment: how far the solution is pulled to the weights as they were
NOISE = 1e-5  # of the same: what sums of float32 products may be wrong by


@torch.no_grad()
def reconstruct(
    student: fx.GraphModule, original: Network, policy: CompressionPolicy, batches: Batches, images: int | None = 400
) -> None:
    """Set weights, biases, step sizes and batch-norms of a compressed network to come close to the original, in place.

    student: of `compress`, with the same policy; it ends in eval mode. batches: (x, y) of training images, of which
    the first `images` count (None: all), fewer where their activations would take more than `goals.MEMORY`.

    Layers are taken in the order of the graph, each as what comes before it has become: least squares as in He et al.
    (2017, arXiv 1707.06168, eq. 5) and AMC (2018, arXiv 1802.03494), here for convolutions of any kernel and groups,
    with a ridge towards the weights as they were; step sizes are fitted anew, then `round_compensated`. Batch-norms are
    matched as in `matching.match`, on the same output positions. A module that runs more than once stays as it is, and
    so does a layer whose kernels have more than 4,608 weights, or whose inputs are not finite. Raises AjpqError if
    there is no image.
    """
    solve(student, original, policy, Goals(original, batches, images))


@torch.no_grad()
def solve(student: fx.GraphModule, original: Network, policy: CompressionPolicy, goals: Goals) -> None:
    """`reconstruct` for callers that need the goals of the original for many policies."""
    student.eval()
    device = device_of(student)
    alive, calls = policy.alive(original), Counter(map(called, student.graph.nodes))
    follows = {norm.folds_into for norm in original.norms}
    stages = Stages(student, [x.to(device) for x in goals.images])
    for node in stages:
        name = called(node)
        if name not in goals.channels or calls[name] > 1:
            continue
        module, inputs = student.get_submodule(name), stages.values(node.all_input_nodes[0])
        known = goals.of(name, alive, device)
        if isinstance(module, _BatchNorm):
            _match(module, inputs, known)
        elif isinstance(module, QuantLayer | nn.Conv2d | nn.Linear) and module.weight[0].numel() <= LARGEST:
            _solve(module, inputs, known, centred=module.bias is not None or name in follows)


def _solve(layer: nn.Module, inputs: list[Tensor], goals: list[tuple[Tensor, Tensor]], centred: bool) -> None:
    """Least squares for one layer, then its step sizes and rounding. centred: whatever is constant is made good by its
    bias, or by the batch-norm behind it."""
    geometry = layer.geometry if isinstance(layer, QuantLayer) else Geometry.of(layer)
    groups = geometry.groups if geometry.conv else 1
    weight = layer.weight.detach()
    n = weight[0].numel()
    w = weight.reshape(groups, -1, n).double()  # (G, K, n)
    xx, xy = w.new_zeros(groups, n, n), w.new_zeros(groups, n, w.shape[1])
    x_sum, y_sum, count, shift = w.new_zeros(groups, n), w.new_zeros(groups, w.shape[1]), 0, None
    for x, (at, y) in zip(inputs, goals, strict=True):
        x = patches(x, geometry, weight.shape[2:], at)
        x = layer.act(x) if isinstance(layer, QuantLayer) else x
        x = x.reshape(-1, groups, n).transpose(0, 1)  # (G, N p, n)
        y = y.reshape(-1, groups, w.shape[1]).transpose(0, 1)  # (G, N p, K)
        if shift is None:  # near the mean, so that little is lost when the mean goes
            shift = x.mean(1, keepdim=True) if centred else torch.zeros_like(x[:, :1])  # (G, 1, n)
        x = x - shift
        xx, xy = xx + (x.mT @ x).double(), xy + (x.mT @ y).double()
        x_sum, y_sum, count = x_sum + x.sum(1), y_sum + y.sum(1), count + x.shape[1]
    x_mean, y_mean = x_sum / count, y_sum / count
    xx, xy = xx / count, xy / count
    floor = NOISE * xx.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny  # (G,)
    if centred:
        xx, xy = xx - x_mean[:, :, None] * x_mean[:, None], xy - x_mean[:, :, None] * y_mean[:, None]
    pull = RIDGE * xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=0) + floor
    gram = xx + pull[:, None, None] * torch.eye(n, dtype=xx.dtype, device=xx.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any() or not xy.isfinite().all():
        return
    w = torch.cholesky_solve(xy + pull[:, None, None] * w.mT, factor).mT  # (G, K, n)
    if isinstance(layer, QuantLayer):
        solved = w.reshape(weight.shape).float()
        scale = torch.where(layer.bits == FLOAT, layer.scale, fit_scale(solved, layer.bits))
        w = round_compensated(w, gram, layer.bits, scale)
        layer.scale.copy_(scale)
    layer.weight.copy_(w.reshape(weight.shape))
    if layer.bias is not None:
        mean = x_mean + shift[:, 0]
        layer.bias.copy_((y_mean - (w @ mean[:, :, None])[:, :, 0]).reshape(-1))


def patches(x: Tensor, geometry: Geometry, kernel: Iterable[int], at: Tensor) -> Tensor:
    """What the kernels of a layer meet at some of its output positions. x (N, C, H, W), at (p,) of the output's rows
    one after another -> (N, p, C * kh * kw); of a linear layer x (N, ..., C) -> (N, p, C)."""
    if not geometry.conv:
        return x.reshape(len(x), -1, x.shape[-1])[:, at]
    kernel = list(kernel)
    mode, pads = geometry.padding_mode, geometry.pads(kernel)
    if any(pads):
        x = F.pad(x, pads, mode="constant" if mode == "zeros" else mode)
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    width = (x.shape[3] - reach[1] - 1) // geometry.stride[1] + 1  # of the output
    row, column = at // width * geometry.stride[0], at % width * geometry.stride[1]
    rows = row[:, None] + geometry.dilation[0] * torch.arange(kernel[0], device=x.device)  # (p, kh)
    columns = column[:, None] + geometry.dilation[1] * torch.arange(kernel[1], device=x.device)  # (p, kw)
    found = x.permute(0, 2, 3, 1)[:, rows[:, :, None], columns[:, None, :]]  # (N, p, kh, kw, C), pixels lie together
    return found.permute(0, 1, 4, 2, 3).reshape(len(x), len(at), -1)


def _match(norm: _BatchNorm, inputs: list[Tensor], goals: list[tuple[Tensor, Tensor]]) -> None:
    """Statistics, gain and shift of a batch-norm: the least squares fit of its output to that of the original."""
    x = torch.cat(
        [rows_of(x)[:, at].flatten(0, 1) for x, (at, _) in zip(inputs, goals, strict=True)]
    ).double()  # (n, C)
    goal = torch.cat([y.flatten(0, 1) for _, y in goals]).double()
    var, mean = torch.var_mean(x, 0)
    u = (x - mean) * (var + norm.eps).rsqrt()
    shift = goal.mean(0)
    gain = (u * (goal - shift)).sum(0) / u.square().sum(0).clamp(min=norm.eps)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight, norm.bias, norm.affine = nn.Parameter(gain.float()), nn.Parameter(shift.float()), True
