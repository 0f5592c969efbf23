"""The super net against its literal form, the compressed network and the float one; the search against uniform."""

import copy
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from nets import batches_of, conv, network_of, random_policy, randomise, traced
from torch import nn
from torch.nn import functional as F

from agents.children import Children
from agents.dnas import DNAS
from agents.genes import Genome
from agents.uniform import Uniform
from ajpq import quantize
from ajpq.architecture import Architecture, Parts, check_differentiable
from ajpq.blocks import blocks_of
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.cost import BOPs, MACs, Size, loads_of
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.mixing import MixedInput, MixedLayer, dorefa, rounded
from ajpq.models import digits_cnn
from ajpq.problem import Problem
from ajpq.rewards import divergence_reward
from ajpq.scoring.setting import each
from ajpq.space import Choices, SearchSpace
from ajpq.supernet import SuperNet
from ajpq.testing import check_backend
from ajpq.testing.problems import small_network, small_problem
from ajpq.tracing import trace
from ajpq.training import fit

WIDTHS = (1, 2, 3, 4, 6, 8, 32)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shares(rows: int, options: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(image(rows, options, seed=seed), 1)


# -- layers -----------------------------------------------------------------------------------------------------------


def literal(layer: MixedLayer, x: torch.Tensor) -> torch.Tensor:
    """A path for every pair of candidates: sum of p_k q_j conv(A_j(x), Q_k(w)), by autograd through the quantizers."""
    found = 0
    for k, b in enumerate(layer.widths):
        bits = torch.full((len(layer.weight),), b)
        weight = quantize.fake_quantize(layer.weight, bits, layer.scales[k])
        if layer.versions is dorefa and b == 1:
            sign = torch.where(layer.weight < 0, -1.0, 1.0) * layer.weight.abs().mean()
            weight = layer.weight + (sign - layer.weight).detach()
        elif layer.versions is dorefa and b < 32:
            t, steps = torch.tanh(layer.weight), 2**b - 1
            most = t.abs().max().detach()
            levels = steps * (t / most + 1) / 2
            weight = (2 * (levels + (levels.round() - levels).detach()) / steps - 1) * most
        for j, a in enumerate(layer.inputs.widths):
            seen = quantize.fake_quantize_act(x, layer.inputs.steps[j], a, layer.inputs.signed)
            path = layer.geometry.apply(seen, weight, None)
            found = found + layer.q[j] * layer.p[k].view(1, -1, *[1] * (path.ndim - 2)) * path
    return found + layer.bias.view(1, -1, *[1] * (found.ndim - 2))


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("acts", [(32,), (8,), (2, 4, 32)])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (conv(6, 8), (4, 6, 5, 5)),
        (conv(6, 9, groups=3, stride=2), (4, 6, 5, 5)),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (4, 6, 5, 5)),
        (nn.Linear(6, 5), (4, 6)),
    ],
    ids=["conv", "grouped", "circular", "linear"],
)
def test_one_convolution_of_mixed_weights_equals_all_paths_in_output_and_gradients(module, shape, acts):
    for versions in (rounded, dorefa):
        inputs = MixedInput(acts, True, [2.0**-b if b < 32 else 1.0 for b in acts], pact=False)
        layer = MixedLayer(randomise(copy.deepcopy(module)), WIDTHS, inputs, versions)
        x = image(*shape).requires_grad_(True)
        layer.p = shares(len(module.weight), len(WIDTHS)).T.contiguous().requires_grad_(True)
        layer.q = shares(1, len(acts), 1)[0].requires_grad_(len(acts) > 1)
        leaves = [x, layer.weight, layer.bias, layer.p] + [layer.q] * (len(acts) > 1)
        found, expected = layer(x), literal(layer, x)
        close(found, expected)
        up = image(*found.shape, seed=2)
        for one, other in zip(
            torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True
        ):
            close(one, other)


