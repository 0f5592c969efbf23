"""Weights from and to disk, checked before a single one of the model's tensors is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ajpq.errors import AjpqError
from ajpq.files import replacing

TORCH_SUFFIXES = (".pt", ".pth", ".th")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a `.safetensors`, `.pt`, `.pth` or `.th` file into `model`, all or none of them.

    A torch file is read with `weights_only=True`; training scripts may have wrapped its tensors, in {"state_dict": ...}
    or another of `WRAPPERS`. A `module.` prefix on every key is dropped, and batch-norm counters
    (`num_batches_tracked`) may be missing. Raises AjpqError, with the model untouched, for a file that is missing, of
    another kind or unreadable, for missing or unexpected keys, wrong shapes, and NaN or infinity.
    """
    path = Path(path)
    given = _read(path)
    own = model.state_dict()
    if all(key.startswith("module.") for key in given) and not any(key.startswith("module.") for key in own):
        given = {key.removeprefix("module."): value for key, value in given.items()}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    for kind, keys in (("lacks", missing), ("has the unexpected", unexpected)):
        if keys:
            names = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise AjpqError(
                f"A checkpoint's keys must be those of the model, but {path} {kind} {names}: "
                "check that both are the same network."
            )
    for key in (key for key in own if key in given):
        value = given[key]
        if not isinstance(own[key], Tensor) or not isinstance(value, Tensor):
            if type(own[key]) is not type(value):
                raise AjpqError(
                    f"Every entry of a checkpoint must be a tensor, but {key} in {path} is "
                    f"{type(value).__name__}: save a state dict."
                )
            continue
        if value.shape != own[key].shape:
            raise AjpqError(
                f"A checkpoint's shapes must be those of the model, but {key} is {tuple(value.shape)} in {path} and "
                f"{tuple(own[key].shape)} in the model: check the model's width and number of classes."
            )
        if not (torch.isfinite(value) & torch.isfinite(value.to(own[key].dtype))).all():
            raise AjpqError(
                f"A checkpoint's values must be finite, but {key} in {path} holds NaN or infinity: "
                "take an earlier checkpoint."
            )
    model.load_state_dict({**own, **given})


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the state dict of `model` as safetensors; the file appears complete or not at all.

    Raises AjpqError unless `path` ends in `.safetensors` inside an existing folder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise AjpqError(f"Weights are written as .safetensors, but the path is {path}: change its ending.")
    if not path.parent.is_dir():
        raise AjpqError(f"Weights are written into an existing folder, but {path.parent} is not one: create it first.")
    # A clone each: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial)


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        raise AjpqError(
            f"A checkpoint must end in .safetensors, .pt, .pth or .th, but the path is {path}: convert or rename it."
        )
    if not path.is_file():
        raise AjpqError(f"A checkpoint must be an existing file, but {path} is not one: check the path.")
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged archive can fail in any way
        reason = (str(error).splitlines() or [""])[0].rstrip(".")[:120]
        raise AjpqError(
            f"A checkpoint must be a complete file of tensors only, but {path} is not ({type(error).__name__}: "
            f"{reason}): "
            "copy it again, or save `model.state_dict()` anew."
        ) from error
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(key, str) for key in loaded):
        raise AjpqError(
            f"A checkpoint must map names to tensors, but {path} holds a {type(loaded).__name__} that does not: "
            "save `model.state_dict()`."
        )
    return loaded
