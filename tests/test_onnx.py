"""The int8 ONNX file: integer kernels on ONNX Runtime, and the outputs of the project's own network."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import conv, images_of, network_of, random_policy, traced
from onnx import numpy_helper
from rich.console import Console
from test_ship import finished
from torch import Tensor, fx, nn

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.data import digits
from ajpq.detection import Detection
from ajpq.errors import AjpqError
from ajpq.finetuning import finetune
from ajpq.layers import FrozenLayer
from ajpq.models import digits_cnn
from ajpq.network import Network
from ajpq.onnx_check import DEVIATION, STEP, seen, unit_of
from ajpq.onnx_export import float_onnx, to_onnx
from ajpq.onnx_graph import integer_graph
from ajpq.padding import pad
from ajpq.report import show
from ajpq.shipping import load, ship
from ajpq.tasks import CLASSIFICATION
from ajpq.tracing import trace
from ajpq.training import fit

NARROW = (1, 2, 3, 4, 5, 6, 7)  # kernels that saturate on no processor
BIG = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121")
slow = pytest.mark.slow


def run(model: bytes, images: Tensor, folder: Path) -> tuple[np.ndarray, Counter[str]]:
    """What ONNX Runtime gives, one thread, and the kernels that it chose."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return session.run(None, {"images": images.numpy()})[0], kernels


def frozen(network: Network, images: Tensor, seed: int = 0, sparsity: float = 0.5, **choices) -> fx.GraphModule:
    policy = random_policy(network, seed, sparsity, **choices)
    return freeze(compress(network, policy, calibrate(network, [(images, None)])))


def layers_of(network: fx.GraphModule) -> list[FrozenLayer]:
    parts = [network.get_submodule(node.target) for node in network.graph.nodes if node.op == "call_module"]
    return [part for part in parts if isinstance(part, FrozenLayer)]


def one_step(network: fx.GraphModule) -> np.ndarray:
    """How far every output moves, at most, where every input of the last layer moves by one step."""
    last = layers_of(network)[-1]
    return (last.weight.flatten(1).abs().sum(1) * last.act.scale).numpy()


@pytest.mark.parametrize(
    "name",
    [
        "digits_cnn",
        "resnet20",
        *(pytest.param(name, marks=slow) for name in BIG),
    ],
)
def test_runtime_agrees_and_computes_in_integers(name: str, tmp_path: Path) -> None:
    images = images_of(name, 8, seed=3)
    network = frozen(network_of(name), images, widths=NARROW, act_bits=(8,))
    model = to_onnx(network, images)
    with torch.no_grad():
        packed, told = network(images).numpy(), integer_graph(network, images)(images).numpy()
    found, kernels = run(model, images, tmp_path)
    assert (found.argmax(1) == told.argmax(1)).all() and (found.argmax(1) == packed.argmax(1)).all()
    assert (np.abs(found - told) <= one_step(network)).all() and (np.abs(found - packed) <= one_step(network)).all()
    gates = sum(layer.geometry.conv for layer in layers_of(network)) - kernels["QLinearConv"]
    assert gates == (9 if name == "mobilenet_v3_small" else 0)  # the second layer of a squeeze-and-excitation gate
    one, _ = run(model, images[:1], tmp_path)
    assert one.shape == (1, 10) and (np.abs(one - packed[:1]) <= one_step(network)).all()


def test_a_deep_chain_is_the_runtimes_to_the_last_bit_of_a_float(tmp_path: Path) -> None:
    """20 layers multiply every code that falls on the other side; with two products instead of one some do, and a
    hundredth of the outputs of this network are others. (Of six such networks five are equal; in one a code of fifteen
    million is a tie that the runtime breaks otherwise.)"""
    torch.manual_seed(2)
    parts = {f"l{i}": nn.Conv2d(24 if i else 3, 24, 3 if i % 2 == 0 else 1, padding=i % 2 ^ 1) for i in range(20)}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        for name in list(parts)[:-1]:
            x = nn.functional.relu6(getattr(m, name)(x))
        return getattr(m, list(parts)[-1])(x)

    for part in parts.values():
        nn.init.kaiming_normal_(part.weight)
    network, images = traced(forward, (3, 64, 64), **parts), torch.randn(8, 3, 64, 64)
    final = frozen(network, images, sparsity=0.3, widths=NARROW[3:], act_bits=(8,))
    found, _ = run(to_onnx(final, images), images, tmp_path)
    ship(final, tmp_path / "run")
    policy = random_policy(network, 0, 0.3, NARROW[3:], (8,))
    for ours in (final, load(tmp_path / "run"), pad(final, network, policy)):
        assert sum(bool(layer.reader) for layer in layers_of(ours)) == 19
        with torch.no_grad():
            np.testing.assert_allclose(ours(images).numpy(), found, rtol=0, atol=1e-5 * np.abs(found).max())
    for layer in layers_of(final):
        layer.reader = ()
    with torch.no_grad():
        off = np.abs(final(images).numpy() - found).max() / np.abs(found).max()
    assert off > 1e-3, "so small a network might not show it"


