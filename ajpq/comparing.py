"""The job of `ajpq-compare`: several searches with several seeds on one problem, at equal evaluations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ajpq.console import Screen
from ajpq.errors import AjpqError, closest
from ajpq.files import remove_parts, write_text
from ajpq.loaders import take
from ajpq.policy import CompressionPolicy
from ajpq.preparing import SHARED, TRAINED, Prepared, prepare
from ajpq.problem import SearchBackend
from ajpq.record import RECORD
from ajpq.resume import SEARCH, key_of
from ajpq.snapshot import changed, check_same, fingerprint, keep
from ajpq.study import Run, Study, check_controls, meaning
from ajpq.training import accuracy
from ajpq.trials import POLICY, TUNED, Tuner, is_whole, rows_in, trial, write

SETTINGS = "comparison.yaml"
CONTROLS = ("uniform", "filled_uniform", "random", "hill_climbing", "nsga2", "lp")  # files of conf/search
# Keys that may differ when a comparison goes on; of a checkpoint the weights count.
FREE = frozenset(
    "searches seeds controls finetune reconstruct_images search threads tensorboard onnx onnx_multiple timing resume "
    "checkpoint".split()
)
GIVEN = {"seed": "seeds", "evaluations": "evaluations"}  # keyword of a search -> the key that sets it for all
EXAMPLE = "{name: plain, search: ajpq, start: null}"


@dataclass(frozen=True)
class Entry:
    """One search of a comparison. file: its name in conf/search. plain: its configuration, resolved for seed 0.
    settings: the same for every seed; the only seed is None where nothing depends on it."""

    name: str
    file: str
    plain: Mapping[str, Any]
    settings: Mapping[int | None, Mapping[str, Any]]

    def backend(self, seed: int | None) -> SearchBackend:
        return instantiate(dict(self.settings[seed]), _convert_="all")

    def folder(self, seed: int | None) -> Path:
        return Path(self.name) / ("once" if seed is None else f"seed={seed}")

    def title(self, seed: int | None) -> str:
        return self.name if seed is None else f"{self.name}, seed {seed}"


def run(cfg: DictConfig, folder: Path) -> None:
    """Search with every entry of `cfg.searches` and every seed of `cfg.seeds`, fine-tune what was found, and compare.

    Writes for every run `<name>/seed=<seed>/` (or `<name>/once/`) with evaluations.jsonl, policy.json and result.json,
    and beside them, after every run, evaluations.csv, comparison.json, comparison.md and comparison.png (at the end
    .svg).
    In a folder where some of that is there it goes on: runs that are whole are not repeated, and one that was
    interrupted continues after its last evaluation. Searches, seeds, controls and fine-tuning may be others then.

    With fine-tuning, the best policy of every run is fine-tuned with the seed of its run, that of a search without a
    seed with every seed; the same policy is fine-tuned once per seed. The test split is read after that, at the end.
    Raises AjpqError, before anything is spent, for bad settings and for a folder made with others.
    """
    screen = Screen()
    entries = entries_of(cfg)
    controls = _controls(cfg, entries)
    for entry in entries:
        entry.backend(next(iter(entry.settings)))  # its errors come before anything is spent
    job = _prepared(cfg, entries, folder, screen)
    plan: Plan = {
        (entry.name, seed): entry for seed in [None, *cfg.seeds] for entry in entries if seed in entry.settings
    }
    tests: dict[tuple[str, int | None], dict[int, float]] = {}
    original = {"search": accuracy(job.model, take(job.data.search, cfg.search_images), job.problem.task)}

    def report() -> None:
        runs = [
            Run(entry.name, seed, rows_in(folder / entry.folder(seed)), tests.get((entry.name, seed), {}))
            for entry in entries
            for seed in entry.settings
            if is_whole(folder / entry.folder(seed))
        ]
        study = Study(runs, controls, job.problem.budget.limits, meaning(job.problem.reward), cfg.evaluations)
        write(study, len(plan), original, folder)

    try:
        _search(cfg, job, plan, folder, screen, report)
        if job.finetune["epochs"]:
            fresh = partial(instantiate, cfg.data, _convert_="all")
            tuner = Tuner(job, folder, fresh, screen)
            for (name, own), entry in plan.items():
                if not (folder / entry.folder(own) / POLICY).is_file():
                    continue
                policy = CompressionPolicy.from_json((folder / entry.folder(own) / POLICY).read_text())
                seeds = cfg.seeds if own is None else [own]
                tests[name, own] = {seed: tuner.test(policy, seed, f"{name}, seed {seed}") for seed in seeds}
            original["test"] = accuracy(job.model, job.data.test, job.problem.task)
    except KeyboardInterrupt:
        screen.say(f"to go on, add hydra.run.dir={folder} to the same command")
        raise
    report()
    screen.say((folder / "comparison.md").read_text())
    screen.say(f"written to {folder}")


Plan = Mapping[tuple[str, int | None], Entry]  # (name, seed) of every run


def _search(
    cfg: DictConfig, job: Prepared, plan: Plan, folder: Path, screen: Screen, report: Callable[[], None]
) -> None:
    """Every run of a plan that is not whole yet."""
    try:
        for (_, seed), entry in plan.items():
            place = folder / entry.folder(seed)
            if not is_whole(place):
                backend, title = entry.backend(seed), entry.title(seed)
                trial(place, job.problem.again(), backend, cfg.evaluations, seed or 0, title, screen, cfg.tensorboard)
                report()
    finally:
        job.problem.close()


# -- settings ---------------------------------------------------------------------------------------------------------


def entries_of(cfg: DictConfig) -> list[Entry]:
    """From `cfg.searches`: names of files in conf/search, or mappings {name: label, search: file, keyword: value, ...}.

    Every seed sets `seed` in the configuration of a search, and what refers to it. Raises AjpqError.
    """
    for key, example in (("searches", "[ajpq,random]"), ("seeds", "[0,1,2]")):
        if not OmegaConf.is_list(cfg[key]) or not cfg[key]:
            raise AjpqError(f"{key} must be a list of at least one, but it is {cfg[key]}; write {key}={example}")
    seeds, most = list(cfg.seeds), cfg.evaluations
    if len(set(seeds)) < len(seeds) or not all(_whole(seed) and seed >= 0 for seed in seeds):
        raise AjpqError(f"seeds must be whole numbers from 0, each once, but they are {seeds}; write seeds=[0,1,2]")
    if not _whole(most) or most < 1:
        raise AjpqError(f"evaluations must be at least 1, but it is {most!r}; write evaluations=100")
    for text in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        if key_of(text).split(".")[0] in ("search", "control"):
            raise AjpqError(
                f"the searches of a comparison, its controls among them, are in `searches`, but `{text}` sets another; "
                "write searches=[...]"
            )
    entries: list[Entry] = []
    for said in OmegaConf.to_container(cfg.searches):
        entry = _entry(cfg, said, seeds)
        if entry.name in [other.name for other in entries]:
            raise AjpqError(f"every search must have a name of its own, but two are {entry.name!r}; write {EXAMPLE}")
        entries.append(entry)
    return entries


def _entry(cfg: DictConfig, said: Any, seeds: Sequence[int]) -> Entry:
    options = dict(said) if isinstance(said, Mapping) else {"search": said}
    file = options.pop("search", None)
    if not isinstance(file, str):
        raise AjpqError(f"a search must be a name of conf/search or like {EXAMPLE}, but it is {said}; add search: ...")
    name = str(options.pop("name", file))
    if not re.fullmatch(r"\w[\w.+=-]*", name) or name == TUNED:
        raise AjpqError(
            f"the name of a search must be letters, digits and ._+=-, and not {TUNED}, as it is a folder, but it is "
            f"{name!r}; write {EXAMPLE}"
        )
    for keyword in options.keys() & GIVEN:
        raise AjpqError(
            f"{keyword} must be the same for all searches, but {name!r} sets {options[keyword]}; leave it out and set "
            f"{GIVEN[keyword]}"
        )
    try:
        base = compose("config", [f"search={file}"]).search
    except MissingConfigException as error:
        known = sorted(error.options or ())
        raise AjpqError(
            f"a search must be one of {', '.join(known)}, but there is no {file!r}{closest(file, known)}"
        ) from error
    base = OmegaConf.create(OmegaConf.to_container(base))
    tree = OmegaConf.create(OmegaConf.to_container(cfg))

    def resolved(seed: int) -> dict[str, Any]:
        tree.seed, tree.search = seed, OmegaConf.merge(base, options)
        for key, value in {"seed": seed, "evaluations": cfg.evaluations}.items():
            if key in tree.search:
                tree.search[key] = value
        try:
            return OmegaConf.to_container(tree.search, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = str(error.full_key).removeprefix("search.")
            raise AjpqError(
                f"search {name!r} must have a value for {key}, but has none; write {{search: {file}, {key}: ...}}"
            ) from error

    plain = resolved(0)
    if plain == resolved(1):
        return Entry(name, file, plain, {None: plain})
    return Entry(name, file, plain, {seed: resolved(seed) for seed in seeds})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _controls(cfg: DictConfig, entries: Sequence[Entry]) -> list[str]:
    if cfg.controls is None:
        return [entry.name for control in CONTROLS for entry in entries if entry.file == control]
    if not OmegaConf.is_list(cfg.controls):
        raise AjpqError(f"controls must be a list, but it is {cfg.controls}; write controls=[uniform,random]")
    check_controls(list(cfg.controls), [entry.name for entry in entries])
    return list(cfg.controls)


def _prepared(cfg: DictConfig, entries: Sequence[Entry], folder: Path, screen: Screen) -> Prepared:
    """The problem, in a folder that is new or was made with the same settings."""
    path = folder / SETTINGS
    new = not path.is_file()
    if new and any((folder / name).exists() for name in (TRAINED, SHARED, RECORD)):
        raise AjpqError(
            f"a comparison must have a folder of its own, but {folder} holds another run; choose another hydra.run.dir"
        )
    remove_parts(folder)
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(_same_settings(cfg, entries, path))))
    try:
        job = prepare(cfg, folder, screen)
        now = fingerprint({"search_images": cfg.search_images}, job, None)
    except Exception:
        if new and not any((folder / name).exists() for name in (TRAINED, SHARED)):
            path.unlink()  # a command that did nothing leaves nothing
        raise
    if (folder / SEARCH).is_file():
        check_same(now, folder)
    else:
        keep(now, folder)
    return job


def _same_settings(cfg: DictConfig, entries: Sequence[Entry], path: Path) -> dict[str, Any]:
    """All that the evaluations depend on, with what an earlier comparison had besides. Raises AjpqError, naming the
    first difference, where it was made with other settings."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    ours = {key: value for key, value in plain.items() if key not in FREE}
    ours["search"] = {entry.name: {"file": entry.file, **entry.plain} for entry in entries}
    if not path.is_file():
        return ours
    theirs = OmegaConf.to_container(OmegaConf.load(path))
    begun = {name: found for name, found in theirs["search"].items() if (path.parent / name).is_dir()}
    theirs["search"], ours["search"] = {**ours["search"], **begun}, {**begun, **ours["search"]}
    if change := changed(theirs, ours, f" in {path.parent}"):
        raise AjpqError(
            f"a comparison can go on only with its own settings, but {change}; set it back or choose another "
            "hydra.run.dir"
        )
    return ours
