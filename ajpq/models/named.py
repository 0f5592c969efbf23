"""Classifiers by name from torchvision and timm, with weights from there or from a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from ajpq.checkpoint import TORCH_SUFFIXES, load_weights
from ajpq.errors import AjpqError
from ajpq.models.residual import check_positive

WITH_AUXILIARY = ("googlenet", "inception_v3")


def torchvision_model(name: str, weights: str | None = None, classes: int | None = None, **settings: Any) -> nn.Module:
    """Any of torchvision's classifiers, as `torchvision.models.list_models(module=torchvision.models)` lists them.

    weights: None = random; DEFAULT or a name like IMAGENET1K_V2 = torchvision's own, fetched once and kept in torch's
    cache; or the path of a file for `ajpq.checkpoint.load_weights`. classes: outputs; None = 1,000. Where torchvision's
    weights are for another number of classes, the last layer stays random. settings: other keywords of torchvision's
    builder. The auxiliary classifiers of GoogLeNet and Inception are left out. Raises AjpqError for an unknown name or
    keyword, and for weights that do not exist, do not fit or cannot be fetched.
    """
    from torchvision import models

    _check_name(name, models.list_models(module=models), "a torchvision classifier", "name")
    entry = None
    if weights is not None and not _is_file(weights):
        offered = models.get_model_weights(name).__members__
        _check_name(weights, offered, f"null, a file or the name of torchvision's weights of {name}", "weights")
        entry = offered[weights]
    if name in WITH_AUXILIARY:
        chosen = {"aux_logits": False, "init_weights": entry is None, "transform_input": entry is not None}
        settings = {**chosen, **settings}
    if classes is not None:
        check_positive(classes=classes)
        settings["num_classes"] = classes
    model = _built(lambda: models.get_model(name, weights=None, **settings), f"torchvision's {name}")
    if entry is not None:
        _copy(_fetched(lambda: entry.get_state_dict(progress=False, check_hash=True), f"{name}'s {weights}"), model)
    elif weights is not None:
        load_weights(model, weights)
    return model


def timm_model(name: str, weights: str | None = None, classes: int | None = None, **settings: Any) -> nn.Module:
    """Any of timm's models, as `timm.list_models()` lists them, a pretrained tag included if wanted
    (resnet50.a1_in1k); needs the extra `timm`.

    weights: None = random; DEFAULT = those of the tag, which timm fetches once; or the path of a file for
    `ajpq.checkpoint.load_weights`. classes: outputs; None = as timm has it, mostly 1,000. settings: other keywords of
    `timm.create_model`. timm's joint modules of batch-norm and activation are taken apart: what is bn1.weight in its
    files, which `weights` reads, is bn1.norm.weight in the model. Raises AjpqError without timm, for an unknown name or
    keyword, and for weights that do not exist, do not fit or cannot be fetched.
    """
    try:
        import timm
    except ImportError as error:
        raise AjpqError(
            f"model=timm needs the package timm, but it cannot be imported ({error}); install ajpq[timm]"
        ) from error
    _check_name(name.partition(".")[0], timm.list_models(), "a timm model", "name")
    fetch = weights is not None and not _is_file(weights)
    if fetch:
        _check_name(weights, ["DEFAULT"], "null, DEFAULT or a file", "weights")
    if classes is not None:
        check_positive(classes=classes)
        settings["num_classes"] = classes

    def build() -> nn.Module:
        return timm.create_model(name, pretrained=fetch, **settings)

    model = _built((lambda: _fetched(build, name)) if fetch else build, f"timm's {name}")
    if weights is not None and not fetch:
        load_weights(model, weights)
    return _plain(model)


def _plain(model: nn.Module) -> nn.Module:
    """torch.nn's modules in place of timm's own, where torch.fx would look into those and find a function: a linear
    layer, and a batch-norm, dropout and activation in one."""
    from timm.layers import BatchNormAct2d, Linear

    for path, module in list(model.named_modules()):
        if type(module) is BatchNormAct2d and path:
            norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
            new = nn.Sequential(OrderedDict(norm=_filled(norm, module), drop=module.drop, act=module.act))
        elif type(module) is Linear and path:
            new = _filled(nn.Linear(module.in_features, module.out_features, module.bias is not None), module)
        else:
            continue
        model.set_submodule(path, new.train(module.training))
    return model


def _filled(module: nn.Module, source: nn.Module) -> nn.Module:
    module._parameters.update({name: source._parameters[name] for name in module._parameters})
    module._buffers.update({name: source._buffers[name] for name in module._buffers})
    return module


def _is_file(weights: str) -> bool:
    return Path(str(weights)).suffix in (".safetensors", *TORCH_SUFFIXES)


def _check_name(name: str, known: Iterable[str], what: str, setting: str) -> None:
    known = list(known)
    if name not in known:
        close = get_close_matches(name, known, 1, cutoff=0) if known else []
        raise AjpqError(
            f"model.{setting} must be {what}, but none is called {name!r}"
            + (f"; the closest is {close[0]}" if close else "")
        )


def _built(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        return build()
    except AjpqError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # what a constructor says of keywords that it does not know
        raise AjpqError(
            f"{what} must be built with keywords that it knows, but: {_line(error)}; change them"
        ) from error


def _fetched(fetch: Callable[[], Any], what: str) -> Any:
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        raise AjpqError(
            f"pretrained weights must be in the cache or be fetched, but {what} cannot be: {_line(error)}; fetch them "
            "on a machine with a connection and give the file as model.weights"
        ) from error


def _copy(state: dict[str, Any], model: nn.Module) -> None:
    """Load all but the auxiliary classifiers, and but the last layer where its size is another."""
    own = model.state_dict()
    last = list(own)[-1].rpartition(".")[0]
    kept = {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    for key in (f"{last}.weight", f"{last}.bias"):
        if key in kept and kept[key].shape != own[key].shape:
            kept[key] = own[key]
    model.load_state_dict(kept)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
