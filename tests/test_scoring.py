"""Scoring: the fast path is the plain, masked, fake-quantized module; integers are exact; what is shared changes
nothing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import (
    NETWORKS,
    RandomNet,
    batches_of,
    conv,
    masked,
    network_of,
    random_policy,
    randomise,
    traced,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F

from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.errors import AjpqError
from ajpq.layers import Geometry
from ajpq.network import Network
from ajpq.policy import CompressionPolicy
from ajpq.scoring import local
from ajpq.scoring.engine import Engine
from ajpq.scoring.fusion import Unfit
from ajpq.scoring.kernels import Floats, Grid, Int8, Int8Conv, LayerWeights, integers_are_exact
from ajpq.scoring.local import Local
from ajpq.scoring.reference import Reference
from ajpq.scoring.setting import Setting
from ajpq.tracing import trace
from ajpq.training import recalibrate

NEEDS_INT8 = pytest.mark.skipif(not integers_are_exact(), reason="this processor does not convolve bytes exactly")


def setting_of(network: Network, norms: bool = True, batches: int = 2, size: int = 4) -> Setting:
    data = batches_of(network, 2, size)
    return Setting(network, calibrate(network, data), data if norms else [], batches_of(network, batches, size, seed=5))


def double(batches: list) -> list:
    return [(x.double(), y) for x, y in batches]


@torch.no_grad()
def outputs(module: nn.Module, batches: list) -> torch.Tensor:
    return torch.cat([module(x) for x, _ in batches])


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, in units of the largest logit where that is above 1."""
    return ((found - right).abs().max() / right.abs().max().clamp(min=1)).item()


def check_equal(network: Network, seed: int) -> None:
    """Float32 where nothing is rounded on the way; with rounded activations and fresh norms in float64, because one
    code that tips over at the last bit is a whole step."""
    widths = (1, 3, 4, 8, 32)
    setting, policy = setting_of(network), random_policy(network, seed, 0.4, widths)
    found = Local(replace(setting, norm_data=[]), workers=1, arithmetic="float32").logits(policy)
    assert error(found, outputs(masked(network, policy), setting.search_data)) <= 1e-5
    policy = random_policy(network, seed, 0.4, widths, act_bits=(2, 4, 8, 32))
    reference = masked(network, policy, setting.calibration, torch.float64)
    recalibrate(reference, double(setting.norm_data))
    found = Local(setting, workers=1, arithmetic="float64").logits(policy)
    assert error(found, outputs(reference, double(setting.search_data))) <= 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fast_path_equals_the_reference(name):
    check_equal(network_of(name), 0)


@pytest.mark.parametrize("start", range(0, 20, 10))
def test_the_fast_path_equals_the_reference_on_random_networks(start):
    for seed in range(start, start + 10):
        torch.manual_seed(seed)
        check_equal(trace(randomise(RandomNet(seed)), torch.randn(2, 3, 8, 8)), seed)