@pytest.fixture(scope="module")
def trained() -> tuple[Network, object]:
    torch.manual_seed(0)
    data, model = digits(), digits_cnn()
    fit(model, data.train, epochs=4, lr=0.1)
    return trace(model.eval(), next(iter(data.calibration))[0][:2]), data


@pytest.mark.parametrize(("widths", "act_bits"), [((2, 4, 7), (8,)), pytest.param((4,), (3, 4), marks=slow)])
def test_trained_network_on_its_test_split(widths, act_bits, trained, tmp_path: Path) -> None:
    network, data = trained
    policy = random_policy(network, 0, 0.2, widths, act_bits)
    final = finetune(compress(network, policy, calibrate(network, data.calibration)), data.train, epochs=2, lr=0.02)
    seen, test = (torch.cat([x for x, _ in split]) for split in (data.calibration, data.test))
    with torch.no_grad():
        packed, told = final(test).numpy(), integer_graph(final, seen)(test).numpy()
    found, _ = run(to_onnx(final, seen), test, tmp_path)
    for ours in (packed, told):  # float sums in another order may turn a code, and then a close decision
        assert (found.argmax(1) == ours.argmax(1)).mean() >= 0.997
        assert np.median(np.abs(found - ours)) < 1e-4 and (np.abs(found - ours) <= one_step(final)).mean() >= 0.99


@pytest.mark.parametrize("bits", [*range(1, 9)])
def test_container_holds_the_very_weights(bits: int) -> None:
    layer = finished(nn.Conv2d(16, 40, 3), (bits,), np.random.default_rng(bits))
    codes, scale = layer.container
    assert torch.equal(codes * scale.reshape(-1, 1, 1, 1), layer.weight) and (scale > 0).all()
    assert 32 <= codes.int().abs().max() < (64 if bits < 8 else 128)


@pytest.mark.parametrize("signed", [False, True])
def test_activations_of_every_width_lie_on_the_grid(signed: bool, tmp_path: Path) -> None:
    network = traced(lambda m, x: m.a(x if signed else x.abs()), a=conv(3, 5, 1))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2  # beyond both ends of the grid
    for bits in (1, 4, 8):
        final = frozen(network, images / 4, sparsity=0, widths=NARROW, act_bits=(bits,))
        found, _ = run(to_onnx(final, images), images, tmp_path)
        with torch.no_grad():
            difference = np.abs(found - final(images).numpy())
        unit = final.a.unit.max().item()
        assert (
            final.a.act.signed == signed
            and np.quantile(difference, 0.99) <= unit
            and (difference.max() <= one_step(final).max())
        )


def test_nothing_is_rounded_where_one_quantizer_reads(tmp_path: Path) -> None:
    parts = {"a": conv(3, 6), "b": conv(3, 4), "c": conv(10, 4), "relu6": nn.ReLU6(), "d": conv(4, 5)}
    network = traced(
        lambda m, x: m.d(m.relu6(m.c(nn.functional.max_pool2d(torch.cat([m.a(x).relu(), m.b(x)], 1), 2)))), **parts
    )
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 4
    final = frozen(network, images, sparsity=0, widths=NARROW, act_bits=(8,))
    d = final.d
    d.act.scale.fill_(0.03)  # a grid that ends above 6
    final.d = FrozenLayer(d.codes, d.bits, d.scale, d.raw, d.bias, d.geometry, d.act)
    graph = integer_graph(final, images)
    with torch.no_grad():
        difference = (graph(images) - final(images)).abs().numpy().reshape(4, 5, -1)
    assert np.median(difference) < 1e-3 and (difference <= one_step(final)[:, None]).all()
    found, kernels = run(to_onnx(final, images), images, tmp_path)
    assert kernels["QLinearConv"] == 3 and not {"Relu", "FusedConv"} & set(kernels)
    assert (np.abs(found - graph(images).numpy()).reshape(4, 5, -1) <= one_step(final)[:, None]).all()


