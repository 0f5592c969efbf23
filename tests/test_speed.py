"""The shipped model.onnx against its original, in turns: what is measured and told, and that nothing stops a run."""

import importlib.util

import onnx
import pytest
from nets import images_of, model_of, network_of, random_policy

from ajpq.calibration import calibrate
from ajpq.compression import compress, freeze
from ajpq.errors import AjpqError
from ajpq.onnx_export import FILE, float_onnx
from ajpq.report import claimed_speed
from ajpq.shipping import ship
from ajpq.speed import NAMES, check_timing, measured, told


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[bytes, bytes]:
    """Of the original and of a shipped network."""
    network, images = network_of("digits_cnn"), images_of("digits_cnn", 8)
    policy = random_policy(network, 0, widths=(4, 8), act_bits=(8,))
    folder = tmp_path_factory.mktemp("shipped")
    ship(freeze(compress(network, policy, calibrate(network, [(images, None)]))), folder, images=images)
    return float_onnx(model_of("digits_cnn"), images), (folder / FILE).read_bytes()


def test_both_are_measured_on_every_runtime_there_is(models):
    found = measured(*models, images_of("digits_cnn", 3), batch=5, seconds=0.05)
    here = [name for name in NAMES if importlib.util.find_spec(name)]
    assert "onnxruntime" in here and list(found["runtimes"]) == here
    assert (found["batch"], found["threads"]) == (5, 1) and found["processor"]
    for row in found["runtimes"].values():
        for name in ("original", "shipped"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert row["ratio"] == pytest.approx(row["shipped"]["median"] / row["original"]["median"])
        assert 0 < row["ratio_low"] <= row["ratio_high"]
    first = found["runtimes"]["onnxruntime"]
    assert first["version"] == importlib.import_module("onnxruntime").__version__
    assert first["ratio_to_onnxruntime"] == first["ratio"]


def test_times_are_of_images(models):
    images = images_of("digits_cnn", 2)
    one, many = (measured(*models, images, batch=n, seconds=0.1)["runtimes"]["onnxruntime"] for n in (1, 256))
    assert many["original"]["median"] < 20 * one["original"]["median"], "a run of 256 takes longer by more"


def test_a_model_that_cannot_be_loaded_is_told_and_not_raised(models):
    broken = onnx.load_from_string(models[1])
    broken.graph.node[0].op_type = "NoSuchOperation"
    found = measured(models[0], broken.SerializeToString(), images_of("digits_cnn", 1), seconds=0.05)
    assert set(found["runtimes"]["onnxruntime"]) == {"failed"}
    (line, *_) = told(found, {"macs": 0.5})
    assert line.startswith("ONNX Runtime could not be measured (") and "\n" not in line


def test_a_model_that_cannot_run_is_told_and_not_raised(models):
    found = measured(*models, images_of("digits_cnn", 1).repeat(1, 2, 1, 1), seconds=0.05)
    assert set(found["runtimes"]["onnxruntime"]) == {"failed"}


ROW = {
    "version": "1.0",
    "original": {"median": 2.0, "low": 1.9, "high": 2.1},
    "shipped": {"median": 0.5, "low": 0.4, "high": 0.6},
    "ratio": 0.25, "ratio_low": 0.2, "ratio_high": 0.3, "ratio_to_onnxruntime": 0.125,
}  # fmt: skip


def test_a_line_for_each_runtime():
    timing = {"processor": "x", "batch": 1, "threads": 2, "runtimes": {"onnxruntime": ROW, "openvino": ROW}}
    first, second = told(timing, {"latency": 0.3})
    assert first == (
        "ONNX Runtime, batch 1, 2 threads: int8 0.5 ms per image against float32 2 ms of the original: 0.25 times its "
        "time (quartiles 0.20 to 0.30); claimed: latency 0.30"
    )
    assert second.startswith("OpenVINO, batch 1, 2 threads: int8 0.5 ms per image against 2 ms of the original")
    assert "0.12 times that on ONNX Runtime" in second


def test_the_claim_is_in_milliseconds_where_a_cost_is():
    costs = {name: {"ratio": r, "unit": u} for name, r, u in (("size", 0.1, "bit"), ("macs", 0.5, "MAC"))}
    assert claimed_speed(costs) == {"macs": 0.5}
    assert claimed_speed({**costs, "latency": {"ratio": 0.4, "unit": "ms"}}) == {"latency": 0.4}
    assert claimed_speed({"size": costs["size"]}) == {}


GOOD = {"batch": 1, "threads": 1, "seconds": 3}


def test_settings_that_can_be_used_pass():
    check_timing(None)
    check_timing(GOOD)
    check_timing({**GOOD, "seconds": 0.5})


@pytest.mark.parametrize(
    "timing, says",
    [
        ({**GOOD, "batch": 0}, "timing.batch must be"),
        ({**GOOD, "threads": True}, "timing.threads must be"),
        ({**GOOD, "threads": 1.5}, "timing.threads must be"),
        ({**GOOD, "seconds": 0}, "timing.seconds must be"),
        ({**GOOD, "seconds": "long"}, "timing.seconds must be"),
        ({"batch": 1}, "batch, threads and seconds"),
        (3, "batch, threads and seconds"),
    ],
)
def test_other_settings_are_refused(timing, says):
    with pytest.raises(AjpqError, match=says):
        check_timing(timing)
