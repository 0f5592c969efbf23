"""A problem that costs nothing: a small network with one of each kind of layer, random weights, random images."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ajpq.network import Network
from ajpq.problem import Problem
from ajpq.scoring.local import Local
from ajpq.space import Choices
from ajpq.tracing import trace

CLASSES, SHAPE = 4, (2, 8, 8)


class SmallNet(nn.Module):
    """Convolutions plain, depthwise and strided, a residual addition, a batch-norm that folds into no layer, a linear
    layer. Images (N, 2, 8, 8) -> logits (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.down = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + self.back(torch.relu(self.wide(self.depthwise(x))))
        x = torch.relu(self.down(torch.relu(self.norm(x))))
        return self.linear(x.mean((2, 3)))


def small_network(seed: int = 0) -> Network:
    """The traced `SmallNet`; the same weights for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = SmallNet().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
        elif name.endswith("running_var") or "norm.weight" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        else:
            spread = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.2
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
    images = torch.randn(100, *SHAPE, generator=generator)
    with torch.no_grad():
        model.linear.bias -= model(images).mean(0)  # so that it says every class
    return trace(model, images[:2])


def small_problem(budget: dict[str, float] | None = None, *, seed: int = 0, **options: Any) -> Problem:
    """A `Problem` on a small network of random weights: 16 images to calibrate, 64 to score, 80 to train, labels as the
    network itself gives them, so that compression costs accuracy. Made in well below a second.

    budget: cost name -> fraction; by default {"size": 0.3, "macs": 0.8}. options: of `Problem`; by default all widths
    up to 8 bits in every layer, inputs of 4 or 8 bits, 3 blocks.
    """
    network, generator = small_network(seed), torch.Generator().manual_seed(seed + 1)
    options = {"choices": Choices(act_bits=(4, 8), first_last=None, blocks=3), "evaluator": _local} | options

    def batch(images: int) -> list[tuple[Tensor, Tensor]]:
        x = torch.randn(images, *SHAPE, generator=generator)
        with torch.no_grad():
            return [(x, network.module(x).argmax(1))]

    calibration, search = batch(16), batch(64)
    given = {"train": [batch(16)[0] for _ in range(5)]} | options
    return Problem(network, calibration, search, budget or {"size": 0.3, "macs": 0.8}, **given)


def _local(task: Any) -> Local:
    return Local(task, workers=1, cache_bytes=0, arithmetic="float32")


def must(condition: bool, sentence: str) -> None:
    """`assert` that python -O leaves in."""
    if not condition:
        raise AssertionError(sentence)


def fingerprint(network: Network) -> dict[str, str]:
    """What could be changed in a network, as text: every tensor, mode and gradient, by name."""
    found = {}
    for name, tensor in network.module.state_dict().items():
        found[name] = hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
    for name, parameter in network.module.named_parameters():
        found[name] += f" gradient {parameter.grad is not None}, required {parameter.requires_grad}"
    for name, module in network.module.named_modules():
        found[f"the mode of {name or 'the whole'}"] = f"training {module.training}, hooks {len(module._forward_hooks)}"
    return found


def must_be_unchanged(what: str, before: dict[str, str], network: Network) -> None:
    after = fingerprint(network)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    must(not changed, f"{what} must not modify the problem's network, but {changed[:1]} is another afterwards")


@contextmanager
def other_random_numbers(seed: int) -> Iterator[None]:
    """A block in which the global generators of Python, numpy and torch are seeded so, and as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