def test_a_relu_in_place_of_a_part_is_kept() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :8].relu_()
        return m.b(y)

    network = traced(forward, a=conv(3, 16), b=conv(16, 4))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    final = frozen(network, images, sparsity=0, widths=(8,), act_bits=(8,))
    with torch.no_grad():
        told, found, exact = final(images), integer_graph(final, images)(images), network.module(images)
    assert (found - told).abs().max() < 0.1 * exact.std() and (told - exact).abs().max() < 0.2 * exact.std()


def test_codes_are_pooled_where_two_quantizers_read_a_layer(tmp_path: Path) -> None:
    """As in SkyNet, whose bypass is pooled for one layer and concatenated for another."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        return m.c(torch.cat([m.b(m.p(y)), y[:, :, ::2, ::2]], 1)).flatten(1)

    network = traced(forward, a=conv(3, 8), b=conv(8, 8), c=conv(16, 4), p=nn.MaxPool2d(2))
    images = torch.randn(16, 3, 16, 16)
    final = frozen(network, images, sparsity=0, widths=(8,), act_bits=(8,))
    found, kinds = run(to_onnx(final, images), images, tmp_path)
    assert kinds["MaxPool"] == 0 and kinds["NhwcMaxPool"] == 1
    with torch.no_grad():
        told = integer_graph(final, images)(images).numpy()
    assert (np.abs(found - told) > 1e-5 * np.abs(told).max()).mean() < 0.02, "a code may tip over"


def test_two_quantizers_in_a_row_stay_two(tmp_path: Path) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        return m.b(y).flatten(1) + m.c(y).flatten(1)

    network, images = traced(forward, a=conv(3, 6), b=conv(6, 3), c=conv(6, 3)), torch.randn(16, 3, 10, 10)
    final = frozen(network, images, sparsity=0, widths=(8,), act_bits=(8,))
    with torch.no_grad():
        told = integer_graph(final, images)(images).numpy()
    found, _ = run(to_onnx(final, images), images, tmp_path)
    assert (np.abs(found - told) > 1e-5 * np.abs(told).max()).mean() < 0.02, "a code may tip over"


@pytest.mark.parametrize("how", ["indices", "keyword"])
def test_poolings_of_other_forms_are_exported(how: str, tmp_path: Path) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.a(x))
        y = m.p(y)[0] if how == "indices" else m.p(input=y)
        return m.b(y).flatten(1) + m.c(y).flatten(1)

    pool = nn.MaxPool2d(2, return_indices=how == "indices")
    network, images = traced(forward, a=conv(3, 8), b=conv(8, 4), c=conv(8, 4), p=pool), torch.randn(4, 3, 8, 8)
    found, _ = run(to_onnx(frozen(network, images, sparsity=0, widths=(8,), act_bits=(8,)), images), images, tmp_path)
    assert np.isfinite(found).all() and found.any()


def test_layers_that_are_not_integers_stay_float(tmp_path: Path) -> None:
    network = traced(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 6), c=conv(6, 4))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    final = frozen(network, images, sparsity=0, widths=(4,), act_bits=(8,))
    final.a.bits[0], final.b.bias[0] = 32, 60_000.0  # a float kernel, and a bias that no accumulator holds
    final.b.scale[0] = 6e-8
    for name in "ab":
        old = final.get_submodule(name)
        raw = torch.ones((int((old.bits == 32).sum()), *old.codes.shape[1:]))
        final.set_submodule(name, FrozenLayer(old.codes, old.bits, old.scale, raw, old.bias, old.geometry, old.act))
    model = to_onnx(final, images)
    stored = {t.name: t.data_type for t in onnx.load_from_string(model).graph.initializer}
    int8 = sum(kind == onnx.TensorProto.INT8 for kind in stored.values())
    assert int8 == 2  # the codes of c and their zeros
    found, _ = run(model, images, tmp_path)
    with torch.no_grad():
        assert np.abs(found - final(images).numpy()).max() <= one_step(final).max()


def test_ship_writes_it_beside_the_packed_file(tmp_path: Path) -> None:
    images = images_of("digits_cnn", 8)
    network = network_of("digits_cnn")
    final = frozen(network, images, widths=NARROW, act_bits=(8,))
    ship(final, tmp_path, images=images)
    model = (tmp_path / "model.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]
    again = to_onnx(load(tmp_path), images)
    assert np.array_equal(run(model, images, tmp_path)[0], run(again, images, tmp_path)[0])
    (tmp_path / "optimized.onnx").unlink()
    onnx.checker.check_model(model, full_check=True)
    whole = float_onnx(network.module, images)
    assert len(model) < 0.6 * len(whole) and str(Path(__file__).parent.parent).encode() not in model
    weights = [numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer]
    assert sum(np.count_nonzero(w) for w in weights if w.dtype == np.int8 and w.ndim > 1) == sum(
        int(layer.container[0].count_nonzero()) for layer in layers_of(final)
    )
    ship(final, tmp_path)  # the old model.onnx could be another network's
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_onnx_lacks_is_told_and_the_packed_file_kept(tmp_path: Path) -> None:
    network = traced(lambda m, x: torch.digamma(m.a(x)), a=conv(3, 4))
    final = freeze(compress(network, random_policy(network, 0, 0)))
    with pytest.raises(AjpqError, match="use the packed file"):
        ship(final, tmp_path, images=torch.randn(2, 3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_narrow_depthwise_layers_run_in_float(tmp_path: Path) -> None:
    parts = {"a": conv(3, 6), "b": nn.Conv2d(6, 6, 3, padding=1, groups=6), "c": conv(6, 4), "d": conv(4, 5)}
    network = traced(lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu()).relu()), **parts)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    final = frozen(network, images, sparsity=0, widths=(3,), act_bits=(8,))
    found, kernels = run(to_onnx(final, images), images, tmp_path)
    assert kernels["QLinearConv"] == 2 and kernels["Conv"] + kernels["FusedConv"] == 2  # b, and d at the end
    with torch.no_grad():
        difference = np.abs(found - final(images).numpy())
    assert np.median(difference) < 1e-4 and difference.max() <= one_step(final).max()


# -- what is seen of the file on ONNX Runtime -------------------------------------------------------------------------


def test_what_is_seen_is_what_the_runtime_gives(trained, tmp_path: Path) -> None:
    network, data = trained
    images, test = (torch.cat([x for x, _ in split]) for split in (data.calibration, data.test))
    labels = torch.cat([y for _, y in data.test]).numpy()
    ours, other = (
        freeze(compress(network, random_policy(network, seed, 0.2, (3,), (8,)), calibrate(network, data.calibration)))
        for seed in (0, 1)
    )
    with torch.no_grad():
        known = ours(test).numpy()
    for final in (ours, other):
        model = to_onnx(final, images)
        found = seen(model, ours, data.test, CLASSIFICATION, images=150)
        given, _ = run(model, test, tmp_path)
        assert found["metric"] == pytest.approx((given.argmax(1) == labels).mean())  # of all 360
        assert found["images"] == 150 and found["answer"] == "class"
        assert found["agreement"] == pytest.approx((given.argmax(1) == known.argmax(1))[:150].mean())
        assert found["difference_unit"] == STEP and found["largest_difference"] == pytest.approx(
            (np.abs(given - known)[:150] / one_step(ours)).max(), rel=1e-3
        )
        if final is ours:
            assert found["agreement"] >= 0.98  # a tie may tip where a processor adds up in another order
        else:
            assert found["agreement"] < 0.9 and found["largest_difference"] > 0.1  # another network's file


def test_the_split_is_read_once(trained) -> None:
    network, data = trained
    final = frozen(network, next(iter(data.calibration))[0], widths=NARROW, act_bits=(8,))
    model = to_onnx(final, next(iter(data.calibration))[0])
    batches = iter(list(data.test))  # gives every batch once
    assert seen(model, final, batches, CLASSIFICATION)["images"] == 360
    with pytest.raises(AjpqError, match="check the data split"):
        seen(model, final, batches, CLASSIFICATION)


@dataclass(frozen=True)
class Middle:
    """A task of a user's own: the mean output should be the target."""

    metric = "nearness"

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 1 / (1 + (outputs.flatten(1).mean(1) - targets).abs())

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"nearness": self.quality(outputs, targets).mean().item()}


