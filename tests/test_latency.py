"""The latency table: what it predicts, what it refuses, and how it is built."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hydra.utils import instantiate
from nets import images_of, network_of, random_policy, traced
from test_timing import settings
from torch import nn

from ajpq import latency_points, profiling
from ajpq.architecture import check_differentiable
from ajpq.budget import Budget
from ajpq.cost import Load, loads_of, total
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.latency import LatencyTableCost
from ajpq.latency_points import Builder
from ajpq.latency_samples import channels_of, pruned_networks, unpruned
from ajpq.latency_table import EMPTY, WHOLE, LatencyTable, layer_grids, never_falling
from ajpq.network import Network
from ajpq.one_layer import PRECISIONS, Point, Shape, model_of
from ajpq.one_layer import images_of as inputs_of
from ajpq.padding import padded_alive
from ajpq.policy import CompressionPolicy
from ajpq.testing import check_cost_model
from ajpq.testing.problems import small_network
from ajpq.timing import Run, Times, runner

FRACTIONS = (0.25, 0.5, 1.0)


def rising(point: Point) -> float:
    """ms that rise with everything."""
    return 1e-3 * (5 + point.inputs * point.outputs + 3 * point.outputs) * (2 if point.precision == "float32" else 1)


def made(
    network: Network, path: Path, ms: Callable[[Point], float] = rising, whole: float = 1.0, empty: float = 0.0,
    fractions: tuple[float, ...] = FRACTIONS,
) -> LatencyTable:  # fmt: skip
    """A table whose times a formula gives. whole: time of a whole network over the sum of its layers'."""
    layers = layer_grids(network, fractions)
    times = {EMPTY: (empty,) * 3}
    for precision, key in WHOLE.items():
        points = [p for layer in layers for row in layer.points(precision) for calls in row for p in calls]
        times |= {str(point): (ms(point),) * 3 for point in points}
        full = sum(ms(p) for layer in layers for p in layer.points(precision)[-1][-1])
        times[key] = (whole * full + empty,) * 3
    table = LatencyTable(runner("onnxruntime").device, 1, tuple(network.example.shape[1:]), layers, times)
    table.write(path)
    return table


def load(network: Network, name: str, inputs: float, kept: float, bits: float = 8, act_bits: float = 8) -> Load:
    """A load of so many inputs and kernels; all tensors need gradients."""
    layer = network[name]
    alive = (torch.arange(layer.c_out) < kept).double()

    def leaf(value: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_(True)

    first = layer is network.layers[0]
    return Load(layer, leaf(inputs), leaf(alive), leaf(bits * alive), leaf(act_bits), leaf(0.0), first)


def three_layers(shape: tuple[int, ...] = (3, 8, 8)) -> Network:
    return traced(
        lambda m, x: m.last(torch.relu(m.b(torch.relu(m.a(x)))).mean((2, 3))), shape,
        a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 32, 3), last=nn.Linear(32, 10),
    )  # fmt: skip


def five_layers() -> Network:
    """Of all kinds, and with many widths."""
    return traced(
        lambda m, x: m.c(m.e(m.d(m.b(m.a(x)))).mean((2, 3))), (3, 12, 12),
        a=nn.Conv2d(3, 64, 3), b=nn.Conv2d(64, 128, 1), d=nn.Conv2d(128, 128, 3, groups=128),
        e=nn.Conv2d(128, 96, 1), c=nn.Linear(96, 10),
    )  # fmt: skip


@pytest.fixture
def net() -> Network:
    return three_layers()


# -- predictions ------------------------------------------------------------------------------------------------------


def test_exact_at_grid_points_and_bilinear_between(net: Network, tmp_path: Path) -> None:
    table = made(net, tmp_path / "t.json")
    cost, layer = LatencyTableCost(tmp_path / "t.json", multiple=1), table.layers[1]
    assert (list(layer.inputs), list(layer.outputs)) == ([8, 16], [16, 32])
    for p, bits in enumerate((32, 8)):
        for i in layer.inputs:
            for o in layer.outputs:
                told = rising(Point(layer.calls[0], i, o, PRECISIONS[p]))
                assert cost([load(net, "b", i, o, bits, bits)]).item() == pytest.approx(told, rel=1e-12)
        between = rising(Point(layer.calls[0], 11, 27, PRECISIONS[p]))  # the formula is bilinear itself
        assert cost([load(net, "b", 11, 27, bits, bits)]).item() == pytest.approx(between, rel=1e-12)
    assert cost([load(net, "b", 8, 16)]).item() == cost([load(net, "b", 2, 3)]).item(), "constant below the grid"


