"""Sweeps over several processes, with the launchers of Hydra and the ready entries of conf/hydra/launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from command import ENTRY, ROOT, ajpq, one_sentence, run

PLUGINS = {  # entry -> plugin, extra
    "cores": ("hydra_joblib_launcher", "joblib"),
    "submitit_here": ("hydra_submitit_launcher", "submitit"),
    "slurm": ("hydra_submitit_launcher", "submitit"),
    "ray_here": ("hydra_ray_launcher", "ray-launcher"),
}
QUICK = ["train.epochs=0", "search=uniform", "search.evaluations=1", "finetune.epochs=0", "hydra.sweep.dir=sweep"]
GOOD_BAD_GOOD = ["model._target_=my_net.Net", "budget.size=0.08,0.001,0.07"]


def needs(entry: str) -> None:
    plugin, extra = PLUGINS[entry]
    if not find_spec("hydra_plugins") or not find_spec(f"hydra_plugins.{plugin}"):
        pytest.skip(f"needs the extra `{extra}`")


def sweep(folder: Path, *arguments: str, **variables: str) -> CompletedProcess[str]:
    """Run the command as its script does: -P leaves the current folder to `ajpq` itself."""
    (folder / "my_net.py").write_text("from ajpq.models import digits_cnn as Net\nprint('hello from my_net')\n")
    python = ["/usr/bin/env", "-u", "OMP_NUM_THREADS", sys.executable, "-P", "-c", ENTRY]
    return run(folder, *python, "--multirun", *arguments, "onnx=false", *QUICK, **variables)


def reports(folder: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("sweep/*/report.json")}
    return {name: {**report, "seconds": sorted(report["seconds"])} for name, report in found.items()}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("basic")
    done = sweep(folder, *GOOD_BAD_GOOD, "threads=1")
    assert done.returncode == 2 and "smallest reachable" in done.stderr.splitlines()[-1]
    return reports(folder)


def check(folder: Path, done: CompletedProcess[str], expected: dict[str, dict]) -> None:
    """The good jobs are done and equal those of one process with one thread; the bad one is told in one sentence."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ajpq: error: a budget must be reachable"), done.stderr
    assert "Traceback" not in done.stderr
    assert reports(folder) == expected and expected.keys() == {"0", "2"}
    assert not (folder / "sweep" / "1").exists()
    assert "hello from my_net" in (folder / "sweep/0/ajpq.out").read_text()


LOCAL = ["cores", *(pytest.param(entry, marks=pytest.mark.slow) for entry in ("submitit_here", "ray_here"))]


@pytest.mark.parametrize("entry", LOCAL)
def test_jobs_in_other_processes_equal_those_in_one(tmp_path: Path, entry: str, one_by_one: dict[str, dict]) -> None:
    needs(entry)
    two = ["hydra.launcher.n_jobs=2"] if entry == "cores" else []  # on one core it would be one process, this one
    check(tmp_path, sweep(tmp_path, f"hydra/launcher={entry}", *two, *GOOD_BAD_GOOD), one_by_one)


SLURM = {
    "sbatch": """
        script=$(dirname "$0")/submitted
        cp "$1" "$script"
        export SLURM_CPUS_PER_TASK=1 SLURM_ARRAY_JOB_ID=7
        for SLURM_ARRAY_TASK_ID in 0 1 2; do
          export SLURM_ARRAY_TASK_ID SLURM_JOB_ID=$((8 + SLURM_ARRAY_TASK_ID))
          (cd / && bash "$script") >/dev/null 2>&1 &
        done
        echo "Submitted batch job 7" """,
    "srun": """
        test "$SRUN_CPUS_PER_TASK" = 1 || exit 1
        while [ "${1#*python}" = "$1" ]; do shift; done
        exec "$@" """,
    "sacct": "echo 'JobID|State|NodeList'",
}


@pytest.mark.slow
def test_slurm_gets_one_array_of_jobs(tmp_path: Path, one_by_one: dict[str, dict]) -> None:
    """With programs that stand for those of a cluster, which cannot be had here: they start the jobs at once."""
    needs("slurm")
    (tmp_path / "bin").mkdir()
    for name, body in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    asked = ["partition=short", "cpus_per_task=1", "mem_gb=3", "timeout_min=5"]
    options = [f"hydra.launcher.{option}" for option in asked]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = sweep(tmp_path, "hydra/launcher=slurm", *options, *GOOD_BAD_GOOD, PATH=path)
    lines = (tmp_path / "bin" / "submitted").read_text().splitlines()
    wanted = {"partition=short", "cpus-per-task=1", "mem=3GB", "time=5", "array=0-2%3", "job-name=ajpq"}
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    check(tmp_path, done, one_by_one)


def test_without_slurm_is_one_sentence(tmp_path: Path) -> None:
    needs("slurm")
    done = sweep(tmp_path, "hydra/launcher=slurm", PATH=str(tmp_path))
    assert done.returncode == 2 and "srun" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("entry", PLUGINS)
def test_missing_plugin_names_its_extra(tmp_path: Path, entry: str) -> None:
    without = "import sys; sys.modules['hydra_plugins'] = None\n" + ENTRY
    done = run(tmp_path, sys.executable, "-c", without, "--multirun", f"hydra/launcher={entry}", "seed=0,1")
    sentence = one_sentence(done)
    assert f"`hydra/launcher={entry}` needs" in sentence and f"'ajpq[{PLUGINS[entry][1]}]'" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", PLUGINS)
def test_entries_compose_and_say_what_they_need(tmp_path: Path, entry: str) -> None:
    first = (ROOT / f"conf/hydra/launcher/{entry}.yaml").read_text().split("\ndefaults:")[0]
    assert f"extra `{PLUGINS[entry][1]}`" in first and f"ajpq --multirun hydra/launcher={entry}" in first
    needs(entry)
    shown = ajpq(tmp_path, f"hydra/launcher={entry}", "--cfg", "hydra", "--package", "hydra.launcher")
    assert shown.returncode == 0 and f"hydra_plugins.{PLUGINS[entry][0]}" in shown.stdout, shown.stderr


HEARS_CTRL_C = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {ENTRY}"


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["cores", "submitit_here", "ray_here"])
def test_ctrl_c_ends_all_jobs_and_keeps_what_they_wrote(tmp_path: Path, entry: str) -> None:
    needs(entry)
    arguments = [
        "--multirun",
        f"hydra/launcher={entry}",
        "seed=0,1",
        *QUICK,
        "search=random",
        "search.evaluations=99999",
        *(["hydra.launcher.n_jobs=2"] if entry == "cores" else []),  # side by side on a single core, too
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while len(records := list(tmp_path.glob("sweep/*/evaluations.jsonl"))) < 2 or not all(map(_lines, records)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "ajpq: interrupted: what was finished is kept in" in err
    written = [_lines(path) for path in records]
    time.sleep(1.0)
    assert [_lines(path) for path in records] == written


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())
