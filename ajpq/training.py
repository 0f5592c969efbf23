"""Train a network, measure it, and re-estimate its batch-norm statistics: three flat functions over batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ajpq.averaging import Average
from ajpq.errors import AjpqError
from ajpq.features import Features
from ajpq.image_order import mode
from ajpq.loaders import Batches, Beside
from ajpq.objective import Objective, norms_of
from ajpq.optimizer import optimizer_of, rate
from ajpq.parallel import Team, draw_alike, spread
from ajpq.recipe import check_settings
from ajpq.tasks import CLASSIFICATION, Task
from ajpq.training_state import TrainingState


@torch.no_grad()
def measure(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> tuple[dict[str, float], dict]:
    """What the task reports of a split in one pass, fractions: its metrics, and those of every image, float64 (n,) in
    the order of the split. In eval mode; all modes are restored. Raises AjpqError if there is no image."""
    outputs, targets = outputs_of(model, batches, task.metric)
    values = {name: column.numpy() for name, column in task.per_image(outputs, targets).items()}
    return task.metrics(outputs, targets), values


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Batches, metric: str = "metric") -> tuple[Tensor, Tensor]:
    """Outputs (n, ...) and targets (n, ...) of a split, in eval mode; all modes are restored. Raises AjpqError if there
    is no image, which the metric needs."""
    device = device_of(model)
    with mode(model, training=False):
        pairs = [(model(x.to(device)).cpu(), y.cpu()) for x, y, *_ in batches]  # (N, C, H, W), (N, ...)
    if not sum(len(y) for _, y in pairs):
        raise AjpqError(f"The {metric} needs at least one image, but the batches hold none: check the data split.")
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def metrics(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> dict[str, float]:
    """What the task reports of a split, see `measure`."""
    return measure(model, batches, task)[0]


def accuracy(model: nn.Module, batches: Batches, task: Task = CLASSIFICATION) -> float:
    """The metric that the task is judged by, e.g. top-1 accuracy; see `metrics`."""
    return metrics(model, batches, task)[task.metric]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Re-estimate the running statistics of every batch norm as the plain mean over `batches`, all else in eval mode.

    Weights, momenta and modes stay as they were; a model without such statistics is left alone. Raises AjpqError if
    there is no batch; on any error the old statistics are put back.
    """
    norms = norms_of(model)
    if not norms:
        return
    device, seen = device_of(model), 0
    before = [
        (norm, norm.momentum, {name: value.clone() for name, value in norm.named_buffers(recurse=False)})
        for norm in norms
    ]
    with mode(model, training=False):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's cumulative average
                norm.training = True
            for x, *_ in batches:  # (N, C, H, W)
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


