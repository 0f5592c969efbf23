"""What the criteria say about a kernel: gradients by hand, on networks of every kind, and on a trained network."""

import copy

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from nets import RandomNet, batches_of, conv, network_of, randomise, traced
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from ajpq.compression import compress
from ajpq.data import digits
from ajpq.elimination import elimination
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.importance import bn_scale, fisher, magnitude, of_channels, taylor
from ajpq.loaders import take
from ajpq.models import digits_cnn
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.problem import Problem
from ajpq.scoring.setting import each
from ajpq.space import Choices, SearchSpace
from ajpq.tracing import trace
from ajpq.training import accuracy, fit, recalibrate

ALL = {
    "magnitude": magnitude, "bn_scale": bn_scale, "taylor": taylor, "fisher": fisher, "elimination": elimination,
}  # fmt: skip
GRADIENT = pytest.mark.parametrize("criterion", (taylor, fisher))


def test_the_gradient_criteria_by_hand():
    """The network again as a function of the parameters that are shipped: batch-norms folded, one image at a time."""
    network = traced(
        lambda m, x: m.l((F.relu_(m.n(m.a(x))) + m.b(x)).mean((2, 3))),
        a=conv(3, 4, bias=False),
        n=nn.BatchNorm2d(4),
        b=conv(3, 4, 1),
        l=nn.Linear(4, 10),
    )
    parts = {name: network.module.get_submodule(name) for name in "anbl"}
    gain = parts["n"].weight * (parts["n"].running_var + parts["n"].eps).rsqrt()
    shipped = {
        "a": (parts["a"].weight * gain[:, None, None, None], parts["n"].bias - gain * parts["n"].running_mean),
        "b": (parts["b"].weight, parts["b"].bias),
        "l": (parts["l"].weight, parts["l"].bias),
    }
    shipped = {name: tuple(t.detach().double().requires_grad_() for t in both) for name, both in shipped.items()}
    ((images, labels),) = batches_of(network, size=5)
    first, second = ({name: 0.0 for name in shipped} for _ in range(2))
    for x, y in zip(images.double(), labels, strict=True):
        a = F.conv2d(x[None], *shipped["a"], padding=1)
        logits = F.linear((F.relu(a) + F.conv2d(x[None], *shipped["b"])).mean((2, 3)), *shipped["l"])
        for name, (weight, bias) in shipped.items():
            g, h = torch.autograd.grad(F.cross_entropy(logits, y[None]), (weight, bias), retain_graph=True)
            products = (weight * g).flatten(1).detach()
            first[name] += (products.sum(1) + (bias * h).detach()).abs().numpy() / 5
            second[name] += products.square().sum(1).numpy() / 2 / 5
    for criterion, expected in ((taylor, first), (fisher, second)):
        scores = criterion(network, [(images, labels)])
        assert list(scores) == ["a", "b", "l"]
        for name, score in scores.items():
            assert score.dtype == np.float64 and score.min() > 0
            assert np.allclose(score, expected[name], rtol=1e-4), (criterion, name)


