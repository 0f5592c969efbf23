"""The commands `ajpq`, `ajpq-compare`, `ajpq-variance` and `ajpq-profile`: Hydra applications over the configuration in
the folder `conf` beside this package.

`main()` finds the three sibling folders, runs the job, and turns every error that the user can mend into one sentence
on stderr with exit status 2. Ctrl-C ends with status 130. Any other error is a bug and keeps its traceback;
AJPQ_DEBUG=1 (or Hydra's HYDRA_FULL_ERROR=1) shows the traceback of every error.

A job may run in a process that a launcher of Hydra starts, here or on another machine: `Task` is what is sent there.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ajpq.errors import AjpqError
from ajpq.explain import CONF, explain, first_bad_override
from ajpq.keywords import check_targets
from ajpq.launched import check_alone
from ajpq.lock import locked
from ajpq.resume import continued, folder_of, is_finished, key_of

HOME = CONF.parent
BAD_INPUT, INTERRUPTED = 2, 130
DEBUG = any(os.environ.get(name) == "1" for name in ("AJPQ_DEBUG", "HYDRA_FULL_ERROR"))

_folder: Path | None = None


def compare() -> int:
    """The command `ajpq-compare`."""
    return main("compare", "ajpq.comparing")


def variance() -> int:
    """The command `ajpq-variance`."""
    return main("variance", "ajpq.varying")


def profile() -> int:
    """The command `ajpq-profile`."""
    return main("profile", "ajpq.profiling")


def main(config: str = "config", module: str = "ajpq.pipeline") -> int:
    """Run the command on `sys.argv`; returns or exits with 0, 2 (bad input) or 130 (interrupted).

    config: the name of its configuration; module: has the job, `run(cfg, folder)`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors over instead of printing them
    _wait_without_spinning()
    command, name = _command_line(config), "ajpq" if config == "config" else f"ajpq-{config}"
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        check_siblings()
        check_alone(name)
        if folder_of(command.overrides):
            if command.multirun or config != "config":
                raise AjpqError(
                    "resume continues one run of `ajpq`, not a sweep or a comparison; leave it out: a comparison goes "
                    "on with hydra.run.dir=FOLDER"
                )
            flags = [text for text in sys.argv[1:] if text not in command.overrides]
            again = continued(command.overrides)
            if is_finished(folder_of(command.overrides)):
                if others := [text for text in command.overrides if key_of(text) != "resume"]:
                    raise AjpqError(
                        f"a finished run takes no settings, but {folder_of(command.overrides)} has its report and "
                        f"{' '.join(others)} would change it; start a new run, search=policy with its policy.json "
                        "fine-tunes anew"
                    )
                sys.stdout.write(f"the run in {folder_of(command.overrides)} is finished; its report is there\n")
                return 0
            command.overrides = again
            sys.argv[1:] = [*command.overrides, *flags]
        if command.multirun:
            check_sweep(command)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(Task(name, module))()
        return 0
    except KeyboardInterrupt:
        place = _folder or ("the folder of the sweep" if command.multirun else None)
        kept = f"what was finished is kept in {place}" if place else "before anything was written"
        sys.stderr.write(f"\n{name}: interrupted: {kept}\n")
        return INTERRUPTED
    except Exception as error:
        return _report(error, command, name)


def check_siblings() -> None:
    """Raise AjpqError unless `envs`, `agents` and `conf` are the folders beside this package, not foreign ones."""
    for name in ("envs", "agents"):
        ours = HOME / name
        spec = importlib.util.find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if found[:1] != [ours]:
            other = found[0] if found else (spec.origin if spec else "nowhere")
            raise AjpqError(
                f"the package `{name}` must be {ours}, but Python finds it at {other}; rename or uninstall the other "
                "one, or install ajpq in a virtual environment of its own"
            )
    if not (CONF / "config.yaml").is_file():
        raise AjpqError(f"the configuration must be {CONF / 'config.yaml'}, but there is no such file; reinstall ajpq")