def test_other_tasks_have_answers_too(tmp_path: Path) -> None:
    network = traced(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6), b=conv(6, 10))
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ours, other = (frozen(network, images, seed, 0.3, widths=NARROW, act_bits=(8,)) for seed in (0, 1))
    models = to_onnx(ours, images), to_onnx(other, images)
    corners = torch.tensor([[[0.1, 0.2, 0.5, 0.6]]]).expand(8, 1, 4)
    for task, targets, answer in (
        (Detection(), corners, "surest box"),
        (Middle(), torch.zeros(8), "nearness to 0.01"),
    ):
        same, different = (seen(model, ours, [(images, targets)], task) for model in models)
        assert same["answer"] == answer and same["agreement"] == 1 > different["agreement"]
        with torch.no_grad():
            assert same["metric"] == pytest.approx(task.metrics(ours(images), targets)[task.metric], abs=0.01)
    with torch.no_grad():
        both = (ours(images).numpy(), run(models[1], images, tmp_path)[0])
    surest = [outputs.reshape(8, 2, 5, 8, 8)[:, :, 4].reshape(8, -1).argmax(1) for outputs in both]
    found = seen(models[1], ours, [(images, corners)], Detection())
    assert found["agreement"] == (surest[0] == surest[1]).mean()


def test_differences_are_told_in_steps_only_behind_a_layer() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    straight = traced(lambda m, x: m.a(x), a=conv(3, 5))
    pooled = traced(lambda m, x: m.a(x).mean((2, 3)), a=conv(3, 5))
    for network, bits, unit in ((straight, 8, STEP), (straight, 32, DEVIATION), (pooled, 8, DEVIATION)):
        final = frozen(network, images, sparsity=0, widths=NARROW, act_bits=(bits,))
        with torch.no_grad():
            outputs = final(images)
        name, size = unit_of(final, outputs)
        assert name == unit
        if unit == STEP:
            assert np.allclose(size.flatten().numpy(), one_step(final)) and (outputs / size).shape == outputs.shape
        else:
            assert size.item() == pytest.approx(outputs.numpy().std(), rel=1e-5)


