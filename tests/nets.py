"""Small networks, random policies and the reference of pruning that several tests share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ajpq import quantize
from ajpq.calibration import Calibration, InputRange
from ajpq.importance import magnitude
from ajpq.models import digits_cnn, resnet20
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.scoring.setting import each
from ajpq.step_sizes import fit_scale
from ajpq.tracing import trace

TORCHVISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "vgg11_bn",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
)
# Parameters of a test. The slow ones are large, and couple nothing that the others, or RandomNet, do not.
NETWORKS = tuple(
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("resnet18", "vgg11_bn", "densenet121", "googlenet", "efficientnet_b0", "regnet_y_400mf")
    else name
    for name in ("digits_cnn", "resnet20", *TORCHVISION)
)
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 32)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and norm parameters (gammas of both signs), so that no channel is zero by accident."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
                size = (module.num_features,)
                if module.affine:
                    sign = torch.where(torch.rand(size, generator=random) < 0.2, -1.0, 1.0)
                    module.weight.copy_(sign * (0.6 + 0.6 * torch.rand(size, generator=random)))
                    module.bias.copy_(0.2 * torch.randn(size, generator=random))
                if module.track_running_stats:
                    module.running_mean.copy_(0.2 * torch.randn(size, generator=random))
                    module.running_var.copy_(0.5 + torch.rand(size, generator=random))
                    module.num_batches_tracked.zero_()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                fan = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=random) * (1.5 / fan) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=random))
    return model.eval()


def model_of(name: str) -> nn.Module:
    """A network by name, ten classes, randomised; the caller's own."""
    return copy.deepcopy(_model_of(name))


@functools.cache
def _model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ("digits_cnn", "resnet20"):
        return randomise({"digits_cnn": digits_cnn, "resnet20": resnet20}[name]())
    return randomise(torchvision_net(name))


def torchvision_net(name: str) -> nn.Module:
    """A torchvision network with ten classes and no initial weights, which take time; `randomise` sets all of them.
    The hidden layers of VGG's classifier have 64 kernels instead of 4096, to spare memory.
    """
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths with tensors
        options = {"init_weights": False} if name == "googlenet" else {}
        model = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
        if name == "vgg11_bn":
            widths = (model.classifier[0].in_features, 64, 64, 10)
            model.classifier[0], model.classifier[3], model.classifier[6] = (
                nn.Linear(a, b) for a, b in pairwise(widths)
            )
    return model.to_empty(device="cpu")


def images_of(name: str, n: int = 2, seed: int = 0) -> Tensor:
    """Noise of the shape that the tests show a network; (n, C, H, W)."""
    shape = {"digits_cnn": (1, 8, 8), "resnet20": (3, 32, 32)}.get(name, (3, 64, 64))
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


_networks: dict[str, tuple[Network, list]] = {}


def network_of(name: str) -> Network:
    """`model_of` traced; shared, so not to be changed."""
    if name not in _networks:
        network = trace(_model_of(name), images_of(name))
        _networks[name] = network, _state(network)
    return _networks[name][0]


def forget_changed() -> list[str]:
    """Names of the shared networks that somebody has changed; the next to ask gets a new one."""
    changed = [name for name, (network, state) in _networks.items() if _state(network) != state]
    for name in changed:
        del _networks[name]
    return changed


def _state(network: Network) -> list:
    """Another one after every write to a tensor, also one that writes what was there."""
    tensors = [*network.module.parameters(), *network.module.buffers()]
    modes = [module.training for module in network.module.modules()]
    return modes + [(id(tensor), tensor._version, tensor.requires_grad, tensor.grad is None) for tensor in tensors]


