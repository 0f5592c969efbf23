"""Does a cost model keep the rules that budgets rely on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ajpq.budget import Budget
from ajpq.cost import CostModel, Load, Size, loads_of
from ajpq.draft import Draft
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.quantize import WIDTHS
from ajpq.space import Choices, SearchSpace
from ajpq.testing.problems import must, small_network

SLACK = 1e-9  # of rounding
TENSORS = ("inputs", "kept", "weight_bits", "act_bits", "side")


def check_cost_model(cost: CostModel, network: Network | None = None, policies: int = 4) -> None:
    """Ask a cost model about random policies and raise AssertionError where it breaks a rule:

    - `unit` is a word; cost(loads) is a float tensor (n_layers,), finite and not negative, and above 0 in all for the
      uncompressed network
    - entry i follows from loads[i] alone, whatever was asked before and stands beside it
    - no entry falls when a kernel gets wider or comes back, an input gets wider, or channels are added
    - it takes loads that need gradients, and those that it gives are finite

    cost: the model or its class. network: by default a small one with every kind of layer. policies: how many to draw.
    """
    cost = cost() if isinstance(cost, type) else cost
    network = network or small_network()
    unit = getattr(cost, "unit", None)
    must(isinstance(unit, str) and bool(unit), f"a cost model must say its `unit` as a word, but it is {unit!r}")
    whole = _ask(cost, loads_of(network, CompressionPolicy.homogeneous(network)))
    must(
        float(whole.sum()) > 0, f"the uncompressed network must cost something, but its total is {float(whole.sum()):g}"
    )
    random = np.random.default_rng(0)
    for policy in _policies(network, random, policies):
        loads = loads_of(network, policy)
        first = _ask(cost, loads)
        _check_alone(cost, loads, first)
        _check_monotone(cost, loads, first, random)
        _check_gradients(cost, loads, first)
        must(
            torch.equal(_ask(cost, loads), first),
            "a cost model must give the same answer to the same loads, but it does not; does it keep something between "
            "calls, draw numbers or change the loads?",
        )


def _ask(cost: CostModel, loads: Sequence[Load]) -> Tensor:
    found = cost(loads)
    must(isinstance(found, Tensor), f"a cost must be a tensor, but it is a {type(found).__name__}; use torch.stack")
    must(
        found.shape == (len(loads),),
        f"a cost must have one number per layer, ({len(loads)},), but its shape is {tuple(found.shape)}",
    )
    must(found.is_floating_point(), f"a cost must be of floating point, but it is {found.dtype}; compute in float64")
    found = found.detach()
    for load, value in zip(loads, found.tolist(), strict=True):
        must(
            np.isfinite(value) and value >= 0,
            f"a cost must be finite and not negative, but {load.layer.name!r} ({_words(load)}) has {value}",
        )
    return found


def _check_alone(cost: CostModel, loads: Sequence[Load], first: Tensor) -> None:
    others = _ask(cost, loads[::-1]).flip(0)
    for i, load in enumerate(loads):
        alone = float(_ask(cost, [load])[0])
        for value, how in ((alone, "alone"), (float(others[i]), "in another order")):
            must(
                _near(value, float(first[i])),
                f"entry i of a cost must follow from loads[i] alone, but {load.layer.name!r} costs {float(first[i]):g} "
                f"among all layers and {value:g} {how}",
            )


def _check_monotone(cost: CostModel, loads: Sequence[Load], first: Tensor, random: np.random.Generator) -> None:
    for i, load in enumerate(loads):
        for what, more in _larger(load, random):
            value = float(_ask(cost, [*loads[:i], more, *loads[i + 1 :]])[i])
            must(
                value >= float(first[i]) * (1 - SLACK) - SLACK,
                f"a cost must not fall when {what}, but that of {load.layer.name!r} falls from {float(first[i]):g} "
                f"({_words(load)}) to {value:g} ({_words(more)}); budgets are kept reachable by this rule",
            )


def _larger(load: Load, random: np.random.Generator) -> list[tuple[str, Load]]:
    """The load with more of one thing."""
    grid = torch.tensor(WIDTHS, dtype=torch.float64)  # 0, 1, ..., 8, 32
    wider = grid[(torch.searchsorted(grid, load.weight_bits) + 1).clamp(max=len(grid) - 1)]
    one = torch.zeros_like(load.kept, dtype=torch.bool)
    one[int(random.integers(len(one)))] = True
    act = grid[(torch.searchsorted(grid, load.act_bits) + 1).clamp(max=len(grid) - 1)]
    found = [("the layer's input gets wider", replace(load, act_bits=act))]
    for chosen in (one, torch.ones_like(one)):
        kept, pruned = chosen & (load.kept > 0), chosen & (load.kept == 0)
        if kept.any():
            found.append(("kernels get wider", replace(load, weight_bits=torch.where(kept, wider, load.weight_bits))))
        if pruned.any():
            bits = torch.where(pruned, load.weight_bits.max(), load.weight_bits)
            found.append(("kernels come back", replace(load, weight_bits=bits, kept=(bits > 0).double())))
    if load.layer.kind != "depthwise":
        inputs = (load.inputs + 1).clamp(max=load.layer.c_in // load.layer.groups)
        found.append(("the layer reads more channels", replace(load, inputs=inputs)))
    return [*found, ("more is stored beside the layer", replace(load, side=load.side + 1))]


def _check_gradients(cost: CostModel, loads: Sequence[Load], first: Tensor) -> None:
    leaves = [{name: getattr(load, name).clone().requires_grad_() for name in TENSORS} for load in loads]
    try:
        found = cost([replace(load, **tensors) for load, tensors in zip(loads, leaves, strict=True)])
    except RuntimeError as error:
        raise AssertionError(
            f"a cost must be computed in tensors, so that it has a gradient, but with loads that need one: {error}"
        ) from error
    must(
        _near(float(found.detach().sum()), float(first.sum())),
        "a cost must not depend on whether its loads need gradients",
    )
    if found.requires_grad:
        tensors = [tensor for tensors in leaves for tensor in tensors.values()]
        grads = torch.autograd.grad(found.sum(), tensors, allow_unused=True)
        for (load, name), grad in zip([(load, name) for load in loads for name in TENSORS], grads, strict=True):
            must(
                grad is None or bool(torch.isfinite(grad).all()),
                f"the gradient of a cost must be finite, but that of {load.layer.name!r} by {name} is not "
                f"({_words(load)})",
            )


def _policies(network: Network, random: np.random.Generator, count: int) -> list[CompressionPolicy]:
    """The cheapest policy, and random ones of all widths."""
    choices = Choices(weight_bits=WIDTHS, act_bits=WIDTHS[1:], blocks="max", first_last=None)
    space = SearchSpace(network, choices)
    budget = Budget(network, {"size": Size()}, {"size": 1.0}, space.cheapest())
    found = [space.cheapest()]
    for _ in range(count):
        draft = Draft(space, budget)
        while (decision := draft.decision) is not None:
            options = decision.options
            draft.take(random.uniform(*options) if decision.kind == "sparsity" else int(random.choice(options)))
        found.append(draft.policy())
    return found


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= SLACK * max(abs(a), abs(b), 1.0)


def _words(load: Load) -> str:
    bits = load.weight_bits[load.kept > 0]
    span = f"{int(bits.min())} to {int(bits.max())} bits" if len(bits) else "0 bits"
    return f"{int(load.kept.sum())} kernels of {span}, {int(load.inputs)} inputs of {int(load.act_bits)} bits"
