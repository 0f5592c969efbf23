"""Residual branches that go as a whole: found by graph, said by widths of 0 bits, removed everywhere."""

import numpy as np
import pytest
import torch
from nets import (
    RandomNet,
    batches_of,
    conv,
    images_of,
    masked,
    network_of,
    problem_of,
    random_policy,
    randomise,
    traced,
)
from torch import nn
from torch.nn import functional as F

from agents.children import Children
from agents.dnas import DNAS
from ajpq.architecture import Architecture, Parts
from ajpq.blocks import blocks_of
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.correction import CORRECTIONS, Correction
from ajpq.cost import BOPs, MACs, Size, UniqBOPs, loads_of, total
from ajpq.errors import AjpqError
from ajpq.features import survivors
from ajpq.finetuning import finetune
from ajpq.models import resnet20
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.report import layers_of
from ajpq.scoring.local import Local
from ajpq.scoring.reference import Reference
from ajpq.scoring.setting import Setting
from ajpq.sharing import share
from ajpq.shipping import load, ship
from ajpq.space import Choices, SearchSpace
from ajpq.supernet import SuperNet
from ajpq.tracing import trace


def without(network: Network, policy: CompressionPolicy, *numbers: int) -> CompressionPolicy:
    """The policy with these branches skipped. Where that leaves channels without a writer, they stay."""
    gone = {name for i in numbers for name in network.branches[i].layers}
    weights = {name: bits * (name not in gone) for name, bits in policy.weight_bits.items()}
    skipping = CompressionPolicy(weights, policy.act_bits)
    skipping.validate(network)
    return skipping


def pre_activation() -> Network:
    """Norm, ReLU and convolution twice in a branch whose last norm is not folded, PReLU in another, then a gate."""
    return traced(
        lambda m, x: m.head(_gated(m, _pre(m, m.stem(x))).mean((2, 3))),
        stem=conv(3, 8), n1=nn.BatchNorm2d(8), c1=conv(8, 6), n2=nn.BatchNorm2d(6), c2=conv(6, 8),
        n3=nn.BatchNorm2d(8), wide=conv(8, 12, 1), act=nn.PReLU(12), narrow=conv(12, 8, 1), n4=nn.BatchNorm2d(8),
        head=nn.Linear(8, 10),
    )  # fmt: skip