class Odd(nn.Module):
    """What a graph may do to a layer: called twice, on several positions, padded otherwise, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
        self.twice = nn.Conv2d(6, 6, 3, padding="same", dilation=2)
        self.group = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.token, self.row = nn.Linear(8, 5), nn.Linear(5, 7)
        self.last = nn.Linear(7, 10)

    def forward(self, x):
        x = self.a(x)
        y = self.twice(x)
        y += x
        x = self.group(F.hardswish(self.twice(y), inplace=True))
        x = F.hardswish(self.norm(x), inplace=True)
        x = self.token(x.flatten(2).transpose(1, 2))  # (N, 9, 5)
        x = torch.relu(self.row(x.reshape(-1, 5))).reshape(-1, 9, 7)
        return self.last(x.mean(1))


def from_parameters(network: Network, batches) -> tuple[dict, dict]:
    """Both gradient criteria from the gradients of the parameters, image by image; a batch-norm behind a layer as in
    Molchanov et al.: (gamma dL/dgamma + beta dL/dbeta)."""
    module = copy.deepcopy(network.module).requires_grad_()
    behind = {norm.folds_into: module.get_submodule(norm.name) for norm in network.norms if norm.folds_into}
    first, second = ({layer.name: np.zeros(layer.c_out) for layer in network.layers} for _ in range(2))
    images = [(x[None], y[None]) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    for x, y in images:
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        for name in first:
            part = module.get_submodule(name)
            gated = behind.get(name, part)
            sums = [(p.detach() * p.grad).flatten(1).sum(1) if p.ndim > 1 else p.detach() * p.grad
                    for p in (gated.weight, gated.bias) if p is not None]  # fmt: skip
            first[name] += sum(sums).abs().numpy() / len(images)
            second[name] += (
                (part.weight.detach() * part.weight.grad).square().flatten(1).sum(1).numpy() / 2 / len(images)
            )
    return first, second


NETWORKS = {
    "odd": lambda: trace(randomise(Odd()), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "mobilenet_v3_small": lambda: network_of("mobilenet_v3_small"),
    "shufflenet_v2_x0_5": lambda: network_of("shufflenet_v2_x0_5"),
    **{
        f"random {seed}": lambda seed=seed: trace(randomise(RandomNet(seed)), torch.randn(2, 3, 8, 8))
        for seed in (1, 4)
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_criteria_on_any_network(name):
    network = NETWORKS[name]()
    classes = network.module(network.example).shape[1]
    batches = [(x, y % classes) for x, y in batches_of(network, size=3)]
    for criterion, expected in zip((taylor, fisher), from_parameters(network, batches), strict=True):
        scores = criterion(network, batches)
        for layer in network.layers:
            scale = expected[layer.name].max()
            assert np.allclose(scores[layer.name], expected[layer.name], rtol=1e-3, atol=1e-4 * scale), layer.name


@GRADIENT
def test_the_network_is_left_as_it_was(criterion):
    network = network_of("digits_cnn")
    batches = batches_of(network, 2)
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    modes = [module.training for module in network.module.modules()]
    criterion(network, batches)
    after = network.module.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None and not p.requires_grad for p in network.module.parameters())
    assert modes == [module.training for module in network.module.modules()]
    assert not any(m._forward_hooks or m._backward_hooks for m in network.module.modules())
    assert all(x.grad is None and not x.requires_grad for x, _ in batches)


@GRADIENT
def test_every_image_counts_once_whatever_the_batches(criterion):
    network = network_of("digits_cnn")
    ((x, y),) = batches_of(network, size=70)
    whole = criterion(network, [(x, y)])
    again, parts = criterion(network, [(x, y)]), criterion(network, zip(x.split(9), y.split(9), strict=True))
    half = criterion(network, [(x[:35], y[:35])])
    for name, score in whole.items():
        assert np.array_equal(score, again[name])
        assert np.allclose(score, parts[name], rtol=1e-4, atol=1e-6 * score.max())
        assert not np.allclose(score, half[name], rtol=1e-2)


@GRADIENT
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_they_work_where_gradients_are_switched_off(criterion, mode):
    network = network_of("digits_cnn")
    batches = batches_of(network)
    with mode():
        inside = criterion(network, batches)
    assert all(np.array_equal(score, inside[name]) for name, score in criterion(network, batches).items())


@GRADIENT
def test_a_layer_that_the_loss_does_not_depend_on_keeps_its_order(criterion):
    network = traced(
        lambda m, x: m.l(F.relu(m.a(x)).mean((2, 3)) + m.b(x).detach().mean((2, 3)) + 0 * m.c(x).mean((2, 3))),
        a=conv(3, 6), b=conv(3, 6), c=conv(3, 6), l=nn.Linear(6, 10),
    )  # fmt: skip
    scores = criterion(network, batches_of(network))
    assert scores["a"].min() > 0 and not scores["b"].any() and not scores["c"].any()
    space = SearchSpace(network, Choices(first_last=None, blocks=3), scores)
    assert np.isfinite(space.channel_scores).all()
    blocks = space.blocks(network["b"], np.ones(network.n_channels, bool))
    assert [block.tolist() for block in blocks] == [[0, 1], [2, 3], [4, 5]]
    silent = {name: 0 * score for name, score in scores.items()}
    space = SearchSpace(network, Choices(), silent)
    assert not space.channel_scores.any() and all((np.diff(order) > 0).all() for order in space.prune_order)


def test_small_scores_weigh_as_much_as_large_ones():
    """Squared gradients of a trained network are far below 1e-12; a channel's writers are compared by shares."""
    network = network_of("digits_cnn")
    scores = fisher(network, batches_of(network))
    tiny = {name: 1e-30 * score for name, score in scores.items()}
    assert (
        np.allclose(of_channels(network, scores), of_channels(network, tiny)) and of_channels(network, tiny).max() > 0.1
    )


