"""Forwards that end in ``x.view(x.size(0), -1)``: images come in the order of memory that they take."""

import copy

import pytest
import torch
from nets import Net, conv, randomise
from torch import nn
from torch.nn import functional as F

from agents.uniform import Uniform
from ajpq.compression import compress
from ajpq.features import survivors
from ajpq.finetuning import finetune
from ajpq.image_order import takes_channels_last
from ajpq.problem import Problem
from ajpq.reconstruction import reconstruct
from ajpq.shipping import load, ship
from ajpq.tracing import trace
from ajpq.training import fit


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(3, 8), conv(8, 16)
        self.f1, self.f2 = nn.Linear(16 * 2 * 2, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.f2(F.relu(self.f1(x)))


def batches() -> list:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 3, 8, 8, generator=random), torch.randint(10, (32,), generator=random)) for _ in range(3)]


@pytest.mark.parametrize("options", ({}, {"precision": "bfloat16"}, {"features": 0.1}), ids=str)
def test_a_forward_with_a_view_goes_all_the_way(options, tmp_path) -> None:
    torch.manual_seed(0)
    model, data = randomise(LeNet()).eval(), batches()
    problem = Problem(model, data, data, {"size": 0.5})
    policy = Uniform().search(problem).policy
    student = compress(problem.network, policy, problem.calibration)
    reconstruct(student, problem.network, policy, data)
    before = copy.deepcopy(student.state_dict())
    kept = survivors(problem.network, policy)
    final = finetune(student, data, epochs=1, teacher=model, kept=kept, **options)
    assert not torch.equal(before["f1.weight"], student.f1.weight)
    assert torch.equal(load(ship(final, tmp_path))(data[0][0]), final(data[0][0]))


def test_such_a_model_is_trained() -> None:
    model = randomise(LeNet())
    assert len(fit(model, batches(), epochs=1, lr=0.01)) == 1


def test_asking_a_network_leaves_it_and_the_random_numbers_as_they_are() -> None:
    noisy = Net(lambda m, x: m.n(F.dropout(m.a(x), 0.5)), a=conv(3, 4), n=nn.BatchNorm2d(4)).train()
    other, x = LeNet(), batches()[0][0]
    noisy.a.eval()
    before, random = copy.deepcopy(noisy.state_dict()), torch.get_rng_state()
    assert takes_channels_last(noisy, x) and not takes_channels_last(other, x)
    assert torch.equal(random, torch.get_rng_state())
    assert (noisy.training, noisy.a.training, noisy.n.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in noisy.state_dict().items())


def test_a_view_that_is_written_into_stays_one() -> None:
    class Writing(LeNet):
        def forward(self, x):
            x = F.max_pool2d(self.c2(F.max_pool2d(self.c1(x), 2)), 2)
            y = x.view(x.size(0), -1)
            y.unsqueeze(1).mul_(2)
            return self.f2(F.relu(self.f1(x.view(x.size(0), -1))))

    model, x = randomise(Writing()).eval(), batches()[0][0]
    network = trace(model, x)
    names = [node.target for node in network.module.graph.nodes if node.op == "call_method"]
    assert names.count("view") == 1 and names.count("reshape") == 1
    with torch.no_grad():
        assert torch.equal(network.module(x), model(x))
