"""Whatever the README tells a newcomer to write or run is written and run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
FILES = {block.split("\n", 1)[0].removeprefix("# "): block for block in BLOCKS if block.startswith("# my_")}
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ajpq ") and "_target_" in line]
QUICK = "train.epochs=1 search.evaluations=4 control=none finetune.epochs=1 onnx=false threads=1 hydra.run.dir=run"

MY_NET = """
import torch
from ajpq.data import digits
from ajpq.models import digits_cnn
torch.manual_seed(0)
torch.set_num_threads(1)
data, model = digits(), digits_cnn()
as_loader = lambda split: torch.utils.data.DataLoader([(x, y) for X, Y in split for x, y in zip(X, Y)], batch_size=64)
train, held_out = as_loader(data.train), as_loader(data.search)
"""


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_script_of_ten_lines(tmp_path):
    script = next(block for block in BLOCKS if "ajpq.Problem" in block)
    assert len([line for line in script.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_net.py").write_text(MY_NET)
    (tmp_path / "script.py").write_text(
        script.replace("evaluations=100", "evaluations=4").replace("epochs=20", "epochs=1")
    )
    out = run(tmp_path, "script.py")
    assert "size" in out and (tmp_path / "small/model.safetensors").stat().st_size > 1000


def test_extensions_take_less_than_twenty_lines():
    assert set(FILES) == {"my_cnn.py", "my_cost.py", "my_search.py", "my_env.py"}
    assert all(len([line for line in block.splitlines()[1:] if line.strip()]) < 20 for block in FILES.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_extension_runs_by_its_command(command, tmp_path):
    for name, block in FILES.items():
        (tmp_path / name).write_text(block)
    run(tmp_path, "-m", *shlex.split(command), *QUICK.split())
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert all(report["costs"][name]["ratio"] <= limit for name, limit in report["budget"].items())
    if "traffic" in command:
        assert report["costs"]["traffic"]["unit"] == "B" and report["budget"]["traffic"] == 0.3
    if "my_cnn" in command:
        assert {row["name"] for row in report["layers"]} == {"stem.0", "left", "right", "head.2"}
    if "search" in command:
        assert report["evaluations"] == 4


def test_there_is_a_command_for_every_extension():
    assert len(COMMANDS) == len(FILES)
