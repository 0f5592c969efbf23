"""Train a network, measure it, and re-estimate its batch-norm statistics: three flat functions over batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ajpq.data import Batches
from ajpq.errors import AjpqError
from ajpq.tasks import CLASSIFICATION, Task


@torch.no_grad()
def metrics(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> dict[str, float]:
    """What the task reports of a split, fractions, in eval mode; all modes are restored. Raises AjpqError if there is
    no image."""
    device = _device(model)
    with _modes(model, training=False):
        pairs = [(model(x.to(device)).cpu(), y.cpu()) for x, y, *_ in batches]  # (N, C, H, W), (N, ...)
    if not sum(len(y) for _, y in pairs):
        raise AjpqError(f"The {task.metric} needs at least one image, but the batches hold none: check the data split.")
    outputs, targets = (torch.cat(column) for column in zip(*pairs, strict=True))
    return task.metrics(outputs, targets)


def accuracy(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> float:
    """The metric that the task is judged by, e.g. top-1 accuracy; see `metrics`."""
    return metrics(model, batches, task)[task.metric]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Re-estimate the running statistics of every batch norm as the plain mean over `batches`, all else in eval mode.

    Weights, momenta and modes stay as they were; a model without such statistics is left alone. Raises AjpqError if
    there is no batch; on any error the old statistics are put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    device, seen = _device(model), 0
    before = [
        (norm, norm.momentum, {name: value.clone() for name, value in norm.named_buffers(recurse=False)})
        for norm in norms
    ]
    with _modes(model, training=False):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's cumulative average
                norm.training = True
            for x, _ in batches:  # (N, C, H, W)
                model(x.to(device))
                seen += 1
            if seen == 0:
                raise AjpqError(
                    "Batch-norm re-estimation needs at least one batch, but there is none: check the calibration split."
                )
        except BaseException:
            for norm, _, buffers in before:
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
            raise
        finally:
            for norm, momentum, _ in before:
                norm.momentum = momentum


def check_settings(
    *, epochs: int = 0, lr: float = 0.1, warmup: float = 0.1, temperature: float = 4.0, distill: float = 0.5,
    clip_grad: float | None = None, **others,
) -> None:  # fmt: skip
    """Raise AjpqError where `fit` would not take these settings; for callers that want to know before they spend
    time.
    """
    rules = {
        "epochs >= 0": epochs >= 0, "0 < lr < inf": 0 < lr < math.inf, "0 <= warmup < 1": 0 <= warmup < 1,
        "temperature > 0": temperature > 0, "0 <= distill <= 1": 0 <= distill <= 1,
        "clip_grad > 0": clip_grad is None or clip_grad > 0,
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            settings = f"{epochs=}, {lr=}, {warmup=}, {temperature=}, {distill=}, {clip_grad=}"
            raise AjpqError(f"`{rule}` must hold for training, but {settings}: change that setting.")


def fit(
    model: nn.Module, batches: Batches, *, epochs: int, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4,
    task: Task = CLASSIFICATION, warmup: float = 0.1, teacher: nn.Module | None = None, temperature: float = 4.0,
    distill: float = 0.5, clip_grad: float | None = None, scale_lr: float = 1.0,
    on_epoch: Callable[[int, dict], None] | None = None, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Train `model` in place by SGD with Nesterov momentum; a row per epoch: epoch, loss, train_accuracy (the task's
    quality), seconds, lr.

    The learning rate rises linearly over the first `warmup` (fraction of all steps) to `lr` and falls to 0 along a
    cosine. Weight decay holds for parameters of two or more dimensions; those whose name ends in "scale" learn at `lr *
    scale_lr`, without decay. teacher: a frozen network to learn from (Hinton et al. 2015, arXiv 1503.02531), with loss
    = (1 - distill) * the task's loss + distill * its divergence from the teacher's outputs, softened by `temperature`.
    clip_grad: the largest norm of the whole gradient. on_epoch(epoch, row): called after each epoch, counted from 1.
    seed: of torch's global generator while training (dropout, unseeded loaders); it is put back afterwards. An
        interrupt passes through and leaves the model as the last step made it. Raises AjpqError for bad settings, for
    batches without images, and when the loss is not finite.
    """
    check_settings(epochs=epochs, lr=lr, warmup=warmup, temperature=temperature, distill=distill, clip_grad=clip_grad)
    if epochs == 0:
        return []
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise AjpqError(
            "Training needs at least one parameter that requires a gradient, but the model has none: "
            "unfreeze it or use epochs=0."
        )
    scales = [p for name, p in trainable if name.endswith("scale")]
    decayed = [p for name, p in trainable if not name.endswith("scale") and p.ndim > 1]
    plain = [p for name, p in trainable if not name.endswith("scale") and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "factor": 1.0},
        {"params": scales, "weight_decay": 0.0, "factor": scale_lr},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=lr, momentum=momentum, nesterov=momentum > 0
    )
    device, steps = _device(model), epochs * _count(batches)
    rise = round(warmup * steps)
    rows, step = [], 0
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, _modes(model, training=True), _modes(teacher, training=False):
        torch.manual_seed(seed)
        try:
            for epoch in range(1, epochs + 1):
                began, total, hits, images = time.perf_counter(), 0.0, 0, 0
                for x, y in batches:
                    x, y = x.to(device), y.to(device)  # (N, C, H, W), (N,)
                    fall = min(max(step - rise, 0) / max(steps - rise, 1), 1.0)
                    now = lr * (step + 1) / rise if step < rise else lr * 0.5 * (1 + math.cos(math.pi * fall))
                    for group in optimizer.param_groups:
                        group["lr"] = now * group["factor"]

                    outputs = model(x)  # (N, ...)
                    loss = task.losses(outputs, y).mean()  # ()
                    if teacher is not None:
                        with torch.no_grad():
                            target = teacher(x)  # (N, ...)
                        loss = (1 - distill) * loss + distill * task.divergences(outputs, target, temperature).mean()
                    if not torch.isfinite(loss):
                        raise AjpqError(
                            f"The training loss must stay finite, but it is {loss.item()} at epoch {epoch}, step "
                            f"{step}, with {lr=}: lower lr."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    if clip_grad is not None:
                        nn.utils.clip_grad_norm_([p for _, p in trainable], clip_grad)
                    optimizer.step()

                    step += 1
                    images += len(y)
                    total += loss.item() * len(y)
                    hits += float(task.quality(outputs.detach(), y).sum())
                if images == 0:
                    raise AjpqError(
                        f"Training needs images in every epoch, but epoch {epoch} has none: "
                        "give batches that can be iterated again."
                    )
                seconds = time.perf_counter() - began
                rows.append(
                    {
                        "epoch": epoch,
                        "loss": total / images,
                        "train_accuracy": hits / images,
                        "seconds": seconds,
                        "lr": now,
                    }
                )
                if on_epoch is not None:
                    on_epoch(epoch, rows[-1])
        finally:
            optimizer.zero_grad(set_to_none=True)
    return rows


@contextmanager
def _modes(model: nn.Module | None, *, training: bool) -> Iterator[None]:
    """Put the whole model into one mode, and every module back into its own afterwards."""
    before = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        if model is not None:
            model.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _count(batches: Batches) -> int:
    try:
        return len(batches)
    except TypeError:  # a loader over a stream has no length
        return sum(1 for _ in batches)
