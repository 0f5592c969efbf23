"""`resume=FOLDER` on the command line: the run that was killed there goes on, with its own settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ajpq.errors import AjpqError

SEARCH, REPORT = "search.json", "report.json"
# keys and groups that cannot change a search
FREE = frozenset("threads tensorboard onnx onnx_multiple reconstruct_images timing resume finetune hydra".split())


def key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].strip()


def is_free(key: str) -> bool:
    return key.replace("/", ".").split(".")[0] in FREE


def folder_of(overrides: Sequence[str]) -> Path | None:
    """The folder that `resume=` names; None without it, or where it is null."""
    said = [text.partition("=")[2] for text in overrides if key_of(text) == "resume"]
    return Path(said[-1].strip("'\"")) if said and said[-1] != "null" else None


def continued(overrides: Sequence[str]) -> list[str]:
    """The overrides of the run in the folder that `resume=` names, then the new ones, and that folder to run in.

    Raises AjpqError for a folder without a run, for a new override that may change the search, and for
    `hydra.run.dir`.
    """
    folder = folder_of(overrides)
    assert folder is not None
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise AjpqError(f"resume must name the folder of an earlier run, but {folder} {what}; see hydra.run.dir")
    earlier = [text for text in _overrides(folder) if key_of(text) not in ("resume", "hydra.run.dir")]
    known = {key_of(text): text for text in earlier}
    ours = [text for text in overrides if key_of(text) != "resume"]
    for text in ours:
        key = key_of(text)
        if key == "hydra.run.dir":
            raise AjpqError(f"a resumed run goes on in its own folder, but `{text}` names one; leave it out")
        value = text.partition("=")[2]
        then = known[key].partition("=")[2] if key in known else _setting(folder, key)
        if not is_free(key) and then != value:
            raise AjpqError(
                f"a run can be resumed only with its own settings, but {key} was {then} in {folder} and is {value} "
                "now; leave it out or start a new run"
            )
    again = {key_of(text) for text in ours}
    kept = [text for text in earlier if key_of(text) not in again]
    return [*kept, *ours, f"resume={_quoted(folder)}", f"hydra.run.dir={_quoted(folder)}"]


def is_finished(folder: Path) -> bool:
    return (folder / REPORT).is_file()


def _overrides(folder: Path) -> list[str]:
    """What the search was started with; a later command may have overwritten Hydra's own list."""
    if (folder / SEARCH).is_file():
        try:
            found = json.loads((folder / SEARCH).read_text())["overrides"]
        except (ValueError, KeyError, TypeError) as error:
            raise AjpqError(f"{folder / SEARCH} must be as ajpq wrote it, but it is not; start a new run") from error
        if found is not None:
            return found
    return overrides_in(folder) or []


def overrides_in(folder: Path) -> list[str] | None:
    """Of the last command that ran in a folder; None where none did."""
    path = folder / ".hydra" / "overrides.yaml"
    return [str(text) for text in OmegaConf.load(path)] if path.is_file() else None


def _setting(folder: Path, key: str) -> str:
    """The value that a key, or the choice that a group, had in an earlier run."""
    own = folder / ".hydra"
    choices = OmegaConf.select(OmegaConf.load(own / "hydra.yaml"), "hydra.runtime.choices") or {}
    value = choices[key] if key in choices else OmegaConf.select(OmegaConf.load(own / "config.yaml"), key)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
