"""The command `ajpq-inspect`: what it prints, what it needs, and what it says of files that are not ours."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import ROOT, one_sentence, run
from nets import network_of, random_policy

from ajpq.compression import compress, freeze
from ajpq.cost import Size, total
from ajpq.errors import AjpqError
from ajpq.inspecting import inspect
from ajpq.report import layers_of
from ajpq.shipping import FILE, ship

ENTRY = "import sys; from ajpq.inspecting import main; sys.exit(main())"


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-c", ENTRY, *arguments, **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the packed file, and what the report must say of it."""
    path, network = tmp_path_factory.mktemp("run"), network_of("digits_cnn")
    policy = random_policy(network, 0)
    file = ship(freeze(compress(network, policy)), path)
    report = {
        "layers": layers_of(network, policy),
        "bytes": {"original": 40_000, "claimed": total(Size(), network, policy) / 8, "on_disk": file.stat().st_size},
        "onnx": {"bytes": 12_345, "original_bytes": 50_000},  # of the original in float32, as ONNX
    }
    (path / "report.json").write_text(json.dumps(report))
    (path / "model.onnx").write_bytes(bytes(12_345))
    return path


def test_everything_in_a_folder_is_told(folder: Path) -> None:
    done = command(folder, ".")
    assert done.returncode == 0 and not done.stderr
    network = network_of("digits_cnn")
    policy = random_policy(network, 0)
    widths = torch.cat([torch.from_numpy(policy.weight_bits[layer.name]) for layer in network.layers])
    lines = done.stdout.splitlines()
    for bits in (1, 4, 32):
        row = next(line.split() for line in lines if line.split()[:1] == [str(bits)])
        assert int(row[1]) == (widths == bits).sum()
    assert f"{(widths > 0).sum()} of {len(widths)}" in done.stdout
    first = network.layers[0]
    kept = (policy.weight_bits[first.name] > 0).sum()
    assert any(line.split() == [first.name, str(kept), "of", str(first.c_out)] for line in lines)
    size = (folder / FILE).stat().st_size
    assert any(line.split()[:1] == [FILE] and f"{size:,}" in line and f"{size / 40_000:.4f}" in line for line in lines)
    assert any(line.split() == ["model.onnx", "12,345", "12,345", "0.2469"] for line in lines)
    assert "codes" in done.stdout and "scale" in done.stdout and "differs" not in done.stdout


def test_a_file_alone_is_told_without_claims(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / FILE, tmp_path / "net.safetensors")
    text = inspect(tmp_path / "net.safetensors")
    assert "no report.json beside it" in text and "claimed" not in text.replace("was claimed", "")


def test_a_file_that_is_not_what_its_report_says_is_noticed(folder: Path, tmp_path: Path) -> None:
    network = network_of("digits_cnn")
    ship(freeze(compress(network, random_policy(network, 1))), tmp_path)
    shutil.copy(folder / "report.json", tmp_path)
    assert "differs: the file holds" in inspect(tmp_path)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _with_report(folder: Path, tmp_path: Path, text: str) -> Path:
    shutil.copy(folder / FILE, tmp_path)
    _write(tmp_path / "report.json", text)
    return tmp_path


FAULTS = {
    "nowhere": (lambda folder, tmp: tmp / "nowhere", "there is no"),
    "empty folder": (lambda folder, tmp: tmp, "has none"),
    "text": (lambda folder, tmp: _write(tmp / "notes.txt", "hello"), "that ajpq wrote"),
    "report of another": (lambda folder, tmp: _with_report(folder, tmp, "{}"), "that ajpq wrote"),
    "list as report": (lambda folder, tmp: _with_report(folder, tmp, "[1]"), "that ajpq wrote"),
    "broken report": (lambda folder, tmp: _with_report(folder, tmp, '{"layers": ['), "readable JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_sentence(fault: str, folder: Path, tmp_path: Path) -> None:
    make, says = FAULTS[fault]
    path = make(folder, tmp_path)
    with pytest.raises(AjpqError, match=says) as error:
        inspect(path)
    if fault in ("nowhere", "text"):
        done = command(tmp_path, str(path))
        assert one_sentence(done, "ajpq-inspect") == f"ajpq-inspect: error: {error.value}"


def test_it_loads_no_search_code(folder: Path) -> None:
    program = (
        ENTRY.replace("sys.exit(main())", "main()")
        + "\nnames = {name.split('.')[0] for name in sys.modules}\n"
        + "assert not names & {'gymnasium', 'stable_baselines3', 'hydra', 'envs', 'agents', 'optuna', 'onnxscript'}"
    )
    done = run(folder, sys.executable, "-c", program, str(folder))
    assert done.returncode == 0 and not done.stderr


def test_help_and_a_reader_that_stops_early(folder: Path) -> None:
    assert "usage: ajpq-inspect" in command(folder, "--help").stdout
    first = subprocess.Popen(
        [sys.executable, "-c", ENTRY, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    first.stdout.close()
    assert first.stderr.read() == b"" and first.wait() == 0
    first.stderr.close()