def fit(
    model: nn.Module, batches: Batches, *, epochs: int, lr: float, optimizer: str = "sgd", momentum: float = 0.9,
    weight_decay: float = 5e-4, task: Task = CLASSIFICATION, warmup: float = 0.1, teacher: nn.Module | None = None,
    temperature: float = 4.0, distill: float = 0.5, features: Features | None = None, clip_grad: float | None = None,
    scale_lr: float = 1.0, precision: str = "float32", accumulate: int = 1, ema: float | None = None,
    max_skips: int = 10, change: Callable[[int, int], Sequence[Tensor]] | None = None,
    also: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None, on_epoch: Callable[[int, dict], None] | None = None, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Train `model` in place; a row per epoch: epoch, loss, train_accuracy (the task's quality), seconds, lr, skipped.

    batches: (x, y), or, of `Beside`, (x, y, u) with images u of which nothing is known: what the teacher makes of these
        is learned with the weights of what it makes of x.
    optimizer: "sgd", with Nesterov momentum, or "adam", whose steps are as large as the learning rate however small the
        gradient, so that step sizes want a `scale_lr` well below 1; see `ajpq.optimizer`.
    The learning rate rises linearly over the first `warmup` (fraction of all steps) to `lr` and falls to 0 along a
    cosine. Weight decay holds for parameters of two or more dimensions and clipping values; step sizes learn at
    `lr * scale_lr`, without decay, see `ajpq.optimizer`.
    teacher: a frozen network to learn from (Hinton et al. 2015, arXiv 1503.02531), with loss = (1 - distill) * the
        task's loss + distill * its divergence from the teacher's outputs, softened by `temperature`.
    features: of the model and the teacher, whose distance is added to the loss.
    clip_grad: the largest norm of the whole gradient.
    precision: of forward and backward passes, "float32" or "bfloat16" (autocast).
    accumulate: batches per step, as if they were one batch, but for batch-norms and the damping of activation steps
        (LSQ), which see each by itself.
    ema: the model ends as this moving average of its weights, see `Average`; re-estimate batch-norms then.
    max_skips: a step whose loss or gradient is not finite is left out and counted in `skipped`, at most so many in a
        row.
    change: called before step `step` of `steps`, counted from 0; parameters that it returns were set anew, so their
        momentum begins again, and the moving average of all weights.
    checkpoint: a file for the state after every epoch, from which an interrupted training continues where `model`,
        `batches` and settings are the same, and ends with the same bits. The caller removes it.
    also: further settings, plain data, that must be the same for it.
    on_epoch(epoch, row): called after each epoch, counted from 1.
    seed: of torch's global generator while training (dropout, unseeded loaders); it is put back afterwards.
    Under several processes (see `ajpq.parallel`) each learns from its part of every batch, and all step alike: by the
    whole batch, but for what sees each part by itself, as with `accumulate`, and distances of features. Running
    statistics are means over the parts, and `on_epoch` and `checkpoint` are the main process's.
    An interrupt passes through and leaves the model as the last step made it. Raises AjpqError for bad settings, for
    batches without images, for another training's checkpoint, and for too many skipped steps.
    """
    chosen = {
        "epochs": epochs, "lr": lr, "optimizer": optimizer, "momentum": momentum, "warmup": warmup,
        "temperature": temperature, "distill": distill, "clip_grad": clip_grad, "precision": precision,
        "accumulate": accumulate, "ema": ema, "max_skips": max_skips,
    }  # fmt: skip
    check_settings(**chosen)
    if features is not None and teacher is None:
        raise AjpqError("Features can be learned only from a teacher, but there is none: give teacher=.")
    if isinstance(batches, Beside) and teacher is None:
        raise AjpqError("Images without labels can be learned from only with a teacher, but there is none: give one.")
    if epochs == 0:
        return []
    team = Team.of_launched()
    spread(model)
    stepper = optimizer_of(optimizer, model, lr, momentum, weight_decay, scale_lr)
    trainable = [p for group in stepper.param_groups for p in group["params"]]
    device, steps = device_of(model), epochs * math.ceil(count_of(batches) / accumulate)
    objective = Objective(model, task, teacher, distill, temperature, features, precision, device)
    average = None if ema is None else Average(model, ema)
    chosen |= {"weight_decay": weight_decay, "scale_lr": scale_lr, "seed": seed, "steps": steps}
    chosen |= {"teacher": teacher is not None, "features": 0.0 if features is None else features.weight}
    state = TrainingState(model, batches, stepper, average, chosen | dict(also or {}), device)
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with rng, mode(model, training=True), mode(teacher, training=False), features or nullcontext():
        torch.manual_seed(seed)
        rows, skips = ([], 0) if checkpoint is None else state.load(checkpoint)
        step = len(rows) * (steps // epochs)
        for name, value in (("number of steps", steps), ("number of finished epochs", len(rows))):
            team.agree_on(name, value)
        try:
            for epoch in range(len(rows) + 1, epochs + 1):
                began, total, hits, images, skipped, now = time.perf_counter(), 0.0, 0.0, 0, 0, None
                draw_alike()
                for group in _groups(batches, accumulate):
                    now = rate(step, steps, lr, warmup)
                    for parameters in stepper.param_groups:
                        parameters["lr"] = now * parameters["factor"]
                    anew = () if change is None else change(step, steps)
                    for parameter in anew:
                        stepper.state.pop(parameter, None)
                    if anew and average is not None:
                        average.restart()

                    stepper.zero_grad(set_to_none=True)
                    size, mean, right = sum(len(y) for _, y, *_ in group), 0.0, 0.0
                    group = [[team.part(each) for each in batch] for batch in group]
                    share = sum(len(y) for _, y, *_ in group) / size
                    for x, y, *more in group:
                        loss, outputs = objective(x, y, *more)
                        mean += loss.item() * len(y) / size
                        if not math.isfinite(mean):
                            break
                        (loss * (len(y) / size)).backward()
                        right += float(task.quality(outputs.detach(), y.to(device)).sum())
                    mean, right = team.add_up(trainable, model, share, mean, right)
                    found = [p.grad for p in trainable if p.grad is not None]
                    norm = nn.utils.get_total_norm(found) if math.isfinite(mean) else math.nan

                    if math.isfinite(norm):
                        if clip_grad is not None:
                            nn.utils.clip_grads_with_norm_(trainable, clip_grad, norm)
                        stepper.step()
                        if average is not None:
                            average.update()
                        images, total, hits, skips = images + size, total + mean * size, hits + right, 0
                    else:
                        skipped, skips = skipped + 1, skips + 1
                        if skips > max_skips:
                            raise AjpqError(
                                f"The training loss and its gradient must stay finite, or fail for at most {max_skips=}"
                                f" steps in a row, but the loss is {mean} at epoch {epoch}, step {step}, with {lr=}: "
                                "lower lr."
                            )
                        _restart_norms(model)
                    step += 1
                if now is None:
                    raise AjpqError(
                        f"Training needs images in every epoch, but epoch {epoch} has none: "
                        "give batches that can be iterated again."
                    )
                rows.append(
                    {
                        "epoch": epoch,
                        "loss": total / images if images else math.nan,
                        "train_accuracy": hits / images if images else math.nan,
                        "seconds": time.perf_counter() - began,
                        "lr": now,
                        "skipped": skipped,
                    }
                )
                if checkpoint is not None and team.main:
                    state.save(checkpoint, rows, skips)
                if on_epoch is not None and team.main:
                    on_epoch(epoch, rows[-1])
            if average is not None:
                average.apply()
        finally:
            stepper.zero_grad(set_to_none=True)
    return rows


def _groups(batches: Batches, size: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """`size` batches at a time, without what loaders add to images and labels; the last group of an epoch may be
    smaller."""
    length = 3 if isinstance(batches, Beside) else 2
    batches = (batch[:length] for batch in batches)
    while group := list(islice(batches, size)):
        yield group


def _restart_norms(model: nn.Module) -> None:
    """Begin running statistics again that a batch has made useless."""
    for norm in norms_of(model):
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            norm.reset_running_stats()


def device_of(model: nn.Module) -> torch.device:
    """Where its first tensor is; the CPU for a module without any."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def count_of(batches: Batches) -> int:
    """Batches of an epoch."""
    try:
        return len(batches)
    except TypeError:  # a loader over a stream has no length
        return sum(1 for _ in batches)
