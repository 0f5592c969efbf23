"""What a training may be told: the rules of the settings of `training.fit` and `finetuning.finetune`."""

from __future__ import annotations

import math

import torch

from ajpq.errors import AjpqError
from ajpq.optimizer import OPTIMIZERS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS = ("lsq", "pact")


def check_settings(
    *, epochs: int = 0, lr: float = 0.1, optimizer: str = "sgd", momentum: float = 0.9, warmup: float = 0.1,
    temperature: float = 4.0, distill: float = 0.5, clip_grad: float | None = None, precision: str = "float32",
    accumulate: int = 1, ema: float | None = None, max_skips: int = 10, lowering: float = 0.0, lift: int = 2,
    activations: str = "lsq", features: float = 0.0, norm_batches: int = 0, frozen_norms: float = 0.0,
    distillation: bool = True, **others,
) -> None:  # fmt: skip
    """Raise AjpqError where `fit` or `finetune` would not take these settings; for callers that want to know before
    they spend time. distillation: whether there is a teacher.
    """
    numbers = {
        "epochs": epochs, "lr": lr, "momentum": momentum, "warmup": warmup, "temperature": temperature,
        "distill": distill, "clip_grad": clip_grad, "accumulate": accumulate, "ema": ema, "max_skips": max_skips,
        "lowering": lowering, "lift": lift, "features": features, "norm_batches": norm_batches,
        "frozen_norms": frozen_norms,
    }  # fmt: skip
    for name, number in numbers.items():
        if not (number is None and name in ("clip_grad", "ema")) and not isinstance(number, (int, float)):
            raise AjpqError(f"`{name}` must be a number for training, but it is {number!r}: change that setting.")
    rules = {
        "epochs >= 0": (epochs, epochs >= 0), "0 < lr < inf": (lr, 0 < lr < math.inf),
        f"optimizer in ({', '.join(OPTIMIZERS)})": (optimizer, optimizer in OPTIMIZERS),
        "0 <= momentum < 1": (momentum, 0 <= momentum < 1), "0 <= warmup < 1": (warmup, 0 <= warmup < 1),
        "temperature > 0": (temperature, temperature > 0), "0 <= distill <= 1": (distill, 0 <= distill <= 1),
        "clip_grad > 0": (clip_grad, clip_grad is None or clip_grad > 0),
        f"precision in ({', '.join(PRECISIONS)})": (precision, precision in PRECISIONS),
        "accumulate >= 1": (accumulate, accumulate >= 1), "0 <= ema < 1": (ema, ema is None or 0 <= ema < 1),
        "max_skips >= 0": (max_skips, max_skips >= 0), "0 <= lowering < 1": (lowering, 0 <= lowering < 1),
        "lift >= 1": (lift, lift >= 1), f"activations in ({', '.join(ACTIVATIONS)})": (
            activations, activations in ACTIVATIONS),
        "norm_batches >= 0": (norm_batches, norm_batches >= 0),
        "0 <= frozen_norms <= 1": (frozen_norms, 0 <= frozen_norms <= 1),
        "0 <= features < inf": (features, 0 <= features < math.inf),
    }  # fmt: skip
    for rule, (value, holds) in rules.items():
        if not holds:
            name = next(word for word in rule.split() if word.isidentifier())
            raise AjpqError(f"`{rule}` must hold for training, but {name}={value}: change that setting.")
    if features and not distillation:
        raise AjpqError(
            f"features are distilled from the uncompressed network, but {features=} and there is no teacher; distill "
            "from one (distillation=true, teacher=) or use features=0"
        )
