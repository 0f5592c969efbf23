"""Quantization-aware fine-tuning: the compressed network learns to live with its widths, then becomes final."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from itertools import islice
from typing import Any

from torch import Tensor, fx, nn

from ajpq.compression import freeze
from ajpq.errors import AjpqError
from ajpq.features import Features
from ajpq.frozen_norms import FrozenNorms
from ajpq.loaders import Batches, Beside
from ajpq.lowering import Lowering
from ajpq.outputs import quantize_outputs
from ajpq.pact import use_pact
from ajpq.parallel import draw_alike, spread
from ajpq.recipe import check_settings
from ajpq.training import fit, recalibrate


def finetune(
    student: fx.GraphModule,
    train: Batches,
    *,
    epochs: int = 10,
    lr: float = 0.02,
    teacher: nn.Module | None = None,
    lowering: float = 0.0,
    lift: int = 2,
    activations: str = "lsq",
    features: float = 0.0,
    kept: Mapping[str, Tensor] | None = None,
    unlabelled: Batches | None = None,
    norm_batches: int = 100,
    frozen_norms: float = 0.0,
    on_epoch: Callable[[int, dict], None] | None = None,
    also: Mapping[str, Any] | None = None,
    seed: int = 0,
    **training,
) -> fx.GraphModule:
    """Train `student` (from `compress`) in place, straight-through, and return the finished network, a new module.

    Where its inputs are quantized, the student first gets the 8-bit quantizers of `outputs.quantize_outputs`.

    train: batches (x, y), augmented or not.
    teacher: the uncompressed network, for distillation.
    lowering: the fraction of all steps in which kernels come down to their widths from up to `lift` bits more, see
        `Lowering`; 0: they have their widths from the start.
    activations: how their quantizers learn, "lsq" (step sizes) or "pact" (clipping values).
    features: the weight of their distillation, see `Features`; above 0 it needs a teacher and `kept`, from
        `features.survivors`.
    unlabelled: further images; at every step what the teacher makes of a batch of these is learned, too, with the same
        weights. Batch-norms normalise such a batch by itself, and keep nothing of it.
    norm_batches: batch-norms are re-estimated on so many batches before the first and after the last step; 0: never,
        they have the running statistics of training.
    frozen_norms: the fraction of all steps, the last ones, in which their statistics are fixed, see `FrozenNorms`; they
        are re-estimated before these steps then, not after. 1 with norm_batches=0: as the student came with them.
    also: plain data on what the student came from, that a checkpoint must agree with.
    training: further keywords of `training.fit`. epochs=0 only re-estimates and finishes.

    After an interrupt the student has its final widths. Raises AjpqError as `fit` does.
    """
    check_settings(
        epochs=epochs, lr=lr, lowering=lowering, lift=lift, activations=activations, features=features,
        distillation=teacher is not None, norm_batches=norm_batches, frozen_norms=frozen_norms, **training,
    )  # fmt: skip
    if unlabelled is not None and epochs and teacher is None:
        raise AjpqError(
            "of images without labels what the original makes of them is learned, but unlabelled= is given and "
            "teacher= is not; give both or neither"
        )
    draw_alike()
    batches = train if unlabelled is None else Beside(train, unlabelled)
    more = len(unlabelled) if isinstance(unlabelled, Sized) else unlabelled is not None
    ours = {"lowering": lowering, "lift": lift, "activations": activations, "norm_batches": norm_batches,
            "frozen_norms": frozen_norms, "unlabelled batches": more}  # fmt: skip
    inner = None
    if features and epochs:
        if not kept:
            raise AjpqError(
                f"features are distilled on channels that survive, but {features=} and kept= is missing; give "
                "kept=ajpq.features.survivors(network, policy) or use features=0"
            )
        inner = Features(student, teacher, kept, features)
    if activations == "pact":
        use_pact(student)
    if norm_batches:
        recalibrate(student, islice(train, norm_batches))
    quantize_outputs(student, next(iter(train))[0])
    if epochs:
        lower = Lowering(student, lowering, lift) if lowering else None
        frozen = FrozenNorms(student, frozen_norms, train, norm_batches) if frozen_norms else None
        changes = [change for change in (lower, frozen) if change is not None]
        try:
            fit(
                student, batches, epochs=epochs, lr=lr, teacher=teacher, features=inner, on_epoch=on_epoch, seed=seed,
                also={**ours, **(also or {})},
                change=lambda *at: [anew for change in changes for anew in change(*at)], **training,
            )  # fmt: skip
        finally:
            if lower is not None:
                lower.finish()
        if norm_batches and not frozen_norms:
            recalibrate(student, islice(train, norm_batches))
        spread(student)
    return freeze(student)