@pytest.mark.parametrize(
    ("inputs", "kept", "looked_up"),
    [(8, 16, (16, 16)), (9, 17, (16, 32)), (7, 7, (16, 16)), (8.3, 16.4, (16, 32)), (16, 16 + 1e-9, (16, 16))],
)
def test_padded_network_is_predicted(inputs: float, kept: float, looked_up, net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    asked = load(net, "b", inputs, kept)
    asked = replace(asked, kept=torch.full((32,), kept / 32, dtype=torch.float64))  # expected numbers have fractions
    told = LatencyTableCost(tmp_path / "t.json")([asked]).item()
    calls = LatencyTable.read(tmp_path / "t.json").layers[1].calls
    assert told == pytest.approx(rising(Point(calls[0], *looked_up, "int8")), rel=1e-9)


def test_layers_with_several_copies_of_a_channel_are_padded_by_channels(tmp_path: Path) -> None:
    network = traced(
        lambda m, x: m.e(m.d(m.a(x)).flatten(1)), a=nn.Conv2d(3, 48, 1), d=nn.Conv2d(48, 96, 7, groups=48),
        e=nn.Linear(96 * 4, 9),
    )  # fmt: skip
    table, policy = made(network, tmp_path / "t.json"), random_policy(network, 0, 0.5, (8,), (8,))
    cost, wide = LatencyTableCost(tmp_path / "t.json"), padded_alive(network, policy, 16)
    kept = [int(alive[network.layers[0].writes].sum()) for alive in (policy.alive(network), wide)]
    assert kept[0] % 16 and kept[1] == 32
    points = [
        Point(layer.calls[0], i, o, "int8") for layer, i, o in zip(table.layers, (3, 1, 256), (32, 64, 9), strict=True)
    ]
    assert cost(loads_of(network, policy)).tolist() == pytest.approx([rising(point) for point in points])


def test_multiple_below_1_is_refused(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    with pytest.raises(AjpqError, match="write onnx_multiple=16"):
        LatencyTableCost(tmp_path / "t.json", multiple=0)


@pytest.mark.parametrize("whole", [0.8, 1.0, 1.5])
def test_whole_networks_are_predicted_as_measured(whole: float, net: Network, tmp_path: Path) -> None:
    table = made(net, tmp_path / "t.json", whole=whole, empty=0.25)
    cost = LatencyTableCost(tmp_path / "t.json")
    for bits, precision in ((32, "float32"), (8, "int8")):
        policy = CompressionPolicy.homogeneous(net, bits, bits)
        assert total(cost, net, policy) == pytest.approx(table.times[WHOLE[precision]][0], rel=1e-9)


def test_layer_is_int8_only_if_all_of_it_is(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    cost = LatencyTableCost(tmp_path / "t.json")
    int8, real = (cost([load(net, "b", 16, 32, bits, bits)]).item() for bits in (8, 32))
    assert real == pytest.approx(2 * int8)
    mixed = load(net, "b", 16, 32)
    with torch.no_grad():
        mixed.weight_bits[3] = 32
    assert cost([mixed]).item() == pytest.approx(real)
    assert cost([load(net, "b", 16, 32, 1, 32)]).item() == pytest.approx(real)
    assert cost([load(net, "b", 16, 32, 2, 4)]).item() == pytest.approx(int8)
    assert int8 < cost([load(net, "b", 16, 32, 20, 8)]).item() < real, "expected widths lie between"


def test_gradients_are_slopes(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    cost = LatencyTableCost(tmp_path / "t.json")
    one = load(net, "b", 12, 20)
    cost([one]).sum().backward()
    assert one.inputs.grad.item() == pytest.approx(1e-3 * 20)
    assert one.kept.grad.tolist() == pytest.approx([1e-3 * (12 + 3)] * 32)
    wide = load(net, "b", 12, 32, bits=20)
    cost([wide]).sum().backward()
    assert wide.weight_bits.grad.sum().item() == pytest.approx(1e-3 * (5 + (16 + 3) * 32) / 24)  # of 16 inputs
    check_differentiable("latency", cost, loads_of(net, CompressionPolicy.homogeneous(net)))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cost_keeps_the_rules_of_costs_whatever_was_measured(seed: int | None, tmp_path: Path) -> None:
    network, random = small_network(), np.random.default_rng(seed)
    noise: dict[str, float] = {}
    made(network, tmp_path / "t.json", rising if seed is None else
         lambda point: noise.setdefault(str(point), float(random.uniform(0.01, 1))), whole=1.2, empty=0.1)  # fmt: skip
    check_cost_model(LatencyTableCost(tmp_path / "t.json"), network)


def test_never_falling() -> None:
    for seed in range(20):
        grid = np.random.default_rng(seed).uniform(0.1, 1, (2, 3, 4))
        found = never_falling(grid)
        assert (
            (np.diff(found, axis=1) >= 0).all() and (np.diff(found, axis=2) >= 0).all() and (found[0] >= found[1]).all()
        )
        np.testing.assert_allclose(never_falling(found), found, rtol=1e-12)
        assert found.min() >= grid.min() - 1e-12 and found.max() <= grid.max() + 1e-12
    steps = np.array([[[2.0, 1.0]], [[0.5, 0.5]]])
    np.testing.assert_allclose(never_falling(steps), [[[2**0.5, 2**0.5]], [[0.5, 0.5]]])


def test_grids_keep_to_multiples_and_groups() -> None:
    network = traced(
        lambda m, x: m.e(m.d(m.g(m.a(x)))),
        a=nn.Conv2d(3, 24, 1), g=nn.Conv2d(24, 48, 1, groups=3), d=nn.Conv2d(48, 96, 3, groups=48),
        e=nn.Conv2d(96, 9, 1),
    )  # fmt: skip
    grids = {grid.name: (list(grid.inputs), list(grid.outputs)) for grid in layer_grids(network, [0.3, 0.5, 1])}
    assert grids["a"] == ([3], [8, 16, 24])
    assert grids["g"] == ([8], [24, 48])
    assert grids["d"] == ([1], [32, 64, 96]), "blocks of channels, of which each has two kernels"
    assert grids["e"] == ([32, 48, 96], [9]), "what cannot be pruned is measured whole"


def fitted_table(network: Network, path: Path, n: int, of: Callable[[Point], float]) -> list[float]:
    """Relative errors for 20 policies, of a table whose layers take `rising` alone and `of` within a network, of which
    n pruned ones and the whole ones were measured."""
    table = made(network, path)
    grids = {layer.name: layer for layer in table.layers}

    def taken(channels: Mapping[str, tuple[int, int]], precision: str) -> float:
        points = (Point(grids[name].calls[0], i, o, precision) for name, (i, o) in channels.items())
        return sum(of(point) for point in points)

    samples = {key: channels_of(network, policy) for key, policy in pruned_networks(network, n + 20).items()}
    pruned = dict(list(samples.items())[:n])
    original = channels_of(network, unpruned(network))
    times = {**table.times, **{key: (taken(channels, "int8"),) * 3 for key, channels in pruned.items()}}
    times |= {key: (taken(original, precision),) * 3 for precision, key in WHOLE.items()}
    replace(table, times=times, pruned=pruned).write(path)
    cost, errors = LatencyTableCost(path), []
    for key, error in cost.table.errors.items():
        policy = pruned_networks(network, n)[key]
        assert error == pytest.approx(total(cost, network, policy) / taken(samples[key], "int8") - 1)
    for key, policy in list(pruned_networks(network, n + 20).items())[n:]:
        errors.append(abs(total(cost, network, policy) / taken(samples[key], "int8") - 1))
    assert total(cost, network, unpruned(network)) == pytest.approx(taken(original, "int8"))
    return errors


def test_pruned_networks_tell_what_layers_take_within_them(tmp_path: Path) -> None:
    network = five_layers()

    def within(point: Point) -> float:
        """What is read and written takes time, weights come from afar, and 1x1 convolutions are faster than alone."""
        pixels = np.prod(point.shape.out_hw) if point.shape.kind != "linear" else 1
        factor = 0.5 if point.shape.kernel == (1, 1) and point.shape.kind == "conv" else 1.0
        more = 2e-3 * pixels * point.outputs + 3e-4 * point.inputs * point.outputs
        return rising(point) * factor + more * (4 if point.precision == "float32" else 1)

    without = fitted_table(network, tmp_path / "t.json", 0, within)
    found = fitted_table(network, tmp_path / "u.json", 12, within)
    assert np.median(found) < 0.02 and np.median(without) > 3 * np.median(found), (found, without)


def test_networks_as_fast_as_an_empty_run_do_not_spoil_the_others(net: Network, tmp_path: Path) -> None:
    table = made(net, tmp_path / "t.json", empty=5.0)
    shapes = {key: channels_of(net, policy) for key, policy in pruned_networks(net, 1).items()}
    replace(table, times=table.times | dict.fromkeys(shapes, (5.0,) * 3), pruned=shapes).write(tmp_path / "t.json")
    cost, low = LatencyTableCost(tmp_path / "t.json"), next(iter(pruned_networks(net, 1).values()))
    whole = total(cost, net, unpruned(net))
    assert whole == pytest.approx(table.times[WHOLE["int8"]][0])
    assert 5.0 < total(cost, net, low) < 5.0 + 0.8 * (whole - 5.0)


def test_pruned_networks_differ_and_starve_nothing() -> None:
    sliced = traced(
        lambda m, x: (m.d((y := m.t(x))[:, :2]), m.e(y[:, 2:])), t=nn.Conv2d(3, 64, 1), d=nn.Conv2d(2, 32, 1),
        e=nn.Conv2d(62, 32, 1),
    )  # fmt: skip
    alone = traced(lambda m, x: m.a(x), a=nn.Conv2d(3, 64, 1))  # nothing can be pruned
    found = []
    for network in (sliced, five_layers(), three_layers(), alone):
        policies = pruned_networks(network, 12)
        shapes = [channels_of(network, policy) for policy in (unpruned(network), *policies.values())]
        assert all(shapes.count(shape) == 1 for shape in shapes)
        for policy in policies.values():
            policy.validate(network)
        found.append(len(policies))
    assert found[0] > 1 and found[1:] == [12, 1, 0], "as many as wanted, or all there are"


def test_layers_that_add_up_are_left_as_they_are(tmp_path: Path) -> None:
    assert max(fitted_table(five_layers(), tmp_path / "t.json", 12, rising)) < 1e-6


# -- refused ----------------------------------------------------------------------------------------------------------


def test_table_of_another_network_is_refused(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    cost = LatencyTableCost(tmp_path / "t.json")
    other = network_of("digits_cnn")
    with pytest.raises(AjpqError, match="is not in it"):
        total(cost, other, CompressionPolicy.homogeneous(other))
    larger = three_layers((3, 12, 12))
    with pytest.raises(AjpqError, match=r"'a' has out_hw \[10, 10\] now and \[6, 6\] there"):
        total(cost, larger, CompressionPolicy.homogeneous(larger))


@pytest.mark.parametrize(("key", "value"), [("processor", "Z80"), ("version", "0.1"), ("runtime", "openvino_x")])
def test_table_of_another_device_is_refused(key: str, value: str, net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    plain = json.loads((tmp_path / "t.json").read_text())
    plain["device"][key] = value
    (tmp_path / "t.json").write_text(json.dumps(plain))
    with pytest.raises(AjpqError):
        LatencyTableCost(tmp_path / "t.json")
    named = LatencyTableCost(tmp_path / "t.json", device=plain["device"]["processor"])
    assert total(named, net, CompressionPolicy.homogeneous(net)) > 0
    with pytest.raises(AjpqError, match="device that is named"):
        LatencyTableCost(tmp_path / "t.json", device="6502")


@pytest.mark.parametrize("text", ["", "{}", '{"version": 0}', '{"version": 1, "device": {}}', "[1]"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(AjpqError, match="must be a readable file"):
        LatencyTableCost(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(AjpqError, match="a latency table must be"):
        LatencyTableCost(tmp_path / "t.json")


# -- building ---------------------------------------------------------------------------------------------------------


def builder(
    network: Network, path: Path, fractions: tuple[float, ...] = (1.0,), batch: int = 1, pruned: int = 0
) -> Builder:
    return Builder(network, runner("onnxruntime"), path, batch, fractions, 0.001, pruned)


def test_killed_build_measures_nothing_twice(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    first = builder(net, path)
    todo = first.pending
    assert len(todo) == 2 * (2 * 3 + 1) and todo.count(EMPTY) == 2 and len(set(todo[:7])) == len(set(todo[7:])) == 7
    for key in todo[:3]:
        first.measure(key)
    known = dict(first.times)
    with first.log.open("a") as file:
        file.write('["a line that the kill')
    again = builder(net, path)
    assert again.times == known and again.pending == todo[3:]
    while pending := again.pending:
        for key in pending:
            again.measure(key)
    keys = Counter(json.loads(line)[0] for line in again.log.read_text().splitlines()[1:])
    assert len(keys) == 6 + 3 and set(keys.values()) <= {2, 3}
    table = again.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    assert all(low <= ms <= high for ms, low, high in table.times.values())
    assert all(ms > 0 for ms, *_ in table.times.values())
    cost, original = LatencyTableCost(path), CompressionPolicy.homogeneous(net)
    assert total(cost, net, original) >= total(cost, net, CompressionPolicy.homogeneous(net, 8, 8)) > 0


def test_what_is_measured_is_a_multiple_of_the_float32_network(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    first = builder(net, path, pruned=1)
    point = next(iter(first.points))
    head = json.dumps(first._table({}).head)
    rows = [[point, 0.1, 0.1, 0.2], [WHOLE["float32"], 20, 15, 25], [WHOLE["int8"], 0.25, 0.2, 0.3]]
    rows += [[EMPTY, 0.01, 0, 0.02], ["pruned 0", 0.125, 0.125, 0.125], [WHOLE["float32"], 8, 8, 8]]
    first.log.write_text("".join(json.dumps(row) + "\n" for row in [json.loads(head), *rows]))
    assert builder(net, path, pruned=1).times == {
        point: (0.2, 0.2, 0.4), WHOLE["float32"]: (8, 8, 8), WHOLE["int8"]: (2.0, 1.6, pytest.approx(2.4)),
        EMPTY: (0.08, 0, 0.16), "pruned 0": (1.0, 1.0, 1.0),
    }  # fmt: skip


def test_what_is_timed_is_divided_by_what_it_took_turns_with(net: Network, tmp_path: Path, monkeypatch) -> None:
    """A machine that is three times as slow in every other round, and images by twos."""
    taken = {WHOLE["float32"]: 24.0, WHOLE["int8"]: 8.0, EMPTY: 0.4, "pruned 0": 6.0, "one": 2.0, "all": 2.5}

    def slow_now_and_then(runs: Mapping[str, Run], **_: object) -> dict[str, Times]:
        for run in runs.values():
            run()
        return {key: Times(taken[key] * np.array([1.0, 3.0, 1.0, 3.0, 1.0])) for key in runs}

    monkeypatch.setattr(latency_points, "interleaved", slow_now_and_then)
    monkeypatch.setattr(latency_points, "warm", lambda run: latency_points.LONG)
    first = builder(net, tmp_path / "t.json", batch=2, pruned=1)
    assert first.pending[0] == EMPTY
    for key in first.pending[: len(set(first.pending))]:
        assert set(first.times) <= {*first.points, *WHOLE.values(), EMPTY, "pruned 0"}
        first.measure(key)
    ms = {key: median for key, (median, *_) in first.times.items()}
    assert ms.pop(WHOLE["float32"]) == 12 and ms.pop(WHOLE["int8"]) == pytest.approx(4)
    assert ms.pop(EMPTY) == pytest.approx(0.2) and ms.pop("pruned 0") == pytest.approx(3)
    assert ms == dict.fromkeys(first.points, pytest.approx(0.25))
    text = first.log.read_text()
    first.log.write_text(text[: text.index(f'["{WHOLE["int8"]}"')])  # killed between two rows of the whole networks
    again = builder(net, tmp_path / "t.json", batch=2, pruned=1)
    assert again.times == {} and again.pending[0] == EMPTY


def test_a_moment_of_a_busy_machine_does_not_enter_the_table(net: Network, tmp_path: Path, monkeypatch) -> None:
    path, moments = tmp_path / "t.json", iter([1.0, 30.0, 1.1, 0.9, 1.05, 1.2])  # of one point, in this order
    first = builder(net, path)
    point = next(key for key in first.pending if key != EMPTY)

    def told(self: Builder, what: Point) -> tuple[float, float, float]:
        ms = next(moments) if str(what) == point else 2.0
        return ms, ms / 2, ms * 2

    monkeypatch.setattr(Builder, "_point", told)
    monkeypatch.setattr(Builder, "_whole", lambda self: dict.fromkeys((*WHOLE.values(), EMPTY), (1.0, 1.0, 1.0)))
    for key in first.pending:
        if key != EMPTY:
            first.measure(key)
    for _ in range(2):
        first.measure(EMPTY)
    assert first.times[point] == (1.0, 0.5, 2.0)  # the smaller of 1 and 30
    again = builder(net, path)
    assert point in again.pending and set(again.pending) <= {point, EMPTY}
    again.measure(point)
    assert point not in again.pending and again.times[point] == (1.1, 0.55, 2.2)  # the middle one


def test_what_was_measured_once_for_other_fractions_does_not_enter_the_table(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    wide = builder(net, path, FRACTIONS)
    narrow = {*builder(net, path).points, EMPTY}
    key = next(key for key in wide.pending if key not in narrow)
    wide.measure(key)
    again = builder(net, path)
    while pending := again.pending:
        for other in pending:
            again.measure(other)
    assert key not in again.finish().times
    assert builder(net, path, FRACTIONS).pending.count(key) == 2


def test_finished_table_is_completed(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    assert builder(net, tmp_path / "t.json", FRACTIONS).pending == []
    made(net, tmp_path / "u.json", fractions=(1.0,))
    more = builder(net, tmp_path / "u.json", FRACTIONS).pending
    assert len(more) == 2 * 2 * (1 + 3 + 1)


def test_table_keeps_its_pruned_networks_when_it_is_completed(tmp_path: Path) -> None:
    net = five_layers()
    table = made(net, tmp_path / "t.json", fractions=(1.0,))
    shapes = {key: channels_of(net, policy) for key, policy in pruned_networks(net, 2).items()}
    replace(table, times=table.times | dict.fromkeys(shapes, (1.0,) * 3), pruned=shapes).write(tmp_path / "t.json")
    assert builder(net, tmp_path / "t.json").finish().pruned == shapes
    more = builder(net, tmp_path / "t.json", pruned=3)
    assert set(more.pending) == {"pruned 2"}


def test_table_of_something_else_is_not_replaced(net: Network, tmp_path: Path) -> None:
    made(net, tmp_path / "t.json")
    with pytest.raises(AjpqError, match="of another network;"):
        builder(traced(lambda m, x: m.a(x), a=nn.Conv2d(3, 16, 3)), tmp_path / "t.json")
    with pytest.raises(AjpqError, match="of another image"):
        builder(network_of("digits_cnn"), tmp_path / "t.json")
    with pytest.raises(AjpqError, match="of another batch, 1 and not 4"):
        builder(net, tmp_path / "t.json", batch=4)
    started = builder(net, tmp_path / "u.json")
    started.measure(next(key for key in started.pending if "linear 1x1" in key))
    with pytest.raises(AjpqError, match=r"u.json.points is of another batch"):
        builder(net, tmp_path / "u.json", batch=4)


def test_command_builds_and_search_is_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tables" / "digits.json"
    cfg = settings(f"table={path}", "image=[1,8,8]", "seconds=0.001", "fractions=[1]", "pruned=1")
    profiling.run(cfg, tmp_path)
    said = capsys.readouterr().out
    assert "18 points to measure, 36 measurements, about" in said and "written to" in said and "table 36/36" in said
    assert "networks pruned at random in int8 (1) are predicted within" in said
    profiling.run(cfg, tmp_path)
    assert "to measure" not in capsys.readouterr().out
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        costs = instantiate(hydra.compose("config", ["costs=latency_table", f"costs.latency.path={path}"]).costs)
    network = network_of("digits_cnn")
    assert {"size", "macs", "latency"} <= set(costs)
    low = random_policy(network, 0, widths=(4,), act_bits=(8,))
    budget = Budget(network, costs, {"latency": 1.0}, low)
    assert 0 < budget.ratios(low)["latency"] <= 1 and budget.costs["latency"].unit == "ms"
    assert images_of("digits_cnn").shape[1:] == LatencyTable.read(path).image


@pytest.mark.parametrize(("channels", "floats"), [(3, 2), (8, 0)])
def test_narrow_depthwise_layers_are_measured_in_float(channels: int, floats: int, tmp_path: Path) -> None:
    shape = Shape("depthwise", (8, 8), (3, 3), pads=(1, 1, 1, 1), relu="relu")
    point, written = Point(shape, 1, channels, "int8"), tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(written)
    session = onnxruntime.InferenceSession(model_of(point, 2), options, providers=["CPUExecutionProvider"])
    assert len(session.run(None, {"images": inputs_of(point, 1)})) == 2
    kernels = Counter(node.op_type for node in onnx.load(written).graph.node)
    assert (kernels["Conv"], kernels["QLinearConv"]) == (floats, 3 - floats)  # the stem is always int8