def check_sweep(command: argparse.Namespace) -> None:
    """Compose every value of a sweep once, as Hydra does so only after it has written the folder of the sweep."""
    found = first_bad_override(command)
    if found is not None:
        raise found[1]


class Task:
    """One job of the command `name`. Pickled by a launcher, it becomes a job in a process like that of the command: see
    `_arrive`."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def __call__(self, cfg: DictConfig) -> None:
        _job(self.name, self.module, cfg)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (os.getcwd(), tuple(sys.path), DEBUG, self.name, self.module)


def _arrive(folder: str, path: tuple[str, ...], debug: bool, name: str, module: str) -> Callable[[DictConfig], None]:
    """The job for a process of a launcher, which gets the current folder and the module search path of the command."""
    os.chdir(folder)
    sys.path[:] = dict.fromkeys((*path, *sys.path))
    _wait_without_spinning()
    return partial(_captured_job, debug, name, module)


def _captured_job(debug: bool, name: str, module: str, cfg: DictConfig) -> None:
    """Run the job with its output in the file <name of the job>.out, and raise only what arrives whole when pickled.

    That is AjpqError with the sentence, or RuntimeError with the traceback as its text.
    """
    context = HydraConfig.get()
    with (Path(context.runtime.output_dir) / f"{context.job.name}.out").open("a") as out, redirect_stdout(out):
        try:
            _job(name, module, cfg)
        except AjpqError:
            if debug:
                traceback.print_exc()
            raise
        except Exception:
            raise RuntimeError(f"a job of the sweep failed with\n{traceback.format_exc()}") from None


def _job(name: str, module: str, cfg: DictConfig) -> None:
    global _folder
    context = HydraConfig.get()
    folder, ours = Path(context.runtime.output_dir), False
    try:
        with locked(folder):
            ours, _folder = True, folder
            check_targets(OmegaConf.to_container(cfg))
            importlib.import_module(module).run(cfg, folder)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if ours:
            _discard(folder, context.output_subdir, context.job.name)
        if context.mode == RunMode.MULTIRUN:
            raise AjpqError(sentence) from error
        if DEBUG:
            raise
        sys.stderr.write(f"{name}: error: {sentence}\n")
        sys.exit(BAD_INPUT)


def _wait_without_spinning() -> None:
    # Threads that spin while they wait make training three times slower and more as soon as another job wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _command_line(config: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default=config)
    command = parser.parse_known_intermixed_args()[0]
    command.overrides = [text for text in command.overrides if "=" in text or text.startswith("~")]
    return command


def _report(error: Exception, command: argparse.Namespace, name: str) -> int:
    sentence = explain(error, command) or _unwritable(error)
    if sentence is None:
        raise error
    if DEBUG:
        traceback.print_exception(error)
    sys.stderr.write(f"{name}: error: {sentence}\n")
    return BAD_INPUT


def _unwritable(error: Exception) -> str | None:
    """The sentence for what keeps Hydra from making the folder of a run, or its log there, before the job begins."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if _folder is not None or not isinstance(cause, OSError) or cause.filename is None:
        return None
    return (
        f"the folder of a run must be one that can be made and written to, but {cause.filename} cannot "
        f"({cause.strerror}); choose another hydra.run.dir"
    )


def _discard(folder: Path, subfolder: str | None, name: str) -> None:
    """Remove what was written into `folder` before a job that then wrote nothing, and the folders left empty by it."""
    written = [path for path in folder.rglob("*") if path.is_file()]
    ours = {folder / f"{name}.log", folder / f"{name}.out", *((folder / subfolder).rglob("*") if subfolder else ())}
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents) or not ours.issuperset(written):
        return
    for path in written:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # another job of the sweep may fill or remove the folder above at the same time
        for empty in ([folder / subfolder] if subfolder else []) + [folder, *folder.parents]:
            if empty.is_dir() and (any(empty.iterdir()) or Path.cwd() not in empty.resolve().parents):
                break
            if empty.is_dir():
                empty.rmdir()