class Net(nn.Module):
    """A forward written in one line, with its modules: ``Net(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(...), ...)``."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(c_in: int, c_out: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def traced(run: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...] = (3, 8, 8), **parts) -> Network:
    """The network of a randomised `Net`."""
    return trace(randomise(Net(run, **parts)), torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)))


# -- policies and the reference ---------------------------------------------------------------------------------------


def random_alive(network: Network, random: np.random.Generator, sparsity: float = 0.5) -> np.ndarray:
    """bool (n_channels,): every tensor and every kernel keeps a channel, what cannot be pruned stays."""
    alive = ~network.prunable | (random.random(network.n_channels) >= sparsity)
    for ids in (*network.values.values(), *(layer.reads for layer in network.layers)):
        if not alive[ids].any():
            alive[random.choice(ids)] = True
    return alive


def random_policy(
    network: Network,
    seed: int,
    sparsity: float = 0.5,
    widths: tuple[int, ...] = WIDTHS,
    act_bits: tuple[int, ...] = (32,),
) -> CompressionPolicy:
    random = np.random.default_rng(seed)
    alive = random_alive(network, random, sparsity)
    policy = CompressionPolicy(
        {
            layer.name: np.where(alive[layer.writes], random.choice(widths, layer.c_out), 0).astype(np.uint8)
            for layer in network.layers
        },
        {layer.name: int(random.choice(act_bits)) for layer in network.layers},
    )
    policy.validate(network)
    return policy


@torch.no_grad()
def masked(
    network: Network,
    policy: CompressionPolicy,
    calibration: Calibration | None = None,
    dtype: torch.dtype = torch.float32,
) -> fx.GraphModule:
    """The reference: the original, full-size network with pruned kernels, biases and norm entries at zero, all other
    kernels quantized in place, and hooks that quantize what layers read; skipped branches are multiplied by zero."""
    module, alive = copy.deepcopy(network.module).to(dtype), policy.alive(network)
    nodes = {node.name: node for node in module.graph.nodes}
    for branch in network.branches:
        if not any(policy.weight_bits[name].any() for name in branch.layers):
            end, sum_ = nodes[branch.end], nodes[branch.sum]
            with module.graph.inserting_before(sum_):
                sum_.replace_input_with(end, module.graph.call_function(torch.mul, (end, 0.0)))
    module.recompile()
    for layer in network.layers:
        part, bits = module.get_submodule(layer.name), torch.from_numpy(policy.weight_bits[layer.name])
        weight = network.module.get_submodule(layer.name).weight
        if ((bits == 0) | (bits == 32)).all():  # nothing to fit, which takes time
            part.weight[bits == 0] = 0
        else:
            scale = fit_scale(weight, bits)
            offset, scales = (
                t.to(dtype).reshape(-1, *[1] * (weight.ndim - 1)) for t in (quantize.grid(bits)[2], scale)
            )
            whole = (quantize.encode(weight, bits, scale).to(dtype) + offset) * scales
            whole[bits == 32] = weight[bits == 32].to(dtype)
            part.weight.copy_(whole)
        if part.bias is not None:
            part.bias[bits == 0] = 0
        act_bits = policy.act_bits[layer.name]
        if act_bits != 32:
            part.register_forward_pre_hook(_rounding(calibration[layer.name], act_bits))
    for norm in network.norms:
        part, dead = module.get_submodule(norm.name), torch.from_numpy(~alive[norm.channels])
        for tensor in (part.weight, part.bias, part.running_mean):
            if tensor is not None:
                tensor[dead] = 0
    return module


def _rounding(seen: InputRange, bits: int) -> Callable:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if seen.signed else (0, 2**bits - 1)
    step = np.float32(seen.step(bits))
    return lambda _, args: ((args[0] * float(1 / step)).round().clamp(low, high) * float(step),)


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Largest absolute difference of two modules' outputs."""
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()


