"""Timing: networks in turns, the models of one layer that tables are measured with, and what= of ajpq-profile."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import hydra
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import conv, images_of, model_of, network_of, random_policy, traced
from omegaconf import DictConfig
from torch import nn

from ajpq import one_layer, profiling
from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.explain import CONF
from ajpq.one_layer import PRECISIONS, Point, Shape, calls_of
from ajpq.onnx_export import float_onnx
from ajpq.shipping import ship
from ajpq.testing.problems import small_network
from ajpq.timing import Subject, Times, interleaved, runner

CONVS = {
    "plain": Point(Shape("conv", (9, 7), (3, 3), (2, 1), (1, 1, 1, 1)), 8, 24, "float32"),
    "relu": Point(Shape("conv", (8, 8), (3, 3), (1, 1), (1, 1, 1, 1), relu="relu"), 3, 16, "float32"),
    "grouped": Point(Shape("conv", (8, 8), (1, 1), groups=4, bias=False), 4, 16, "float32"),
    "depthwise": Point(Shape("depthwise", (8, 8), (3, 3), (2, 2), (1, 1, 1, 1), relu="relu6"), 1, 16, "float32"),
    "one pixel": Point(Shape("conv", (1, 1)), 8, 8, "float32"),
}


def settings(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("profile", ["rounds=5", *overrides])


def test_networks_take_turns() -> None:
    seen: list[str] = []
    found = interleaved({name: lambda name=name: seen.append(name) or sum(range(20000)) for name in "ab"}, rounds=6)
    assert {name: len(times.samples) for name, times in found.items()} == {"a": 6, "b": 6}
    for times in found.values():
        low, high = times.quartiles
        assert 0 < low <= times.median <= high
    blocks = [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]
    assert len(blocks) >= 6, "each round runs both, so neither is timed all at once"


def test_ratio_is_of_rounds() -> None:
    a, b = Times(np.array([1.0, 20.0, 3.0])), Times(np.array([2.0, 40.0, 6.0]))
    assert a.over(b).samples.tolist() == [0.5, 0.5, 0.5]


def test_fixed_time_gives_five_rounds_at_least() -> None:
    assert len(interleaved({"a": lambda: None}, seconds=0)["a"].samples) == 5


@pytest.mark.parametrize(
    ("name", "threads", "says"),
    [("tensorrt", 1, "runtime must be one of"), ("onnxruntime", 0, "threads"), ("onnxruntime", True, "threads")],
)
def test_unknown_runtime_and_threads_are_refused(name: str, threads: int, says: str) -> None:
    with pytest.raises(AjpqError, match=says):
        runner(name, threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_runtime_that_is_not_here_is_refused() -> None:
    with pytest.raises(AjpqError, match="cuda must be on this machine"):
        runner("cuda")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "openvino_f32", "cuda"])
def test_runner_times_a_network(name: str) -> None:
    try:
        device = runner(name)
    except AjpqError:
        pytest.skip(f"no {name} here")
    images = images_of("digits_cnn", 3)
    subject = Subject(images.numpy(), float_onnx(model_of("digits_cnn"), images), model_of("digits_cnn"))
    assert interleaved({"net": device.start(subject)}, rounds=5)["net"].median > 0
    assert device.device.processor and device.device.version and device.device.threads == 1


def test_a_network_is_timed_with_its_shapes_fixed() -> None:
    images = images_of("digits_cnn", 3)
    model = onnx.load_model_from_string(
        Subject(images.numpy(), float_onnx(model_of("digits_cnn"), images)).of_one_shape()
    )
    onnx.checker.check_model(model, full_check=True)
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [3, 1, 8, 8]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model_of("digits_cnn")(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert torch.allclose(found, expected, atol=1e-4)


def test_images_in_any_order_of_memory_are_timed() -> None:
    images = images_of("digits_cnn", 3)
    swapped = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    model = float_onnx(model_of("digits_cnn"), images)
    for name in ("onnxruntime", "openvino"):
        try:
            run = runner(name).start(Subject(swapped, model))
        except AjpqError:
            continue
        assert interleaved({"net": run}, rounds=5)["net"].median > 0


# -- models of one layer ----------------------------------------------------------------------------------------------


def loaded(model: bytes, folder: Path) -> tuple[onnxruntime.InferenceSession, Counter[str]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_run_as_in_whole_networks(name: str, precision: str, tmp_path: Path) -> None:
    point = Point(CONVS[name].shape, CONVS[name].inputs, CONVS[name].outputs, precision)
    for copies, poolings in ((1, 4), (4, 1)):
        session, kernels = loaded(one_layer.model_of(point, copies, poolings), tmp_path)
        found = session.run(None, {"images": one_layer.images_of(point, 2)})
        assert [part.shape for part in found] == [(2, point.outputs, 1, 1)] * 4
        assert kernels["QLinearConv" if precision == "int8" else "Conv"] + kernels["FusedConv"] == copies + 1
        if name != "one pixel":
            assert kernels["MaxPool"] + kernels["NhwcMaxPool"] == 4
        assert not {"QuantizeLinear", "DequantizeLinear", "Relu", "Clip"} & set(kernels)


@pytest.mark.parametrize(("precision", "kernel"), [("float32", "Gemm"), ("int8", "QGemm")])
def test_linear_layers_run_as_in_whole_networks(precision: str, kernel: str, tmp_path: Path) -> None:
    point = Point(Shape("linear", (5, 1)), 24, 10, precision)
    session, kernels = loaded(one_layer.model_of(point, 3), tmp_path)
    found = session.run(None, {"images": one_layer.images_of(point, 2)})
    assert kernels == {kernel: 3} and [part.shape for part in found] == [(10, 10)] * 3


def test_float_model_computes_the_layer(tmp_path: Path) -> None:
    point = CONVS["plain"]
    model = one_layer.model_of(point, 1)
    tensors = {
        t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in onnx.load_from_string(model).graph.initializer
    }
    images = one_layer.images_of(point, 2)
    stem = nn.functional.conv2d(torch.from_numpy(images), tensors["stem"]).relu()
    told = nn.functional.conv2d(stem, tensors["layer0"], tensors["layer0_bias"], stride=(2, 1), padding=1)
    found = loaded(model, tmp_path)[0].run(None, {"images": images})[0]
    np.testing.assert_allclose(found, told[:, :, :1, :1].numpy(), rtol=1e-4, atol=1e-5)
    assert point.macs == 24 * 8 * 9 * told.shape[2] * told.shape[3]


@pytest.mark.parametrize("name", ["small", "digits_cnn", "resnet20"])
def test_calls_are_of_the_layers_own_size(name: str) -> None:
    network = small_network() if name == "small" else network_of(name)
    for layer_name, calls in calls_of(network).items():
        layer = network[layer_name]
        sizes = [shape.hw if shape.kind == "linear" else shape.out_hw for shape in calls]
        assert sum(h * w for h, w in sizes) == layer.positions
        assert all(shape.kernel == layer.kernel and shape.bias == layer.bias for shape in calls)


def test_calls_see_activations_and_repeats() -> None:
    network = traced(
        lambda m, x: m.b(m.r(m.n(m.a(x)))) + m.b(torch.relu(m.c(x))),
        a=conv(3, 8), n=nn.BatchNorm2d(8), r=nn.ReLU6(), b=conv(8, 4, 1), c=conv(3, 8, padding_mode="zeros"),
    )  # fmt: skip
    calls = calls_of(network)
    assert [shape.relu for shape in calls["a"]] == ["relu6"] and [shape.relu for shape in calls["c"]] == ["relu"]
    assert [shape.relu for shape in calls["b"]] == ["", ""]


# -- the command ------------------------------------------------------------------------------------------------------


def test_shipped_network_is_measured_against_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, images = network_of("digits_cnn"), images_of("digits_cnn", 8)
    policy = random_policy(network, 0, widths=(4, 8), act_bits=(8,))
    ship(freeze(compress(network, policy, calibrate(network, [(images, None)]))), tmp_path / "run", images=images)
    runtimes = ["onnxruntime", *(name for name in ("openvino",) if importlib.util.find_spec(name))]
    profiling.run(settings(f"what={tmp_path / 'run'}", "batch=2", f"runtime=[{','.join(runtimes)}]"), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    pairs = [(row["network"], row["device"]["runtime"]) for row in report["networks"]]
    assert pairs == [(network, name) for name in runtimes for network in ("original", "shipped")]
    for row in report["networks"]:
        assert all(0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"] for key in ("ms", "ratio"))
    first, second, *_ = report["networks"]
    assert set(first["ratio"].values()) == {1.0} and second["ratio"]["median"] != 1.0
    said = capsys.readouterr().out
    assert "ms per image" in said and "of the original on onnxruntime" in said and "1 thread, batch 2" in said


def test_model_alone_is_measured_at_a_given_size(tmp_path: Path) -> None:
    profiling.run(settings("what=model", "image=[1,8,8]"), tmp_path)
    (row,) = json.loads((tmp_path / "profile.json").read_text())["networks"]
    assert row["network"] == "original" and row["ms"]["median"] > 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "must be told what to do"),
        (["what=nowhere"], "folder of a run that shipped"),
        (["what=model", "image=[8,8]"], r"\[C,H,W\]"),
        (["what=model", "rounds=2"], "rounds"),
        (["what=model", "batch=0"], "batch"),
        (["table=t.json", "seconds=0"], "seconds"),
        (["table=t.json", "runtime=cuda"], "one runtime of ONNX files"),
        (["table=t.json", "runtime=[onnxruntime,openvino]"], "one runtime of ONNX files"),
        (["what=model", "runtime=[]"], "at least one runtime"),
        (["table=."], "must be a file, but . is a folder"),
        (["table=t.json", "image=[1,8,8]", "fractions=[0.5,2]"], "fractions"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(AjpqError, match=says):
        profiling.run(settings(*overrides), tmp_path)
    assert not list(tmp_path.iterdir())