NORMS = {
    "of several GPUs": lambda: nn.SyncBatchNorm(8),
    "without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "of other channels": lambda: nn.Sequential(nn.PixelShuffle(2), nn.BatchNorm2d(2), nn.PixelUnshuffle(2)),
    "behind a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_batch_norms_that_cannot_be_folded_are_estimated_like_any_other(norm):
    parts = {"a": conv(3, 8), "n": NORMS[norm](), "b": conv(8, 8), "head": nn.Linear(8, 4)}
    network = traced(lambda m, x: m.head(m.b(m.n(m.a(x)).relu()).relu().mean((2, 3))), **parts)
    setting, policy = setting_of(network), random_policy(network, 0, 0.4, (1, 3, 4, 8, 32))
    student = compress(network, policy, setting.calibration)
    before = outputs(student, setting.search_data)
    recalibrate(student, setting.norm_data)
    after = outputs(student, setting.search_data)
    found = Local(setting, workers=1, arithmetic="float32").measure(policy)
    right = torch.cat([y for _, y in setting.search_data])
    assert found.loss == pytest.approx(F.cross_entropy(after, right).item(), rel=1e-4)
    assert norm == "without statistics" or not torch.equal(before, after)


@pytest.mark.parametrize("correction", ("statistics", "reconstruction"))
def test_a_loader_that_shuffles_gives_every_policy_the_same_images(correction):
    network = network_of("digits_cnn")
    images = batches_of(network, 4, 8, seed=5)

    class Shuffled(list):
        def __iter__(self):
            return (self[i] for i in torch.randperm(len(self)).tolist())

    def measured(search):
        setting = replace(setting_of(network), search_data=search, correction=correction)
        both = Local(setting, workers=1), Reference(setting)
        return [[one.measure(policy).divergence for policy in policies] for one in both]

    policies = [CompressionPolicy.homogeneous(network, width, 32) for width in (8, 2, 32)]
    torch.manual_seed(0)
    for ours, right in zip(measured(Shuffled(images)), measured(images), strict=True):
        assert ours == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("cache_bytes", (0, 2**28))
def test_what_is_kept_never_holds_statistics_of_another_candidate(cache_bytes):
    """A batch-norm that runs twice has statistics of both runs: the first depends on what comes later."""
    network = traced(
        lambda m, x: m.head(m.n(m.b(m.n(m.a(x)).relu())).relu().mean((2, 3))),
        a=conv(3, 8), n=nn.BatchNorm2d(8), b=conv(8, 8), head=nn.Linear(8, 4),
    )  # fmt: skip
    first, setting = CompressionPolicy.homogeneous(network, 8, 8), setting_of(network)
    policies = [
        CompressionPolicy({**first.weight_bits, "b": np.full(8, width, np.uint8)}, first.act_bits)
        for width in (8, 1, 4)
    ]
    kept = Local(setting, workers=1, arithmetic="float64", cache_bytes=cache_bytes)
    for policy in policies:
        fresh = Local(setting, workers=1, arithmetic="float64", cache_bytes=cache_bytes).measure(policy)
        assert kept.measure(policy).loss == pytest.approx(fresh.loss, rel=1e-9)


# -- integers ---------------------------------------------------------------------------------------------------------

GEOMETRIES = (
    (16, 16, 3, Geometry(True, (1, 1), (1, 1))),
    (3, 7, 5, Geometry(True, (2, 1), (2, 0))),
    (13, 1, 1, Geometry(True)),
    (8, 12, 3, Geometry(True, (1, 1), (2, 2), (2, 2), groups=4)),
    (10, 10, 3, Geometry(True, (2, 2), (1, 1), groups=10)),
    (5, 10, 3, Geometry(True, (1, 1), (1, 1), groups=5)),
)


@NEEDS_INT8
@pytest.mark.parametrize("c_in, c_out, kernel, geometry", GEOMETRIES)
@pytest.mark.parametrize("signed", (False, True))
def test_integer_convolutions_are_exact(c_in, c_out, kernel, geometry, signed):
    random = torch.Generator().manual_seed(c_in)
    codes = torch.randint(-127, 128, (c_out, c_in // geometry.groups, kernel, kernel), generator=random).to(torch.int8)
    weights = LayerWeights(codes, torch.rand(c_out, generator=random) + 0.1, torch.randn(c_out), None, None)
    x = torch.randn(3, c_in, 9, 8, generator=random)
    x = x if signed else x.abs()
    for bits in (8, 5, 2, 1):
        grid, out = Grid(bits, signed, 4 / 2**bits), Grid(4, True, 64.0)
        fast, slow = Int8Conv(weights, geometry, grid), Floats(torch.float64).layer(weights, geometry, grid)
        q, right = Int8().quantize(x, grid), Floats(torch.float64).quantize(x.double(), grid)
        assert torch.equal(q.double() - grid.zero, right) and right.min() >= grid.low and right.max() <= grid.high
        gain, shift = torch.randn(c_out, generator=random), torch.randn(c_out, generator=random)
        assert error(fast(q), slow(right)) <= 1e-6 and error(fast.plain(q), slow.plain(right)) <= 1e-6
        fast.affine(gain, shift), slow.affine(gain.double(), shift.double())
        assert error(fast(q), slow(right)) <= 1e-6 and error(fast(q, None, True), slow(right).relu()) <= 1e-6
        assert error(fast.plain(q), slow.plain(right)) <= 1e-6
        codes = fast(q, out).double() - out.zero
        exact = slow(right) / out.step
        assert (codes - exact.clamp(out.low, out.high)).abs().max() <= 0.5 + 1e-4


@NEEDS_INT8
@pytest.mark.parametrize(
    "name",
    (
        "digits_cnn",
        "resnet20",
        "mobilenet_v2",
        "shufflenet_v2_x0_5",
        pytest.param("densenet121", marks=pytest.mark.slow),
    ),
)
def test_every_integer_step_equals_the_float_step_on_the_same_input(name):
    network = network_of(name)
    setting = setting_of(network)
    policy = random_policy(network, 1, 0.3, widths=(1, 2, 3, 4, 8), act_bits=(3, 8))
    engines = [Engine(setting, arithmetic, 0) for arithmetic in (Int8(), Floats(torch.float64))]
    fast, slow = (engine.program(policy) for engine in engines)
    twins = {step.out: step for step in slow.steps}
    values, checked = {fast.input: engines[0].ready(setting.search_data[0][0])}, 0
    with torch.inference_mode():
        for step in fast.steps:
            read = [values[name] for name in step.reads]
            values[step.out] = found = step.run(*read)
            node, _, grid = step.out.partition("|")
            twin = twins.get(node if step.work else step.out)
            if twin is None or found.dtype not in (torch.float32, torch.uint8):
                continue
            zeros = [128 if "s" in name.partition("|")[2] else 0 for name in step.reads]
            exact = [v.double() - z if v.dtype == torch.uint8 else v.double() for v, z in zip(read, zeros, strict=True)]
            right = twin.run(*exact)
            if grid and step.work:
                right = twins[step.out].run(right)
            if grid:  # equal but for ties
                off = (found.double() - (128 if "s" in grid else 0) - right).abs()
                assert off.max() <= 1 and (off > 0).double().mean() < 1e-3, step.out
            else:
                assert error(found, right) <= 2e-6, step.out
            checked += 1
    assert checked >= len(network.layers)


# -- what candidates share --------------------------------------------------------------------------------------------


def mutations(network: Network, count: int, seed: int = 0) -> list[CompressionPolicy]:
    """A policy and copies of it that differ in the widths of one layer each."""
    random, first = np.random.default_rng(seed), random_policy(network, seed, 0.3, (2, 4, 8), (8,))
    found = [first]
    for _ in range(count):
        bits = {name: b.copy() for name, b in first.weight_bits.items()}
        layer = network.layers[random.integers(len(network.layers))]
        bits[layer.name][bits[layer.name] > 0] = random.choice((1, 3, 6))
        found.append(CompressionPolicy(bits, first.act_bits))
    return found


@pytest.mark.parametrize("name", ("digits_cnn", "resnet20", pytest.param("shufflenet_v2_x0_5", marks=pytest.mark.slow)))
def test_scores_do_not_depend_on_what_was_kept_or_on_workers(name):
    network = network_of(name)
    setting = setting_of(network, batches=3)
    policies = mutations(network, 8)
    alone = [Local(setting, workers=1, cache_bytes=0).logits(policy) for policy in policies]
    for capacity, workers in ((2**30, 1), (2**19, 3), (2**15, 2)):
        evaluator = Local(setting, workers=workers)
        evaluator.engine.shelf.limit(capacity)
        for _ in range(2):
            for policy, right in zip(policies, alone, strict=True):
                assert torch.equal(evaluator.logits(policy), right)
                assert evaluator.engine.shelf.held <= capacity
    evaluator = Local(setting, workers=1)
    together = dict(evaluator(policies))
    assert [together[i] for i in range(9)] == [evaluator.measure(policy) for policy in policies]


def test_scores_do_not_depend_on_the_threads_of_torch():
    network, before = network_of("digits_cnn"), torch.get_num_threads()
    setting, policies, found = setting_of(network, batches=3), mutations(network, 4), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            evaluator = Local(setting, workers=2)
            found.append([evaluator.logits(policy) for policy in policies])
            assert torch.get_num_threads() == threads
            assert set(evaluator._each(lambda _: torch.get_num_threads(), range(8))) == {1}
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_known_prefix_is_not_run_again():
    network = network_of("resnet20")
    evaluator = Local(setting_of(network), workers=1)
    first = random_policy(network, 0, 0.3, (2, 4), (8,))
    last = CompressionPolicy({**first.weight_bits, "linear": np.full(10, 8, np.uint8)}, first.act_bits)
    evaluator.measure(first)
    program, ran = evaluator.engine.program(last), []
    for step in program.steps:
        step.run = lambda *values, run=step.run, out=step.out: (ran.append(out), run(*values))[1]
        step.observe = None
    evaluator.engine.estimate_norms(program, map)
    with torch.inference_mode():
        evaluator.engine.logits(program, evaluator.batches[0][0], 0)
    assert 1 <= len(ran) <= 3 and ran[-1] == program.output


def test_the_network_is_left_as_it_was():
    network = network_of("resnet20")
    before, modes = copy.deepcopy(network.module.state_dict()), [m.training for m in network.module.modules()]
    setting = setting_of(network)
    Local(setting, workers=2).measure(random_policy(network, 0, 0.4, (2, 8), (8,)))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items())
    assert modes == [m.training for m in network.module.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def test_threads_of_torch_are_left_as_they_were():
    before = torch.get_num_threads()
    Local(setting_of(network_of("digits_cnn")), workers=3).measure(random_policy(network_of("digits_cnn"), 0))
    assert torch.get_num_threads() == before


# -- what cannot be run in steps, and bad settings --------------------------------------------------------------------


def test_a_network_that_writes_into_what_it_reads_again_is_measured_by_the_reference():
    def run(m, x):
        y = m.a(x)
        z = F.relu(y, inplace=True)
        return m.l((m.b(z) + y).mean((2, 3)))

    network = traced(run, a=conv(3, 6), b=conv(6, 6), l=nn.Linear(6, 10))
    setting, policy = setting_of(network, size=16), random_policy(network, 0, 0.2, (4, 8), (8,))
    evaluator = Local(setting, workers=1)
    with pytest.raises(Unfit):
        evaluator.engine.program(policy)
    assert evaluator.measure(policy).accuracy == Reference(setting).measure(policy).accuracy
    assert evaluator.measure(policy).images == 32


def test_norms_that_see_one_value_per_image():
    network = traced(
        lambda m, x: m.l(m.k(m.n(m.b(F.relu(m.a(x)))).mean((2, 3)))),
        a=conv(3, 6), b=conv(6, 6), n=nn.BatchNorm2d(6), k=nn.BatchNorm1d(6), l=nn.Linear(6, 5),
    )  # fmt: skip
    check_equal(network, 3)


def test_bad_settings_are_one_sentence(monkeypatch):
    setting = setting_of(network_of("digits_cnn"))
    with pytest.raises(AjpqError, match="workers >= 1"):
        Local(setting, workers=0)
    with pytest.raises(AjpqError, match="risk"):
        Local(setting, risk=1.0)
    with pytest.raises(AjpqError, match="must be one of auto, int8"):
        Local(setting, arithmetic="int4")
    with pytest.raises(AjpqError, match="at least one image"):
        Local(Setting(setting.network, setting.calibration, [], []))
    if not torch.cuda.is_available():
        with pytest.raises(AjpqError, match="'cuda' is not there"):
            Local(setting, device="cuda")
    monkeypatch.setattr(local, "integers_are_exact", lambda: False)
    assert type(Local(setting).engine.arithmetic) is Floats
    with pytest.raises(AjpqError, match="arithmetic=int8 must be exact"):
        Local(setting, arithmetic="int8")


def test_bfloat16_is_checked_against_the_exact_score(monkeypatch):
    setting = setting_of(network_of("digits_cnn"), size=32)
    policy = random_policy(setting.network, 0, 0.2, (8,), (8,))
    monkeypatch.setattr(local, "TOLERANCE", 1.0)
    rounded = Local(setting, arithmetic="bfloat16").logits(policy)
    exact = Local(setting).logits(policy)
    assert rounded.dtype == torch.float32 and 0 < error(rounded, exact) < 0.2
    monkeypatch.setattr(local, "TOLERANCE", -1.0)
    with pytest.raises(AjpqError, match="arithmetic=bfloat16 must keep accuracies within"):
        Local(setting, arithmetic="bfloat16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ("digits_cnn", "resnet20"))
def test_cuda_computes_the_same(name):
    setting = setting_of(network_of(name))
    policy = random_policy(setting.network, 0, 0.3)
    assert error(Local(setting, device="cuda").logits(policy).cpu(), Local(setting).logits(policy)) <= 1e-4