def _pre(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + m.n3(F.relu(m.c2(F.relu(m.n2(m.c1(F.relu(m.n1(x))))))))


def _gated(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.narrow(m.act(m.wide(x)))
    y += x
    return F.relu(m.n4(y), inplace=True)


def resnet20_b() -> Network:
    torch.manual_seed(0)
    return trace(randomise(resnet20(shortcut="B")), images_of("resnet20"))


NETWORKS = {
    "pre_activation": pre_activation, "resnet20_b": resnet20_b,
    **{n: lambda n=n: network_of(n) for n in ("digits_cnn", "resnet20", "resnet18", "mobilenet_v2", "efficientnet_b0")},
}  # fmt: skip


# -- which ------------------------------------------------------------------------------------------------------------


def test_branches_are_found_by_graph():
    blocks = [[f"layer{s}.{b}.conv{c}" for c in (1, 2)] for s in (1, 2, 3) for b in range(3)]
    for name in ("resnet20", "resnet20_b"):  # a projection is a shortcut, not a branch
        assert [list(branch.layers) for branch in NETWORKS[name]().branches] == blocks
    assert len(network_of("resnet18").branches) == 8
    assert len(network_of("mobilenet_v2").branches) == 10 and len(network_of("efficientnet_b0").branches) == 9
    assert [b.layers for b in pre_activation().branches] == [("c1", "c2"), ("wide", "narrow")]
    assert not network_of("vgg11_bn").branches and not network_of("densenet121").branches


def shares_a_layer(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return m.a(x + m.a(x)).mean((2, 3))


def broadcasts(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return (x.mean((2, 3), keepdim=True) + m.a(x)).mean((2, 3))


def writes_into_the_shortcut(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return (x + m.a(F.relu(x, inplace=True))).mean((2, 3))


def writes_by_a_function(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return (x + m.a(torch.relu_(x))).mean((2, 3))


def writes_out(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return (x + m.a(torch.clamp(input=x, min=0, out=x))).mean((2, 3))


def weighs(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return torch.add(x, m.a(x), alpha=2).mean((2, 3))


def has_no_shortcut(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (m.stem(x) + m.other(x)).mean((2, 3))


def is_used_elsewhere(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    y = m.a(x)
    return (x + y).mean((2, 3)) + y.mean((2, 3))


@pytest.mark.parametrize(
    "run",
    (
        shares_a_layer, broadcasts, writes_into_the_shortcut, writes_by_a_function, writes_out, weighs,
        has_no_shortcut, is_used_elsewhere,
    ),
)  # fmt: skip
def test_what_cannot_become_its_shortcut_is_no_branch(run):
    assert not traced(run, stem=conv(3, 6), a=conv(6, 6), other=conv(3, 6)).branches


@pytest.mark.parametrize("run", (writes_into_the_shortcut, writes_by_a_function, writes_out))
def test_what_writes_in_place_does_so_in_the_traced_network_and_the_compressed_one(run):
    network = traced(run, stem=conv(3, 6), a=conv(6, 6))
    x, module = network.example, network.module
    with torch.no_grad():
        assert torch.equal(module(x), run(module, x))
        for seed in range(3):
            policy = random_policy(network, seed, widths=(32,))
            assert torch.allclose(compress(network, policy)(x), masked(network, policy)(x), atol=1e-5)


# -- policies ---------------------------------------------------------------------------------------------------------


def test_only_whole_branches_may_have_no_bits():
    network = network_of("resnet20")
    policy = CompressionPolicy.homogeneous(network, 8, 8)
    for gone in (["layer1.0.conv1"], ["layer1.0.conv2"], ["conv1"], ["linear"]):
        weights = {name: bits * (name not in gone) for name, bits in policy.weight_bits.items()}
        with pytest.raises(AjpqError):
            CompressionPolicy(weights, policy.act_bits).validate(network)
    network = resnet20_b()
    gone = ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0"]  # nothing is left of the sum
    full = CompressionPolicy.homogeneous(network, 8, 8)
    with pytest.raises(AjpqError):
        weights = {name: bits * (name not in gone) for name, bits in full.weight_bits.items()}
        CompressionPolicy(weights, full.act_bits).validate(network)


def test_channels_inside_die_and_those_of_the_sum_live_on():
    network = network_of("resnet20")
    policy = without(network, CompressionPolicy.homogeneous(network, 8, 8), 1)
    alive, inner, outer = policy.alive(network), network["layer1.1.conv1"].writes, network["layer1.1.conv2"].writes
    assert not alive[inner].any() and alive[outer].all() and (~alive).sum() == len(inner)
    again = CompressionPolicy.from_json(policy.to_json())
    again.validate(network)
    assert again.digest() == policy.digest()


# -- masked == shrunk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_skipped_branch_is_one_multiplied_by_zero(name):
    network = NETWORKS[name]()
    x = torch.randn(2, *network.example.shape[1:], generator=torch.Generator().manual_seed(3))
    random = np.random.default_rng(0)
    n = len(network.branches)
    for numbers in ([0], range(n), sorted(random.choice(n, max(n // 2, 1), replace=False))):
        for policy in (CompressionPolicy.homogeneous(network), random_policy(network, 1, 0.4, widths=(32,))):
            policy, given = without(network, policy, *numbers), x.clone()
            with torch.no_grad():
                expected, small = masked(network, policy)(x), compress(network, policy)
                assert (small(given) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
            assert torch.equal(given, x)
            names = {name for name, _ in small.named_modules()}
            assert not names & {name for i in numbers for name in network.branches[i].layers}
            assert not names & policy.skipped(network).norms


def test_random_networks_lose_their_branches_faithfully():
    lost = 0
    for seed in range(12):
        random = torch.Generator().manual_seed(seed)
        network = trace(randomise(RandomNet(seed), seed), torch.randn(2, 3, 8, 8, generator=random))
        x = torch.randn(4, 3, 8, 8, generator=random)
        for numbers in {(i,) for i in range(len(network.branches))} | {tuple(range(len(network.branches)))}:
            policy = without(network, random_policy(network, seed, 0.4, widths=(32,)), *numbers)
            with torch.no_grad():
                assert (compress(network, policy)(x) - masked(network, policy)(x)).abs().max() <= 1e-5
            lost += len(numbers)
    assert lost > 12


def test_a_shortcut_that_others_read_is_copied_before_something_writes_into_it():
    network = traced(
        lambda m, x: (lambda s: m.b(F.relu(s + m.a(s), inplace=True)).mean((2, 3)) + s.mean((2, 3)))(m.stem(x)),
        stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6),
    )  # fmt: skip
    policy, x = without(network, CompressionPolicy.homogeneous(network), 0), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(compress(network, policy)(x), masked(network, policy)(x), atol=1e-6)


# -- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", (Size(), MACs(), BOPs(), UniqBOPs()))
def test_a_skipped_layer_costs_nothing_but_what_stays_of_its_block_in_the_header(cost):
    network = network_of("resnet20")
    policy = without(network, random_policy(network, 0, 0.3, (2, 8, 32), (8,)), 0, 4)
    loads, skipped = loads_of(network, policy), policy.skipped(network).layers
    per_layer = cost(loads)
    for load_, value in zip(loads, per_layer, strict=True):
        assert (load_.layer.name in skipped) == (load_.kept.sum() == 0)
        assert (value == getattr(cost, "header_of_skipped", 0)) == (load_.layer.name in skipped)
    assert torch.isfinite(per_layer).all()


def test_norms_and_parameters_of_a_skipped_branch_are_not_charged():
    network = pre_activation()
    full = CompressionPolicy.homogeneous(network, 8, 8)
    policies = (full, without(network, full, 0), without(network, full, 1))
    sides = [sum(float(load_.side) for load_ in loads_of(network, policy)) for policy in policies]
    assert sides[0] - sides[1] == 8 + 8  # n1 and n3; n2 is folded
    assert sides[0] - sides[2] == 12  # PReLU; n4 stays
    assert {norm.name for norm in network.norms if norm.folds_into is None} == {"n1", "n3", "n4"}


# -- the ways of a policy ---------------------------------------------------------------------------------------------


def setting_of(network: Network, correction: str) -> Setting:
    batches = batches_of(network, 2)
    return Setting(network, calibrate(network, batches), batches, batches_of(network, 2, seed=5), correction=correction)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ("digits_cnn", "pre_activation", pytest.param("resnet20_b", marks=pytest.mark.slow)))
def test_the_fast_scores_equal_the_reference(name, correction):
    network = NETWORKS[name]()
    setting = setting_of(network, correction)
    local, reference = Local(setting, workers=1, arithmetic="float64"), Reference(setting)
    full = random_policy(network, 3, 0.3, (2, 4, 8), (32,))  # no rounding on the way: see test_scoring.py
    for numbers in ((), (0,), (1,), (0, 1), ()):  # what was kept of one must not serve another
        policy = without(network, full, *numbers)
        fast, right = local.measure(policy), reference.measure(policy)
        assert fast.accuracy == right.accuracy
        assert fast.loss == pytest.approx(right.loss, rel=1e-4)
        assert fast.divergence == pytest.approx(right.divergence, rel=1e-3, abs=1e-5)
    local.close()


@pytest.mark.parametrize("name", ("resnet20", "resnet20_b", "pre_activation"))
def test_it_is_fine_tuned_shipped_and_loaded_within_its_size(name, tmp_path):
    network = NETWORKS[name]()
    batches = batches_of(network, 2)
    policy = without(network, random_policy(network, 2, 0.3, (2, 4, 8), (8,)), 0, 1)
    student = compress(network, policy, calibrate(network, batches))
    Correction(network, batches, "least_squares")(student, policy)
    kept = survivors(network, policy)
    assert not set(kept) & policy.skipped(network).layers
    final = finetune(student, batches, epochs=1, lr=1e-3, teacher=network.module, features=0.1, kept=kept)
    path = ship(final, tmp_path)
    assert path.stat().st_size * 8 <= total(Size(), network, policy)
    x = batches[0][0]
    with torch.no_grad():
        assert torch.equal(load(path)(x), final(x))
    rows = {row["name"]: row for row in layers_of(network, policy)}
    assert all(rows[name]["kept"] == rows[name]["mean_bits"] == 0 for name in policy.skipped(network).layers)


def test_the_size_bounds_the_file_however_many_blocks_are_skipped(tmp_path):
    for name in ("digits_cnn", "resnet20"):
        network = network_of(name)
        ranges, n = calibrate(network, batches_of(network)), len(network.branches)
        for count in (1, n // 2, n):
            policy = without(network, CompressionPolicy.homogeneous(network, 4, 8), *range(count))
            path = ship(freeze(compress(network, policy, ranges)), tmp_path)
            assert path.stat().st_size * 8 <= total(Size(), network, policy)


def test_shared_weights_are_trained_under_it():
    network = network_of("digits_cnn")
    policy, batches = without(network, CompressionPolicy.homogeneous(network, 4, 8), 1), batches_of(network, 2)
    shared = share(network, lambda rng: policy, batches, batches, steps=2, weight_decay=0.0)
    before, after = (dict(n.module.named_parameters()) for n in (network, shared))
    for name, weight in after.items():
        inside = name.startswith("layer2.0") and "shortcut" not in name
        assert torch.equal(weight, before[name]) == inside, name


def test_the_finished_network_has_no_trace_of_it():
    network = network_of("digits_cnn")
    policy = without(network, CompressionPolicy.homogeneous(network, 4, 8), 0, 1, 2)
    final = freeze(compress(network, policy, calibrate(network, batches_of(network))))
    assert {name for name, _ in final.named_modules()} >= {"conv1", "layer2.0.shortcut.0", "linear"}
    assert not [n for n in final.graph.nodes if n.op == "call_function" and "add" in n.name]


# -- differentiable search --------------------------------------------------------------------------------------------


def test_which_branches_a_granularity_may_skip():
    def offered(network: Network, granularity: str, widths: tuple[int, ...] = (0, 4, 8)) -> list[tuple[str, ...]]:
        return [b.layers for b in Architecture(SearchSpace(network, Choices(widths)), granularity).branches]

    network = network_of("resnet20")
    assert offered(network, "block") == [branch.layers for branch in network.branches]
    assert not offered(network, "layer") and not offered(network, "kernel") and not offered(network, "block", (4, 8))
    network = traced(
        lambda m, x: (lambda s: m.head((s + m.a(s)).mean((2, 3))))(m.stem(x)),
        stem=conv(3, 6), a=conv(6, 6), head=nn.Linear(6, 5),
    )  # fmt: skip
    assert offered(network, "layer") == offered(network, "block") == [("a",)]


@pytest.mark.parametrize("name", ("digits_cnn", "pre_activation"))
def test_the_super_net_without_a_branch_is_the_compressed_network_in_training_mode(name):
    network = NETWORKS[name]()
    x = torch.randn(16, *network.example.shape[1:], generator=torch.Generator().manual_seed(3))
    ranges = calibrate(network, [(x, None)])
    space = SearchSpace(network, Choices((0, 4), (8,), first_last=None))
    architecture = Architecture(space, "block")
    net, n = SuperNet(architecture, ranges), len(architecture.branches)
    assert n == len(network.branches)
    for gone in ((), (0,), (1,), range(n)):
        policy = without(network, CompressionPolicy.homogeneous(network, 4, 8), *gone)
        taken = torch.tensor([float(i not in gone) for i in range(n)])
        parts = Parts(torch.ones(0, 1), torch.ones(0, 1), torch.ones(network.n_channels), taken)
        with torch.no_grad():
            expected = compress(network, policy, ranges).train()(x)
            assert (net(x, parts) - expected).abs().max() <= 1e-4 * expected.abs().max()
        found = architecture.loads(parts)
        for cost in (Size(), MACs(), BOPs()):
            known = float(cost(loads_of(network, policy)).sum())
            known += 32 * policy.skipped(network).parameters * isinstance(cost, Size)
            assert float(cost(found).sum()) == pytest.approx(known, rel=1e-12)


def test_the_gradient_reaches_the_choice_between_a_branch_and_its_shortcut():
    network = network_of("digits_cnn")
    batches = batches_of(network)
    architecture = Architecture(SearchSpace(network, Choices((0, 4, 8))), "block")
    net = SuperNet(architecture, calibrate(network, batches))
    parts = architecture.sample(1.0, torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(F.cross_entropy(net(batches[0][0], parts), batches[0][1]), architecture.skipping)
    assert grad.shape == (3, 2) and (grad != 0).all()
    (grad,) = torch.autograd.grad(MACs()(architecture.loads(architecture.probabilities())).sum(), architecture.skipping)
    assert (grad[:, 1] > 0).all()  # taking it is dearer


def test_children_skip_whole_blocks_within_budget():
    problem = problem_of("digits_cnn", {"size": 0.1, "macs": 0.3})
    architecture, rng = Architecture(problem.space, "block"), np.random.default_rng(0)
    children = Children(problem, architecture)
    with torch.no_grad():
        architecture.skipping.copy_(torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 2.0]]))
    seen = set()
    for _ in range(8):
        policy = children.draw(rng, 1.0)
        policy.validate(problem.network)
        assert problem.budget.admits(policy)
        seen.add(policy.skipped(problem.network).layers)
    first, second = (set(branch.layers) for branch in architecture.branches[:2])
    assert all(first <= names for names in seen) and any(not second & names for names in seen) and len(seen) > 1


def test_a_tight_budget_makes_dnas_skip_blocks_of_resnet20():
    train = batches_of(network_of("resnet20"), 5)
    problem = problem_of("resnet20", {"macs": 0.1}, train=train)
    result = DNAS(evaluations=6, granularity="block", epochs=2, every=1).search(problem)
    policy, network = result.policy, problem.network
    policy.validate(network)
    skipped = policy.skipped(network).layers
    assert result.score.within and result.score.ratios["macs"] <= 0.1
    assert any(set(block) <= skipped for block in blocks_of(network))
    assert set(skipped) <= {name for branch in network.branches for name in branch.layers}