@GRADIENT
@pytest.mark.parametrize(
    "batches, text",
    (
        (lambda x, y: [], "at least one image.*gave 0"),
        (lambda x, y: [(x, None)], "needs labels"),
        (lambda x, y: [(x, y + 5)], "labels among the classes.*from 5 to 12"),
        (lambda x, y: [(x, y - 1)], "from -1 to 6"),
    ),
)
def test_images_that_make_no_sense(criterion, batches, text):
    network = network_of("digits_cnn")
    with pytest.raises(AjpqError, match=text):
        criterion(network, batches(*batches_of(network)[0]))


def test_an_output_that_is_no_logits():
    network = traced(lambda m, x: m.a(x), a=conv(3, 10))
    with pytest.raises(AjpqError, match=r"logits \(images, classes\).*\(8, 10, 8, 8\)"):
        taylor(network, batches_of(network))


@pytest.mark.parametrize(
    "change, text",
    (
        (lambda scores: scores.pop("linear"), "'linear' has 10 kernels"),
        (lambda scores: scores.update(conv1=np.ones(3)), r"'conv1'.*shape \(3,\)"),
        (lambda scores: scores.update(conv1=np.full(len(scores["conv1"]), np.nan)), "'conv1'.*0 of them finite"),
    ),
)
def test_a_criterion_of_the_users_own_is_checked(change, text):
    network = network_of("digits_cnn")
    scores = magnitude(network)
    change(scores)
    with pytest.raises(AjpqError, match=text):
        SearchSpace(network, Choices(), scores)


@pytest.mark.parametrize("name", ALL)
def test_every_criterion_is_an_entry_of_the_configuration_and_is_followed_by_both_controllers(name):
    criterion = instantiate(OmegaConf.load(CONF / "importance" / f"{name}.yaml"))
    assert criterion is ALL[name]
    network = network_of("digits_cnn")
    batches = batches_of(network)
    problem = Problem(network, batches, [], {"size": 0.1}, importance=criterion, evaluator=each(lambda policy: 0.5))
    for layer, score in criterion(network, batches).items():
        assert np.array_equal(problem.space.scores[layer], score)
    assert np.array_equal(problem.space.channel_scores, of_channels(network, problem.space.scores))
    kernels = np.concatenate(problem.space.blocks(network["layer2.0.conv1"], np.ones(network.n_channels, bool)))
    assert (np.diff(problem.space.scores["layer2.0.conv1"][kernels]) <= 0).all()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, data = digits_cnn(), digits(seed=0)
    fit(model, data.train, epochs=5, lr=0.1, seed=0)
    network = trace(model.eval(), next(iter(data.calibration))[0])
    assert accuracy(model, data.search) > 0.9
    return network, data


@pytest.mark.parametrize("name", ALL)
def test_the_least_important_channels_are_missed_less_than_the_most_important(trained, name):
    network, data = trained
    scores = ALL[name](network, take(data.calibration, 256))

    def left(sign: int, sparsity: float = 0.2) -> float:
        space = SearchSpace(network, Choices(), {layer: sign * score for layer, score in scores.items()})
        alive = space.alive_at(sparsity)
        policy = CompressionPolicy(
            {layer.name: np.where(alive[layer.writes], 32, 0).astype(np.uint8) for layer in network.layers},
            {layer.name: 32 for layer in network.layers},
        )
        student = compress(network, policy, None)
        recalibrate(student, take(data.calibration, 256))
        return accuracy(student, data.search)

    assert left(1) > left(-1) + 0.1
