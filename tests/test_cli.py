"""What the command says and leaves behind when a job cannot be done, and when it is interrupted."""

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from command import ENTRY, ajpq, one_sentence, run

BAD = {
    "key": (["sed=1"], "`sed=1` must name a key", "`seed`"),
    "key in a list of good ones": (["seed=3", "hydra.job.nam=x"], "`hydra.job.nam=x`", "`hydra.job.name`"),
    "deleted key": (["~sed"], "`~sed`", "`seed`"),
    "choice in a group": (["hydra/launcher=basc"], "must choose one of basic", "`hydra/launcher=basic`"),
    "group": (["hydra/lancher=basic"], "`hydra/lancher=basic` must name", "`hydra/launcher`"),
    "value": (["seed=[1"], "`seed=[1` must be written as", "key=value"),
    "no value": (["seed"], "`seed` must be written as", "key=value"),
    "key in a sweep": (["--multirun", "sed=1,2"], "`sed=1` must name", "`seed`"),
    "choice in a sweep": (["-m", "hydra/launcher=basic,basc"], "`hydra/launcher=basc` must choose", "basic"),
    "primary config": (["--config-name", "nothing"], "Cannot find primary config 'nothing'", "search path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration_is_one_sentence(tmp_path: Path, case: str) -> None:
    arguments, fault, way_out = BAD[case]
    sentence = one_sentence(ajpq(tmp_path, *arguments))
    assert fault in sentence and way_out in sentence
    assert not list(tmp_path.iterdir())


def job(folder: Path, body: str, *arguments: str, **variables: str) -> CompletedProcess[str]:
    """Run the command with a pipeline whose `run(cfg, folder)` has the given body."""
    lines = [
        "import sys, types",
        "from hydra.utils import instantiate",
        "from ajpq.errors import AjpqError",
        "def run(cfg, folder):",
        *(f"    {line}" for line in body.splitlines()),
        "sys.modules['ajpq.pipeline'] = types.SimpleNamespace(run=run)",
        ENTRY,
    ]
    return run(folder, sys.executable, "-c", "\n".join(lines), *arguments, **variables)


FAULTS = {
    "ours": ("raise AjpqError('the rule, the value and the way out')", "the rule, the value and the way out"),
    "ours in a constructor": ("instantiate({'_target_': 'my_net.refuse'})", "refused by my_net"),
    "no such module": ("instantiate({'_target_': 'my_nut.Net'})", "`_target_=my_nut.Net` must name something"),
    "no such name": (
        "instantiate({'_target_': 'my_net.Nut'})",
        "must be found in `my_net`, which has no `Nut`; did you mean `Net`",
    ),
    "unknown keyword": ("instantiate({'_target_': 'my_net.Net', 'widht': 3})", "unexpected keyword argument 'widht'"),
    "keyword given late": ("instantiate({'_target_': 'my_net.Net', '_partial_': True})(widht=3)", "argument 'widht'"),
    "not callable": ("instantiate({'_target_': 'my_net'})", "Expected a callable target"),
    "no value": ("cfg.added", "`added` must have a value, but has none; add `added=...`"),
    "no such reference": ("cfg.referring", "'nowhere' not found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    (tmp_path / "my_net.py").write_text(
        "from ajpq.errors import AjpqError\n"
        "class Net:\n    def __init__(self, width=1): pass\n"
        "def refuse(): raise AjpqError('refused by my_net')\n"
    )
    body, words = FAULTS[fault]
    assert words in one_sentence(job(tmp_path, body, "+added=???", "+referring=${nowhere}"))
    assert {path.name for path in tmp_path.iterdir()} <= {"my_net.py", "__pycache__"}


def test_what_a_job_wrote_before_its_error_stays(tmp_path: Path) -> None:
    body = "(folder / 'policy.json').write_text('{}')\nraise AjpqError('too late')"
    assert "too late" in one_sentence(job(tmp_path, body, "hydra.run.dir=here"))
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"policy.json", ".hydra", "ajpq.log"}


def test_folder_of_the_user_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    one_sentence(job(tmp_path, "raise AjpqError('no')", "hydra.run.dir=here"))
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"


def test_bug_keeps_its_traceback(tmp_path: Path) -> None:
    for error in ("ValueError", "TypeError", "RuntimeError"):
        done = job(tmp_path, f"raise {error}('ours')")
        assert done.returncode == 1 and "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1] == f"{error}: ours"


def test_debug_shows_the_traceback_of_bad_input(tmp_path: Path) -> None:
    done = job(tmp_path, "raise AjpqError('no')", AJPQ_DEBUG="1")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "ajpq: error: no"


def test_interrupt_ends_with_130_and_names_the_folder(tmp_path: Path) -> None:
    done = job(tmp_path, "(folder / 'policy.json').write_text('{}')\nraise KeyboardInterrupt", "hydra.run.dir=here")
    assert done.returncode == 130
    assert done.stderr.strip() == f"ajpq: interrupted: what was finished is kept in {tmp_path / 'here'}"
    assert (tmp_path / "here" / "policy.json").exists()


def test_sweep_runs_every_job_and_reports_the_first_failure(tmp_path: Path) -> None:
    body = "if cfg.seed == 1: raise AjpqError('seed 1 is bad')\n(folder / 'done').write_text(str(cfg.seed))"
    done = job(tmp_path, body, "--multirun", "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "ajpq: error: seed 1 is bad"
    assert "Traceback" not in done.stderr
    assert {path.parent.name: path.read_text() for path in tmp_path.glob("sweep/*/done")} == {"1": "2", "2": "3"}


def test_own_configuration_folder_is_searched_for_the_fault(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "my_net.yaml").write_text("width: 3\n")
    arguments = ["--config-dir", "mine", "+model@extra=my_net"]
    assert "width: 3" in ajpq(tmp_path, *arguments, "--cfg", "job").stdout
    assert "`extra.width`" in one_sentence(ajpq(tmp_path, *arguments, "extra.widht=4"))


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_configuration_do_not_load_torch(tmp_path: Path, arguments: list[str]) -> None:
    program = ENTRY.replace("sys.exit(main())", "") + (
        "\ntry: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    assert run(tmp_path, sys.executable, "-c", program, *arguments).returncode == 0
    assert run(tmp_path, sys.executable, "-m", "ajpq", *arguments).stdout