def test_both_forms_have_the_same_gradient_in_expectation():
    """Of the logits, each form with noise of its own: the means of 600 draws agree within their standard errors."""
    layer = MixedLayer(randomise(conv(3, 4)), (1, 2, 4), MixedInput((32,), True, [1.0], pact=False), rounded)
    x, logits, means, errors = image(8, 3, 6, 6), torch.tensor([[0.5, 0.0, -0.5]], requires_grad=True), [], []
    layer.q = torch.ones(1)
    for seed, form in enumerate((layer, partial(literal, layer))):
        noise, drawn = torch.Generator().manual_seed(seed), []
        for _ in range(600):
            gumbel = -torch.log(-torch.log(torch.rand(1, 3, generator=noise)))
            layer.p = torch.softmax((logits + gumbel) / 0.7, 1).T.expand(3, 4)
            loss = (form(x) - F.conv2d(x, layer.weight, layer.bias, padding=1)).square().mean()
            drawn.append(torch.autograd.grad(loss, logits)[0][0])
        table = torch.stack(drawn)
        means.append(table.mean(0))
        errors.append(table.std(0) / 600**0.5)
    assert (means[0].abs() > 4 * errors[0]).any()  # there is something to agree on
    assert ((means[0] - means[1]).abs() < 4 * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()


@pytest.mark.parametrize("signed", [False, True])
def test_pact_learns_the_clipping_value_from_what_is_clipped(signed):
    x = image(2, 3, 4, 4) if signed else image(2, 3, 4, 4).abs()
    inputs = MixedInput((2, 4), signed, [0.5, 0.1], pact=True)
    assert inputs.clip.item() == pytest.approx(0.1 * (7 if signed else 15))
    x, q = x.requires_grad_(True), torch.tensor([0.3, 0.7])
    up = image(2, 3, 4, 4, seed=1)
    to_x, to_clip = torch.autograd.grad(inputs.run(x, q, lambda mixed: mixed), [x, inputs.clip], up)
    with torch.no_grad():
        clip, expected = inputs.clip, torch.zeros(())
        for j, (b, step) in enumerate(zip((2, 4), inputs.step_sizes(), strict=True)):
            lo, hi = quantize.act_range(b, signed)
            expected += q[j] * up[x > clip].sum() + q[j] * (lo / hi) * up[x < lo * step].sum()
        assert to_clip.item() == pytest.approx(expected.item(), rel=1e-4)
        assert (to_x[x > clip] == 0).all() and torch.allclose(to_x[x.abs() < clip], up[x.abs() < clip])


def kept_bytes(run) -> int:
    """What a forward pass still holds when it is over, its result included."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        out = run()
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_quantized_inputs_and_paths_take_no_memory():
    layer = MixedLayer(randomise(conv(4, 4)), WIDTHS, MixedInput((4, 8), True, [0.1, 0.01], pact=False), rounded)
    layer.p, layer.q = shares(4, len(WIDTHS)).T, shares(1, 2)[0]
    x = image(64, 4, 16, 16).requires_grad_(True)
    size = 4 * x.numel()  # of the result, too
    assert size <= kept_bytes(lambda: layer(x)) < 1.2 * size
    assert kept_bytes(lambda: literal(layer, x)) > 5 * size


def test_weights_are_quantized_again_only_when_they_have_moved():
    made = []

    def versions(*of):
        made.append(of)
        return rounded(*of)

    layer = MixedLayer(randomise(conv(3, 4)), WIDTHS, MixedInput((8,), True, [0.1], pact=False), versions)
    layer.p, layer.q, x = shares(4, len(WIDTHS)).T, torch.ones(1), image(2, 3, 4, 4)
    before = layer(x)
    layer.p = shares(4, len(WIDTHS), seed=1).T
    assert not torch.equal(layer(x), before) and len(made) == 1
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    sgd.step()
    close(layer(x), literal(layer, x))
    assert len(made) == 2
    layer.scales.mul_(0.5)
    close(layer(x), literal(layer, x))
    assert len(made) == 3


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_found_by_graph():
    found = blocks_of(network_of("digits_cnn"))
    down = {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0"}
    assert [len(block) for block in found] == [1, 2, 3, 2, 1] and set(found[2]) == down
    assert [len(block) for block in blocks_of(network_of("resnet20"))] == [1, *[2] * 9, 1]
    densenet = {tuple(name.rsplit(".", 2)[-2:]) for name in next(b for b in blocks_of(dense()) if len(b) == 2)}
    assert densenet == {("second", "1"), ("second", "3")}


def dense():
    first, second = nn.Sequential(conv(4, 4)), nn.Sequential(nn.ReLU(), conv(8, 4), nn.ReLU(), conv(4, 4))

    def run(m, x):
        a = torch.cat([x, m.first(x)], 1)
        return m.last(torch.cat([a, m.second(a)], 1).mean((2, 3)))

    return traced(run, (4, 8, 8), first=first, second=second, last=nn.Linear(12, 3))


# -- the super net ----------------------------------------------------------------------------------------------------


def hard(architecture: Architecture, policy) -> Parts:
    """The parts of 0 and 1 that are this policy."""
    network, bits = architecture.network, torch.tensor(architecture.options[0])
    widths, acts = torch.zeros(architecture.widths.shape), torch.zeros(architecture.acts.shape)
    for layer in network.layers:
        for row, b in zip(architecture.width_rows.get(layer.name, ()), policy.weight_bits[layer.name], strict=False):
            widths[row] = (bits == int(b)).float() if b else torch.eye(len(bits))[0]
        if layer.name in architecture.act_rows:
            chosen = architecture.options[1].index(policy.act_bits[layer.name])
            acts[architecture.act_rows[layer.name], chosen] = 1
    return Parts(widths, acts, torch.from_numpy(policy.alive(network)).float())


def case(name: str):
    network = small_network() if name == "small" else network_of(name)
    x = torch.randn(16, *network.example.shape[1:], generator=torch.Generator().manual_seed(3))
    return network, x, calibrate(network, [(x, None)])


@pytest.mark.parametrize("name", ["digits_cnn", "small"])
def test_parts_of_0_and_1_give_the_compressed_network_in_training_mode(name):
    network, x, ranges = case(name)
    choices = Choices((0, *WIDTHS), (4, 8, 32), blocks="max", first_last=None)
    architecture = Architecture(SearchSpace(network, choices), "kernel")
    net = SuperNet(architecture, ranges)
    for seed in range(2):
        policy = random_policy(network, seed, 0.4, WIDTHS, (4, 8, 32))
        student = compress(network, policy, ranges).train()
        close(net(x, hard(architecture, policy)), student(x), 2e-3)


@pytest.mark.parametrize("name", ["digits_cnn", "small"])
def test_candidates_of_32_bits_are_the_float_network(name):
    network, x, ranges = case(name)
    architecture = Architecture(SearchSpace(network, Choices((32,), (32,), first_last=None)))
    net, plain = SuperNet(architecture, ranges), copy.deepcopy(network.module).train().requires_grad_(True)
    assert len(architecture) == 0
    found, expected = net(x, architecture.probabilities()), plain(x)
    close(found, expected)
    layer = network.layers[1].name
    pairs = [(found, net.module), (expected, plain)]
    close(*(torch.autograd.grad(out.square().sum(), m.get_submodule(layer).weight)[0] for out, m in pairs))


@pytest.mark.parametrize("name", ["digits_cnn", "small"])
def test_expected_costs_of_a_policy_are_its_costs(name):
    network, _, _ = case(name)
    space = SearchSpace(network, Choices((0, *WIDTHS), (4, 8), blocks="max", first_last=None))
    architecture = Architecture(space, "kernel")
    for seed in range(3):
        policy = random_policy(network, seed, 0.4, WIDTHS, (4, 8))
        loads = architecture.loads(hard(architecture, policy))
        for found, expected in zip(loads, loads_of(network, policy), strict=True):
            kept = expected.kept > 0
            for field in ("inputs", "kept", "act_bits", "side"):
                assert torch.equal(getattr(found, field), getattr(expected, field))
            assert torch.equal(found.weight_bits[kept], expected.weight_bits[kept])
        assert torch.allclose(Size()(loads), Size()(loads_of(network, policy)))


def test_expected_bops_are_the_sum_over_all_pairs_with_a_gradient_through_both_widths():
    network, weights, acts = small_network(), (1, 4, 8), (2, 4, 32)
    architecture = Architecture(SearchSpace(network, Choices(weights, acts, first_last=None)))
    with torch.no_grad():
        architecture.widths.copy_(image(*architecture.widths.shape))
        architecture.acts.copy_(image(*architecture.acts.shape, seed=1))
    parts = architecture.probabilities()
    found = BOPs()(architecture.loads(parts)).sum()
    of_pairs = {
        (b, a): BOPs()(loads_of(network, architecture.space.homogeneous(b, act_bits=a))) for b in weights for a in acts
    }
    expected = sum(
        parts.widths[i, k] * parts.acts[i, j] * of_pairs[b, a][i]
        for i in range(len(network.layers))
        for k, b in enumerate(weights)
        for j, a in enumerate(acts)
    )
    close(found, expected, 1e-5)
    logits = [architecture.widths, architecture.acts]
    slopes = (torch.autograd.grad(total, logits, retain_graph=True) for total in (found, expected))
    for one, other in zip(*slopes, strict=True):
        assert (other != 0).all()
        close(one, other.to(one.dtype), 1e-4)


def test_logits_are_tilted_until_expected_costs_are_within_budget():
    problem = small_problem({"size": 0.16, "macs": 0.5, "bops": 0.01})
    architecture = Architecture(problem.space, "kernel")
    assert (architecture.excess(architecture.probabilities(), problem.budget) > 0).all()
    architecture.meet(problem.budget)
    excess = architecture.excess(architecture.probabilities(), problem.budget)
    assert (excess < 1e-4).all() and excess.max() > -1e-3  # the last one exactly


class Numpy:
    unit = "ms"

    def __call__(self, loads):
        return torch.tensor([float(load.macs_per_kernel.detach() * load.kept.detach().sum()) for load in loads])


class Steps(Numpy):
    def __call__(self, loads):
        return torch.stack([torch.ceil(load.kept.sum() / 8) * load.layer.macs for load in loads])


class Leaves(Numpy):
    def __call__(self, loads):
        return torch.from_numpy(np.array([load.kept.numpy().sum() for load in loads]))


class Own(MACs):
    def __call__(self, loads):
        return torch.sqrt(super().__call__(loads))


@pytest.mark.parametrize("cost", [Numpy(), Steps(), Leaves()])
def test_a_cost_model_without_gradient_is_refused_with_one_sentence(cost):
    with pytest.raises(AjpqError, match="'mine' carries none") as error:
        DNAS().search(small_problem({"mine": 0.9}, costs={"mine": cost}, train=noise()))
    assert "\n" not in str(error.value)
    problem = small_problem({"size": 0.5}, costs={"mine": cost}, train=noise())
    assert DNAS(2, epochs=1).search(problem).score.within  # it is only reported


def test_a_cost_model_of_a_user_is_searched_under():
    problem = small_problem({"mine": 0.85}, costs={"mine": Own()}, train=noise())
    check_differentiable("mine", Own(), loads_of(problem.network, problem.space.cheapest()))
    assert DNAS(3, epochs=2).search(problem).score.within


# -- children ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "block", "kernel"])
def test_children_are_within_budget_and_share_what_they_must(granularity):
    problem = small_problem({"size": 0.2, "macs": 0.6, "bops": 0.03})
    architecture = Architecture(problem.space, granularity)
    children, rng = Children(problem, architecture), np.random.default_rng(0)
    drawn = [children.draw(rng, noise) for noise in (0.0, 0.5, 1.0, 1.0)]
    assert len({policy.digest() for policy in drawn}) == 4
    layers = {"layer": [[x.name] for x in problem.network.layers], "block": blocks_of(problem.network)}
    for policy in drawn:
        policy.validate(problem.network)
        assert problem.budget.admits(policy)
        for names in layers.get(granularity, ()):
            bits = np.concatenate([policy.weight_bits[name] for name in names])
            there = [name for name in names if policy.weight_bits[name].any()]  # others are skipped
            assert len(set(bits[bits > 0].tolist())) == bool(there)
            assert len({policy.act_bits[name] for name in there}) == bool(there)


def test_the_most_probable_child_is_the_policy_that_all_logits_point_to():
    problem = small_problem({"size": 1.0})
    genome, random = Genome(problem.space), np.random.default_rng(0)
    for _ in range(3):
        policy = genome.policy(random.integers(genome.levels))
        limit = problem.budget.ratios(policy)["size"] * (1 + 1e-12)
        exact = small_problem({"size": limit}, choices=Choices(act_bits=(4, 8), first_last=None, blocks="max"))
        architecture = Architecture(exact.space, "kernel")
        parts = hard(architecture, policy)
        with torch.no_grad():
            architecture.widths.copy_(4000 * parts.widths)
            architecture.acts.copy_(4000 * parts.acts)
            for channel, row in enumerate(architecture.keep_rows):
                if row >= 0:
                    architecture.keeping[row] = (
                        torch.tensor([0.0, 4000.0]) if parts.kept[channel] else torch.tensor([4000.0, 0])
                    )
        child = Children(exact, architecture).draw(np.random.default_rng(1), 0.0)
        assert all(np.array_equal(child.weight_bits[n], bits) for n, bits in policy.weight_bits.items())


# -- the search -------------------------------------------------------------------------------------------------------


def noise(count: int = 5):
    """Labelled by the small network itself."""
    network = small_network()
    images = [image(16, 2, 8, 8, seed=20 + i) for i in range(count)]
    with torch.no_grad():
        return [(x, network.module(x).argmax(1)) for x in images]


def test_the_temperature_falls_exponentially():
    search = DNAS(epochs=10, temperature=5.0, eta=0.045)
    assert [search.temperature_at(e) for e in (0, 1, 9)] == pytest.approx([5, 5 * np.exp(-0.045), 5 * np.exp(-0.405)])
    assert DNAS(epochs=10).temperature_at(10) == pytest.approx(0.5)
    seen, problem = [], small_problem(train=noise())
    problem.on_scalar = lambda name, value, _: seen.append((name, value))
    DNAS(2, epochs=3, eta=0.5).search(problem)
    assert [v for n, v in seen if n == "dnas/temperature"] == pytest.approx([5, 5 * np.exp(-0.5), 5 / np.e])
    assert {n for n, _ in seen} >= {"dnas/weight_loss", "dnas/architecture_loss", "dnas/expected_size"}


def test_dnas_passes_the_conformance_suite():
    problem = small_problem(train=noise())
    check_backend(partial(DNAS, epochs=2, granularity="kernel"), problem, evaluations=4)
    before = torch.get_rng_state()
    DNAS(2, epochs=1, weights="dorefa", inputs="pact", granularity="block").search(problem)
    assert torch.equal(before, torch.get_rng_state())


def test_training_images_are_needed_and_bad_settings_refused():
    with pytest.raises(AjpqError, match="train="):
        DNAS().search(small_problem(train=None))
    for wrong in ({"loss": "sum"}, {"granularity": "net"}, {"epochs": 0}, {"lr": 0.0}):
        with pytest.raises(AjpqError):
            DNAS(**wrong)
    for wrong in ({"weights": "ternary"}, {"inputs": "none"}):
        with pytest.raises(AjpqError, match="of a super net"):
            DNAS(2, epochs=1, **wrong).search(small_problem(train=noise()))


def test_where_nothing_is_undecided_the_one_policy_is_scored():
    problem = small_problem({"size": 1.0}, choices=Choices((8,), first_last=None), train=noise())
    assert DNAS(5, epochs=2).search(problem).evaluations == 1


def test_a_search_that_continues_from_its_state_ends_as_if_it_had_never_stopped():
    def make() -> DNAS:
        return DNAS(6, 3, "kernel", epochs=3, every=1, warmup=1)

    data, kept = digits(batch_size=256), []
    network = trace(randomise(digits_cnn(width=4)), torch.randn(2, 1, 8, 8))

    def problem(**options) -> Problem:
        return Problem(network, batches_of(network), batches_of(network, seed=1), {"size": 0.3},
                       evaluator=each(lambda policy: -policy.mean_bits()), train=data.train, **options)  # fmt: skip

    whole = problem()
    whole.checkpoint = lambda backend: kept.append((copy.deepcopy(backend.state_dict()), whole.evaluations))
    result = make().search(whole)
    state, done = kept[1]
    again, backend = problem(), make()
    backend.load_state_dict(state)
    again.history += result.history[:done]
    again._memo.update({e.policy.digest(): e.score for e in result.history[:done]})
    digests = [e.policy.digest() for e in backend.search(again).history]
    assert 0 < done < len(digests) and digests == [e.policy.digest() for e in result.history]


def test_the_loss_of_the_paper_lowers_costs_where_nothing_else_speaks():
    problem = small_problem({"size": 0.9}, train=noise(10))
    search = DNAS(2, epochs=4, loss="product", beta=1.0, gamma=2.0, arch_lr=0.2, share=0.3)
    search.search(problem)
    before = Architecture(problem.space)
    uniform = before.excess(before.probabilities(), problem.budget).exp().item()
    assert search.run.expected()["size"] < 0.8 * uniform


@pytest.fixture(scope="module")
def on_digits():
    data = digits()
    torch.manual_seed(0)
    model = digits_cnn(width=8)
    fit(model, data.train, epochs=4, lr=0.1)
    with ExitStack() as stack:

        def make(budget: dict[str, float], choices: Choices | None = None) -> Problem:
            problem = Problem(model.eval(), data.calibration, data.search, budget, choices=choices,
                              reward=divergence_reward, train=data.train)  # fmt: skip
            stack.callback(problem.close)
            return problem

        yield make


@pytest.mark.parametrize("granularity", [pytest.param("layer", marks=pytest.mark.slow), "kernel"])
def test_it_beats_uniform_on_digits_at_equal_size_and_ends_within_budget(on_digits, granularity):
    problem = on_digits({"size": 0.082})
    uniform = Uniform().search(problem.again())
    search = DNAS(12, 0, granularity, epochs=6, every=3)
    result = search.search(problem.again())
    assert result.evaluations == 12 and all(evaluation.score.within for evaluation in result.history)
    assert search.run.expected()["size"] < 1.05  # before anything is made to fit
    assert result.score.reward > uniform.score.reward + 0.01


def test_it_chooses_widths_of_weights_and_inputs_within_bit_operations_and_beats_uniform(on_digits):
    problem = on_digits({"bops": 0.006}, Choices(act_bits=(2, 4, 8)))
    uniform = Uniform().search(problem.again())
    search = DNAS(uniform.evaluations, epochs=6, every=3, lr=1e-3, arch_lr=0.2, temperature=2.0)
    result = search.search(problem.again())
    assert result.evaluations == uniform.evaluations and all(e.score.within for e in result.history)
    assert search.run.expected()["bops"] < 1.2  # before anything is made to fit
    inner = [layer.name for layer in problem.network.layers[1:-1]]
    assert len({result.policy.act_bits[name] for name in inner}) > 1
    assert len({(result.policy.act_bits[n], int(result.policy.weight_bits[n].max())) for n in inner}) > 2
    assert result.score.reward > uniform.score.reward + 0.04
    assert result.score.accuracy >= uniform.score.accuracy
