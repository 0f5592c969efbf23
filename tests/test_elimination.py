"""What the readers of a channel lose when it goes: against least squares solved directly, on networks of every kind."""

import numpy as np
import pytest
import torch
from nets import TORCHVISION, batches_of, conv, network_of, traced
from torch import Tensor, nn
from torch.nn import functional as F

from ajpq.elimination import elimination
from ajpq.errors import AjpqError
from ajpq.importance import magnitude
from ajpq.network import Network
from ajpq.reconstruction import NOISE, RIDGE
from ajpq.space import Choices, SearchSpace


def least(x: Tensor, weight: Tensor, gone: list[int], centred: bool) -> float:
    """The least of tr (W - W0) (X'X / N + r I) (W - W0)' over W whose columns `gone` are 0, of the energy of X W0'.
    x: (N, n), weight: (K, n)."""
    x = x - x.mean(0) if centred else x
    xx = x.T @ x / len(x)
    gram = xx + (RIDGE + NOISE) * xx.diagonal().mean() * torch.eye(len(xx)).double()
    stay = [i for i in range(len(xx)) if i not in gone]
    best = torch.zeros_like(weight)
    if stay:
        best[:, stay] = torch.linalg.solve(gram[stay][:, stay], weight @ gram[:, stay], left=False)
    return float(((best - weight) @ gram @ (best - weight).T).trace() / (weight @ xx @ weight.T).trace())


def small(network: Network, images: int) -> list[tuple[Tensor, Tensor]]:
    """So few positions that all of them count."""
    ((x, y),) = batches_of(network, size=images)
    return [(x[:, :, :4, :4], y)]


@pytest.mark.parametrize("bias", (True, False))
def test_errors_are_those_of_least_squares_without_the_channels(bias):
    network = traced(
        lambda m, x: m.l(m.b(F.relu(m.a(x))).mean((2, 3))), a=conv(3, 8), b=conv(8, 6, 1, bias=bias), l=nn.Linear(6, 10)
    )
    batches = small(network, 128)
    score = elimination(network, batches)["a"]
    a, b = (network.module.get_submodule(name) for name in "ab")
    x = F.relu(a(batches[0][0])).detach().flatten(2).mT.flatten(0, 1).double()
    weight = b.weight.detach()[:, :, 0, 0].double()
    gone: list[int] = []
    for channel in np.argsort(score):
        before = least(x, weight, gone, bias)
        added = {c: least(x, weight, [*gone, c], bias) - before for c in range(8) if c not in gone}
        assert channel == min(added, key=added.get)
        assert added[channel] <= score[channel] * 1.001  # a score is never below that of a channel that went before
        if gone and added[channel] > score[gone].max() * 1.001 or not gone:
            assert np.isclose(score[channel], added[channel], rtol=1e-3)
        gone.append(int(channel))
    assert len(np.unique(score)) == 8


def test_a_channel_that_another_one_tells_goes_before_a_weaker_one():
    network = traced(lambda m, x: m.l(m.b(F.relu(m.a(x))).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), l=nn.Linear(6, 10))
    a = network.module.get_submodule("a")
    with torch.no_grad():
        a.weight[2], a.bias[2] = 3 * a.weight[5], 3 * a.bias[5]  # the same feature, three times as strong
        a.weight[7] = 0  # a constant, which the bias of the next layer can stand for
    batches = small(network, 64)
    order = np.argsort(elimination(network, batches)["a"]).tolist()
    assert order[0] == 7 and order[1] in (2, 5) and abs(order.index(2) - order.index(5)) > 1
    assert np.argsort(magnitude(network)["a"]).tolist().index(2) > 3


def run_twice(m: nn.Module, x: Tensor) -> Tensor:
    """A channel that a layer reads twice, one that goes through a depthwise layer and a group, and a flattened one."""
    x = F.relu(m.n(m.a(x)))
    x = torch.cat([x, x], 1)
    x = F.relu(m.d(F.relu(m.b(x))))
    return m.l(F.max_pool2d(F.relu(m.g(x)), 2).flatten(1))


def twice() -> Network:
    return traced(
        run_twice, a=conv(3, 8, bias=False), n=nn.BatchNorm2d(8), b=conv(16, 12), d=conv(12, 12, groups=12),
        g=conv(12, 8, groups=2), l=nn.Linear(128, 10),
    )  # fmt: skip


def test_what_is_read_twice_through_others_or_pixel_by_pixel():
    network = twice()
    batches = batches_of(network, 2, size=40)
    scores = elimination(network, batches)
    assert np.array_equal(scores["b"], scores["d"])  # a channel has one score, whoever writes it
    for name, channels in (("a", 8), ("b", 6), ("g", 4)):  # two groups share channels, of inputs and of outputs
        assert len(np.unique(scores[name])) == channels and scores[name].min() > 0
    assert np.array_equal(scores["l"], magnitude(network)["l"])  # nobody reads the classes
    with torch.no_grad():  # what the last layer does not look at, at any of its pixels, is missed by nobody
        network.module.get_submodule("l").weight.view(10, 8, 16)[:, [1, 5]] = 0
        network.module.get_submodule("b").weight[:, [3, 11]] = 0
    scores = elimination(network, batches)
    assert set(np.flatnonzero(scores["g"] == scores["g"].min())) == {1, 5} and np.argmin(scores["a"]) == 3
    assert scores["g"].min() < 1e-6 and scores["a"].min() < 1e-6


@pytest.mark.parametrize(
    "name",
    (
        *("digits_cnn", "resnet20", "shufflenet_v2_x0_5"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION if name != "shufflenet_v2_x0_5"),
    ),
)
def test_any_network_has_an_order_and_is_left_as_it_was(name):
    network = network_of(name)
    batches = batches_of(network, 2)
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    scores = elimination(network, batches)
    assert all(torch.equal(before[key], value) for key, value in network.module.state_dict().items())
    assert not any(module._forward_hooks for module in network.module.modules())
    again = elimination(network, batches)
    assert all(np.array_equal(score, again[name]) for name, score in scores.items())
    space = SearchSpace(network, Choices(), scores)  # checks shapes, and that all are finite
    moved = SearchSpace(network, Choices(), magnitude(network))
    orders = [(a, b) for a, b in zip(space.prune_order, moved.prune_order, strict=True) if len(a) > 8]
    assert orders and not any(np.array_equal(a, b) for a, b in orders)


def test_many_channels_at_once_go_as_one_by_one():
    """Of 128 channels two go before the moments are updated, out of eight candidates."""
    network = traced(lambda m, x: m.l(m.b(F.relu(m.a(x))).mean((2, 3))), a=conv(3, 160), b=conv(160, 24, 1),
                     l=nn.Linear(24, 10))  # fmt: skip
    batches = batches_of(network, 2, size=64)
    scores = elimination(network, batches)["a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ajpq.elimination.AT_ONCE", 10**6)
        exact = elimination(network, batches)["a"]
    ranks = [np.argsort(np.argsort(s)) for s in (scores, exact)]
    assert np.corrcoef(*ranks)[0, 1] > 0.99
    assert np.isclose(np.sort(scores)[:80].sum(), np.sort(exact)[:80].sum(), rtol=0.05)


def test_no_image():
    with pytest.raises(AjpqError, match="at least one image.*gave 0"):
        elimination(network_of("digits_cnn"), [])
