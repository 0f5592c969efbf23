"""The shape of the house: direction of imports, the wheel and the guards of the command."""

import ast
import os
import re
import shutil
import site
import sys
from pathlib import Path

import pytest
import yaml
from command import ROOT, ajpq, one_sentence, run

PACKAGES = ("ajpq", "envs", "agents")
ALLOWED = {
    "ajpq/cli.py": {"hydra", "omegaconf"},
    "ajpq/explain.py": {"hydra", "omegaconf"},
    "ajpq/__main__.py": {"hydra", "omegaconf"},
    "ajpq/pipeline.py": {"hydra", "omegaconf"},
    "ajpq/preparing.py": {"hydra", "omegaconf"},
    "ajpq/comparing.py": {"hydra", "omegaconf"},
    "ajpq/varying.py": {"hydra", "omegaconf"},
    "ajpq/profiling.py": {"hydra", "omegaconf"},
    "ajpq/resume.py": {"omegaconf"},
    "ajpq/testing/environments.py": {"gymnasium", "stable_baselines3"},
}
FORBIDDEN = {
    "ajpq": {"envs", "agents", "gymnasium", "stable_baselines3", "hydra", "omegaconf"},
    "envs": {"agents", "stable_baselines3", "hydra", "omegaconf"},
    "agents": {"hydra", "omegaconf"},
}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, functions included; relative ones as names of our packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_in_one_direction(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    forbidden = FORBIDDEN[name.split("/")[0]] - ALLOWED.get(name, set())
    assert not {module for module in imported(path) if module.split(".")[0] in forbidden}
    if name == "ajpq/pipeline.py":
        of_hydra = {module for module in imported(path) if module.split(".")[0] == "hydra"}
        assert of_hydra <= {"hydra.utils.instantiate", "hydra.utils", "hydra.errors"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [f"line {call.lineno}" for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_no_file_names_a_package_index() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout to know which files are tracked")
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    host = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "index-" + "url"]))
    texts = {name: (ROOT / name).read_bytes().decode(errors="ignore") for name in listed if (ROOT / name).is_file()}
    assert "pyproject.toml" in texts
    assert not {name: found[0] for name, text in texts.items() if (found := host.search(text))}


def test_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    source, elsewhere, new = tmp_path / "source", tmp_path / "elsewhere", tmp_path / "venv"
    for package in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    built = run(tmp_path, *pip, *wheel, path="")
    assert built.returncode == 0, built.stdout + built.stderr

    assert run(tmp_path, sys.executable, "-m", "venv", "--without-pip", str(new), path="").returncode == 0
    python = new / "bin" / "python"
    (wheel_file,) = tmp_path.glob("ajpq-*.whl")
    install = ["--python", str(python), "install", "--no-index", "--no-deps", str(wheel_file)]
    installed = run(tmp_path, *pip, *install, path="")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (packages,) = new.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files are not read: the editable install stays out.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))

    (elsewhere / "conf").mkdir(parents=True)
    (elsewhere / "conf" / "config.yaml").write_text("decoy: true\n")
    (elsewhere / "my_net.py").write_text("raise RuntimeError('imported without being asked for')\n")
    where = run(elsewhere, str(python), "-c", "import ajpq.cli; raise SystemExit(ajpq.cli.__file__)", path="")
    assert Path(where.stderr.strip()).is_relative_to(packages), where.stderr
    shown = run(elsewhere, str(new / "bin" / "ajpq"), "--cfg", "job", path="")
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout) == yaml.safe_load(ajpq(elsewhere, "--cfg", "job").stdout)
    assert {"seed"} <= yaml.safe_load(shown.stdout).keys()
    assert run(elsewhere, str(new / "bin" / "ajpq"), "--help", path="").returncode == 0
    every = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert every == {path.relative_to(packages).as_posix() for path in (packages / "conf").rglob("*.yaml")}


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_foreign_package_is_named(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    sentence = one_sentence(ajpq(tmp_path, "--cfg", "job", path=os.pathsep.join([str(tmp_path), str(ROOT)])))
    assert str(foreign) in sentence and str(ROOT / name) in sentence


def test_folder_of_the_user_never_shadows_ours(tmp_path: Path) -> None:
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise RuntimeError('foreign')\n")
    program = "import sys; sys.path.pop(0); import ajpq.cli as cli; sys.exit(cli.main())"
    assert run(tmp_path, sys.executable, "-c", program, "--cfg", "job").returncode == 0
