"""How the tests run the command `ajpq`: in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "import sys; from ajpq.cli import main; sys.exit(main())"


def run(folder: Path, *command: str, path: str = str(ROOT), **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "HYDRA_", "AJPQ_", "COV"))}
    environment = {**clean, **({"PYTHONPATH": path} if path else {}), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def ajpq(folder: Path, *arguments: str, **kwargs: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-c", ENTRY, *arguments, **kwargs)


def one_sentence(done: subprocess.CompletedProcess[str], command: str = "ajpq") -> str:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{command}: error: "), done.stderr
    return lines[0]
