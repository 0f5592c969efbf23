"""One sentence for every error of the configuration: what was asked for, the rule, and what was probably meant.

Part of the command line, and with `ajpq.cli` the only part of the package that knows Hydra's errors.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from ajpq.errors import AjpqError, closest

CONF = Path(__file__).resolve().parent.parent / "conf"
# Configuration that a plugin brings -> the extra that installs the plugin.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/launcher/ray": "ray-launcher",
}
LAUNCHERS = {"joblib", "submitit", "ray"}
_LOGS = re.compile(r"\n-{3}|\ntraceback")  # what launchers put between their own words and what a process wrote


def explain(error: BaseException, command: argparse.Namespace | None = None) -> str | None:
    """The sentence for an error that the user can mend; None for one that is a bug and deserves its traceback.

    `command`: the command line, searched for the override that the configuration does not take.
    """
    cause = error.__cause__
    if isinstance(error, AjpqError):
        return str(error)
    if isinstance(error, InstantiationException):
        if cause is None or isinstance(cause, AjpqError) or _raised_in(cause) == "hydra":
            return _explain_target(error)
        return None
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` must have a value, but has none; add `{error.full_key}=...` to the command"
    if isinstance(error, ConfigCompositionException | OverrideParseException):
        return _explain_override(error, command)
    if isinstance(error, CompactHydraException | InterpolationResolutionError) or (
        isinstance(error, ValueError | TypeError) and _raised_in(error) == "hydra"
    ):
        return _flat(error)
    if {type(error).__module__.split(".")[0], _raised_in(error)} & LAUNCHERS:
        return (
            "the launcher must be able to start every job of the sweep and to wait for its end, but "
            f"{type(error).__name__}: {_flat(_LOGS.split(str(error))[0])}; AJPQ_DEBUG=1 shows all of it"
        )
    return None


def _explain_target(error: InstantiationException) -> str:
    cause = error.__cause__
    if isinstance(cause, AjpqError):
        return str(cause)
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"target '([^']+)'", str(error))
    where = f"{key[1] + '.' if key else ''}_target_={target[1] if target else '...'}"
    if isinstance(cause, TypeError):
        return f"the keywords beside `{where}` must be those of its constructor, but {_flat(cause)}"
    if cause is None:
        return _flat(error)
    reason = cause.__cause__ or cause
    parent, _, name = target[1].rpartition(".") if target else ("", "", "")
    if parent in sys.modules and (isinstance(reason, AttributeError) or getattr(reason, "name", "") == target[1]):
        return f"`{where}` must be found in `{parent}`, which has no `{name}`{closest(name, dir(sys.modules[parent]))}"
    return (
        f"`{where}` must name something that can be imported, but {type(reason).__name__}: {_flat(reason)}; install "
        f"it, or put its file into {Path.cwd()}"
    )


def _explain_override(error: Exception, command: argparse.Namespace | None) -> str:
    if isinstance(error, OverrideParseException):
        fault = _flat(error).split(" See https")[0]
        return f"`{error.override}` must be written as key=value, but {fault}; quote a value with special characters"
    found = first_bad_override(command) if command else None
    if found is None:
        return _flat(error, error.__cause__)
    override, error, cfg = found
    key, _, value = override.lstrip("+~").partition("=")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in EXTRAS:
        return (
            f"`{override}` needs a plugin of Hydra that is not installed; install the extra that brings it, "
            f"`pip install 'ajpq[{EXTRAS[error.missing_cfg_file]}]'`"
        )
    if isinstance(error, MissingConfigException) and error.options:
        return (
            f"`{override}` must choose one of {', '.join(sorted(error.options))}, but there is no file "
            f"`{error.missing_cfg_file}.yaml`{closest(value, list(error.options), key + '=')}"
        )
    if "Could not override" not in str(error) and "Could not delete" not in str(error):
        return f"`{override}` must fit the configuration, but {_flat(error, error.__cause__)}"
    keys = [name for name in _keys(cfg) if key.startswith("hydra") or not name.startswith("hydra")]
    return (
        f"`{override}` must name a key or group of the configuration, but there is no `{key}`"
        f"{closest(key, keys)} (`ajpq --cfg job` shows all of them)"
    )


def first_bad_override(command: argparse.Namespace) -> tuple[str, Exception, DictConfig] | None:
    """The first override that does not compose, its error, and the configuration made of the good ones before it.

    Choices of groups go first, as they decide which keys there are; each value of a sweep is tried. None if all
    compose, or if the configuration is a foreign one or does not compose without any.
    """
    good = [f"hydra.searchpath=[file://{Path(command.config_dir).resolve()}]"] if command.config_dir else []
    if command.config_path:
        return None
    with hydra.initialize_config_dir(str(CONF), job_name="ajpq", version_base="1.3"):
        try:
            cfg = hydra.compose(command.config_name, good, return_hydra_config=True)
        except Exception:
            return None
        for override in sorted(command.overrides, key=lambda text: "." in text.partition("=")[0]):
            shown = override
            try:
                alternatives = _alternatives(override)
                for shown in alternatives:
                    hydra.compose(command.config_name, [*good, shown])
                good += alternatives[:1]
                cfg = hydra.compose(command.config_name, good, return_hydra_config=True)
            except Exception as error:
                return shown, error, cfg
    return None


def _alternatives(override: str) -> list[str]:
    parsed = OverridesParser.create().parse_overrides([override])[0]
    if parsed.is_sweep_override() and parsed.is_discrete_sweep():
        return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]
    return [] if parsed.is_sweep_override() else [override]


def _keys(cfg: DictConfig) -> Iterator[str]:
    yield from (str(group) for group in cfg.hydra.runtime.choices)
    yield from (path.name for path in CONF.iterdir() if path.is_dir())

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for name, child in node.items() if isinstance(node, dict) else ():
            yield prefix + str(name)
            yield from walk(child, f"{prefix}{name}.")

    yield from walk(OmegaConf.to_container(cfg, resolve=False), "")


def _raised_in(error: BaseException) -> str:
    """The package of the innermost Python frame; `hydra`, say, for a call that could not even begin."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] if frames else ""


def _flat(*errors: object) -> str:
    return ": ".join(" ".join(str(error).split()) for error in errors if error and str(error)).rstrip(".")