def test_a_file_that_does_not_run_is_told() -> None:
    images = images_of("digits_cnn", 8)
    final = frozen(network_of("digits_cnn"), images, widths=NARROW, act_bits=(8,))
    model = onnx.load_from_string(to_onnx(final, images))
    with pytest.raises(AjpqError, match="could not run it"):
        seen(model.SerializeToString(), final, [(images.repeat(1, 2, 1, 1), torch.zeros(8))], CLASSIFICATION)
    model.graph.node[0].op_type = "NoSuchOperation"
    with pytest.raises(AjpqError, match="could not load it") as error:
        seen(model.SerializeToString(), final, [(images, torch.zeros(8))], CLASSIFICATION)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ran", [True, False])
def test_the_table_says_what_was_seen(ran: bool) -> None:
    onnx = {"bytes": 300, "original_bytes": 900, "timing": None, "metric": None, "agreement": None, "failed": "no"}
    if ran:
        onnx |= {"metric": 0.8765, "agreement": 0.9972, "answer": "class", "images": 1000}
    report = {
        "metric": "accuracy", "metrics": {"original": 0.9, "searched": 0.7, "final": 0.88}, "onnx": onnx,
        "bytes": {"original": 1000, "claimed": 100, "on_disk": 99}, "costs": {}, "budget": {}, "differences": {},
        "given": None, "seconds": {}, "evaluations": 3, "control": None, "held_out": None,
        "metrics_in_full": {"original": {"accuracy": 0.9, "map50": 0.8}, "final": {"accuracy": 0.88, "map50": 0.76}},
    }  # fmt: skip
    console = Console(width=80)
    with console.capture() as captured:
        show(report, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]
    seen_rows = [row for row in rows if "model.onnx (test)" in row[0] or "packed" in row[0]]
    assert seen_rows == ran * [
        ["accuracy of model.onnx (test)", "0.9000", "0.8765", "", ""],
        ["same class as packed, of 1,000", "", "0.9972", "", ""],
    ]
    assert any(row[0] == "bytes of model.onnx, int8" for row in rows)
    assert ["map50 after fine-tuning", "0.8000", "0.7600", "", ""] in rows