# -- random small networks --------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """One of the ways in which CNNs treat channels, at random sizes. `c_out` tells what comes out."""

    KINDS = (
        "conv",
        "grouped",
        "depthwise",
        "residual",
        "project",
        "concat",
        "dense",
        "slices",
        "shuffle",
        "pad",
        "excite",
        "pool",
        "twice",
        "half",
        "norm_first",
        "unknown",
    )

    def __init__(self, kind: str, c: int, random: np.random.Generator) -> None:
        super().__init__()
        self.kind, self.c = kind, c
        wide = int(random.integers(4, 9))
        self.c_out = {
            "conv": wide,
            "project": wide,
            "concat": 2 * wide,
            "dense": c + wide,
            "pad": c + 4,
            "depthwise": 2 * c,
            "grouped": 4 * (c // 2),
        }.get(kind, c)
        self.cut = int(random.integers(1, c))
        self.act = (F.relu, F.hardswish, F.silu, torch.tanh, F.leaky_relu)[random.integers(5)]
        self.norm = nn.BatchNorm2d(self.c_out)
        if kind in ("conv", "project", "concat", "dense", "excite", "half"):
            self.a = conv(
                c, {"excite": c, "half": c}.get(kind, wide), int(random.choice((1, 3))), bias=bool(random.integers(2))
            )
        if kind == "project":
            self.b, self.d = conv(c, wide, 1), conv(wide, wide, 3, bias=False)
        if kind == "concat":
            self.b = conv(c, wide, 1)
        if kind in ("residual", "twice", "unknown"):
            self.a, self.inner = conv(c, c, 3, bias=False), nn.BatchNorm2d(c)
        if kind == "residual":
            self.b = conv(c, c, 3)
        if kind == "grouped":
            self.a = conv(2 * (c // 2), self.c_out, 3, groups=2)
        if kind == "depthwise":
            self.a = conv(c, 2 * c, 3, groups=c)
        if kind == "excite":
            self.down, self.up = conv(c, 3, 1), conv(3, c, 1)
        if kind == "slices":
            self.a, self.b = conv(self.cut, self.cut, 3), conv(c - self.cut, c - self.cut, 1)

    def forward(self, x: Tensor) -> Tensor:
        c, cut, act = self.c, self.cut, self.act
        match self.kind:
            case "conv":
                return act(self.norm(self.a(x)))
            case "grouped":
                return act(self.norm(self.a(x[:, : 2 * (c // 2)])))
            case "depthwise":
                return act(self.norm(self.a(x)))
            case "residual":
                return act(self.norm(self.b(act(self.inner(self.a(x))))) + x)
            case "project":
                return act(self.norm(self.d(act(self.a(x)))) + self.b(x))
            case "concat":
                return self.norm(torch.cat([act(self.a(x)), self.b(x)], 1))
            case "dense":
                return act(self.norm(torch.cat([x, self.a(act(x))], dim=1)))
            case "slices":
                return self.norm(torch.cat([self.b(x[:, cut:]), act(self.a(x[:, :cut]))], 1))
            case "shuffle" if c % 2 == 0:
                first, second = (
                    x.view(x.size(0), 2, c // 2, x.size(2), x.size(3))
                    .transpose(1, 2)
                    .reshape(x.size(0), c, x.size(2), x.size(3))
                    .chunk(2, 1)
                )
                return torch.cat((second, first), 1)
            case "pad":
                return F.pad(x, (1, 0, 0, 1, 3, 1))
            case "excite":
                return self.a(x) * torch.sigmoid(self.up(act(self.down(F.adaptive_avg_pool2d(x, 1)))))
            case "pool":
                return F.avg_pool2d(act(x), 3, 1, 1) + F.max_pool2d(x, 3, 1, 1)
            case "twice":
                return act(self.inner(self.a(act(self.a(x)))))
            case "half":
                return torch.cat([torch.roll(x, 1, 1)[:, ::2], self.a(x)[:, 1::2]], 1)
            case "norm_first":
                return act(self.norm(x))
            case "unknown":
                return x + torch.softmax(self.a(x), 1)
        return act(x)


class RandomNet(nn.Module):
    """A stem, five to eight random blocks, one of three heads. (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        blocks, c = [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU()], 6
        for kind in random.choice(_Block.KINDS, random.integers(5, 9)):
            if c > 24:
                break
            blocks.append(_Block(str(kind), c, random))
            c = blocks[-1].c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = int(random.integers(3))
        self.linear = nn.Linear(c * (1, 4, 1)[self.head], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.blocks(x))
        if self.head == 0:
            return self.linear(x.mean((2, 3)))
        if self.head == 1:
            return self.linear(F.adaptive_avg_pool2d(x, 2).view(x.size(0), -1))
        return self.linear(torch.flatten(F.adaptive_max_pool2d(x, 1), 1))


# -- problems ---------------------------------------------------------------------------------------------------------


def batches_of(network: Network, count: int = 1, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Noise with labels 0 to 9, in batches (x, y)."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *network.example.shape[1:], generator=random), torch.arange(size) % 10) for _ in range(count)
    ]


def problem_of(name: str = "digits_cnn", budget: dict[str, float] | None = None, **options) -> Problem:
    """A problem on noise. evaluator: policy -> accuracy; if not given the mean width, so that nothing is run.
    importance: if not given that of the weights, which is there at once."""
    network = network_of(name)
    options["evaluator"] = each(options.get("evaluator", lambda policy: policy.mean_bits() / 32))
    options.setdefault("importance", magnitude)
    return Problem(network, batches_of(network), batches_of(network, seed=1), budget or {"size": 0.1}, **options)
