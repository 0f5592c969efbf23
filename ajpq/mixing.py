"""Layers of a super net: one convolution with the mixture of all candidate weights.

A super net of parallel paths computes ``sum_k p_k conv(x, Q_k(w))``. A convolution is linear in its weights, so that is
``conv(x, sum_k p_k Q_k(w))`` (Cai and Vasconcelos 2020, EdMIPS, arXiv 2004.05795): the candidates cost work on weights,
which are few, and none on activations. Candidate inputs are mixed likewise, ``sum_j q_j A_j(x)``, each quantized once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from ajpq import quantize
from ajpq.layers import Geometry
from ajpq.quantize import FLOAT
from ajpq.step_sizes import fit_scale

# (weight (c_out, ...), widths, step sizes (K, c_out)) -> weights at each width and what their gradient is multiplied
# by on its way to `weight`, (K, c_out, ...) both
Versions = Callable[[Tensor, tuple[int, ...], Tensor], tuple[Tensor, Tensor]]


def _tiled(weight: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The kernels once for every width, (K c_out, ...), and the width of each, (K c_out,)."""
    bits = torch.tensor(widths, device=weight.device).repeat_interleave(len(weight))
    return weight.detach().expand(len(widths), *weight.shape).reshape(-1, *weight.shape[1:]), bits


