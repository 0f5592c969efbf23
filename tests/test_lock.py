"""Two runs never share a folder."""

import subprocess
import sys

import pytest
from command import ROOT, ajpq, one_sentence

from ajpq.errors import AjpqError
from ajpq.lock import locked

pytest.importorskip("fcntl", reason="this system has no locks of folders")

HOLD = """
import sys, time
from pathlib import Path
from ajpq.lock import locked

with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


def test_a_folder_is_free_again_when_its_process_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    with pytest.raises(AjpqError, match=f"another process is running in {tmp_path}"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_the_second_command_in_a_folder_is_one_sentence_and_harms_nothing(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "overrides.yaml").write_text("[]")
        said = one_sentence(ajpq(tmp_path, f"hydra.run.dir={tmp_path}"))
    assert "another process is running in" in said
    assert (tmp_path / ".hydra" / "overrides.yaml").is_file()