@torch.no_grad()
def rounded(weight: Tensor, widths: tuple[int, ...], scales: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize.fake_quantize` at every width; straight-through inside the grid, 0 outside."""
    tiled, bits = _tiled(weight, widths)
    many = quantize.fake_quantize(tiled, bits, scales.reshape(-1)).view(len(widths), *weight.shape)
    low, high, offset = quantize.grid(bits)
    free = bits == FLOAT
    ends = [
        torch.where(free, end, (k + offset) * scales.reshape(-1)) for k, end in ((low, -torch.inf), (high, torch.inf))
    ]
    low, high = (end.view(len(widths), len(weight), *[1] * (weight.ndim - 1)) for end in ends)
    return many, (weight >= low) & (weight <= high)


@torch.no_grad()
def dorefa(weight: Tensor, widths: tuple[int, ...], scales: Tensor) -> tuple[Tensor, Tensor]:
    """Zhou et al. 2016 (arXiv 1606.06160, eq. 9): with t = tanh(w) and m = max |t| over the layer,
    ``2 round_b(t / 2m + 1/2) - 1``, times m, which is ours: candidates of all widths, 32 bits included, then have one
    scale. 1 bit: ``sign(w) mean |w|`` of the layer (eq. 7), its gradient straight-through. `scales` are not used."""
    t = torch.tanh(weight)
    most, slope = t.abs().max().clamp(min=quantize.TINY), 1 - t * t
    many, slopes = [], []
    for b in widths:
        steps = 2.0**b - 1
        if b == FLOAT:
            many.append(weight)
        elif b == 1:
            many.append(torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean())
        else:
            many.append((2 * torch.round(steps * (t / (2 * most) + 0.5)) / steps - 1) * most)
        slopes.append(torch.ones_like(t) if b in (1, FLOAT) else slope)
    return torch.stack(many), torch.stack(slopes)


class _Mix(torch.autograd.Function):
    """sum_k p_k many_k; many_k is a function of `weight` with the given slope."""

    @staticmethod
    def forward(ctx, weight: Tensor, p: Tensor, many: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(p, many, slopes)
        return torch.einsum("kc,kc...->c...", p, many)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        p, many, slopes = ctx.saved_tensors
        to_weight = grad * torch.einsum("kc,kc...->c...", p, slopes.to(p.dtype)) if ctx.needs_input_grad[0] else None
        to_p = torch.einsum("c...,kc...->kc", grad, many) if ctx.needs_input_grad[1] else None
        return to_weight, to_p, None, None


def _mixed_input(x: Tensor, q: Tensor, steps: Tensor, widths: tuple[int, ...], signed: bool) -> Tensor:
    with torch.no_grad():
        parts = (quantize.fake_quantize_act(x, s, b, signed) for b, s in zip(widths, steps, strict=True))
        if len(widths) == 1:
            return next(parts)
        out = torch.zeros_like(x)
        for part, share in zip(parts, q.tolist(), strict=True):
            out.add_(part, alpha=share)
        return out


class _MixInput(torch.autograd.Function):
    """sum_j q_j A_j(x), which is made again for its gradient instead of kept. The step sizes get the gradient of what
    they clip only, as in PACT (Choi et al. 2018, arXiv 1805.06085)."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, steps: Tensor, widths: tuple[int, ...], signed: bool) -> Tensor:
        ctx.save_for_backward(x, q, steps)
        ctx.widths, ctx.signed = widths, signed
        return _mixed_input(x, q, steps, widths, signed)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, q, steps = ctx.saved_tensors
        to_x, to_q, to_steps = None, torch.zeros_like(q), torch.zeros_like(steps)
        for j, (b, share) in enumerate(zip(ctx.widths, q.tolist(), strict=True)):
            inside = grad if b == FLOAT else quantize.within(grad, x, steps[j], *quantize.act_range(b, ctx.signed))
            if any(ctx.needs_input_grad[1:]):
                part = quantize.fake_quantize_act(x, steps[j], b, ctx.signed)
                to_q[j] = quantize.inner(grad, part)
                if ctx.needs_input_grad[2] and b != FLOAT:
                    to_steps[j] = share * quantize.inner(grad - inside, part) / steps[j]
            if len(ctx.widths) > 1:
                inside = inside * share
            to_x = inside if to_x is None else to_x.add_(inside)
        return to_x, to_q, to_steps, None, None


class MixedInput(nn.Module):
    """Candidate widths of a layer's input, mixed by q (J,). pact: all clip at one learned value; otherwise every width
    has its step of the calibration, which stays."""

    parameter_kinds = {"clip": "decayed"}

    def __init__(self, widths: tuple[int, ...], signed: bool, steps: Sequence[float], pact: bool) -> None:
        super().__init__()
        self.widths, self.signed = widths, signed
        self.register_buffer("steps", torch.tensor(steps, dtype=torch.float32))  # (J,)
        tops = [max(quantize.act_range(b, signed)[1], 1) if b != FLOAT else 1 for b in widths]
        self.register_buffer("tops", torch.tensor(tops, dtype=torch.float32))  # (J,)
        quantized = [j for j, b in enumerate(widths) if b != FLOAT]
        self.clip = nn.Parameter(self.steps[quantized[-1]] * self.tops[quantized[-1]]) if pact and quantized else None

    def step_sizes(self) -> Tensor:
        """(J,)."""
        return self.steps if self.clip is None else self.clip.abs() / self.tops

    def run(self, x: Tensor, q: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        """``then`` of the mixture, an operation that is linear in it. What it keeps of its input for the gradient is
        made from `x` again when it is asked for, so that quantized activations take no memory."""
        if self.widths == (FLOAT,):
            return then(x)
        steps = self.step_sizes()
        mixed = _MixInput.apply(x, q, steps, self.widths, self.signed)
        at, shape, kept = mixed.data_ptr(), mixed.shape, (x, q.detach(), steps.detach())

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor.data_ptr() == at and tensor.shape == shape else tensor

        def unpack(tensor: Tensor | None) -> Tensor:
            return _mixed_input(*kept, self.widths, self.signed) if tensor is None else tensor

        with saved_tensors_hooks(pack, unpack):
            return then(mixed)


class MixedLayer(nn.Module):
    """A convolution or linear layer with candidate widths for kernels and input.

    Attributes to set before every call: p (K, c_out) and q (J,), the parts of the candidates; kept (c_out,), what every
    kernel is multiplied by, or None. The versions of its weights are made again only when weights or step sizes have
    moved, so once for all steps of the logits between two of the weights.
    """

    def __init__(
        self, module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], inputs: MixedInput, versions: Versions
    ) -> None:
        super().__init__()
        self.widths, self.inputs, self.versions, self.geometry = widths, inputs, versions, Geometry.of(module)
        self.weight, self.bias = module.weight, module.bias
        self.register_buffer("scales", torch.ones(len(widths), len(module.weight), device=module.weight.device))
        self.p = self.q = self.kept = None
        self._made: tuple[Tensor, Tensor] | None = None  # the versions of the weights
        self._at: tuple[int, int] | None = None  # which weights and step sizes they are of
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fit the step sizes (K, c_out) to the weights as they are now."""
        if self.versions is not rounded:
            return
        self.scales.copy_(fit_scale(*_tiled(self.weight, self.widths)).view_as(self.scales))

    def mixed_weight(self) -> Tensor:
        """``sum_k p_k Q_k(weight)``, with gradients to the weight and to p."""
        if self.widths == (FLOAT,):
            return self.weight
        moved = self.weight._version, self.scales._version
        if moved != self._at:
            self._made, self._at = self.versions(self.weight, self.widths, self.scales), moved
        return _Mix.apply(self.weight, self.p, *self._made)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.mixed_weight(), self.bias
        if self.kept is not None:
            weight = weight * self.kept.view(-1, *[1] * (weight.ndim - 1))
            bias = None if bias is None else bias * self.kept
        return self.inputs.run(x, self.q, lambda mixed: self.geometry.apply(mixed, weight, bias))


class Gate(nn.Module):
    """What a branch puts out, multiplied by the part of it that is `taken` (), to be set before every call."""

    taken: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.taken


class MixedNorm(nn.Module):
    """A batch-norm whose channels are pruned in part: gain and shift are multiplied by `kept` (C,), to be set before
    every call. With the statistics of the batch, a factor before it would have no effect at all."""

    def __init__(self, module: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.kept = module, None

    def forward(self, x: Tensor) -> Tensor:
        norm, kept = self.norm, self.kept
        gain, shift = norm.weight, norm.bias
        if kept is not None:
            gain = kept if gain is None else gain * kept
            shift = None if shift is None else shift * kept
        return F.batch_norm(x, None, None, gain, shift, True, 0.0, norm.eps)
