"""ajpq: a trained CNN, data and a budget in; a physically smaller, mixed-precision network and the proof out.

network = ajpq.trace(model, images)               what can be pruned and what cannot, and why
problem = ajpq.Problem(model, calibration, search, {"size": 0.1})
result = agents.hierarchical.Hierarchical(evaluations=200).search(problem)
student = ajpq.compress(problem.network, result.policy, problem.calibration)
ajpq.reconstruct(student, problem.network, result.policy, train)
small = ajpq.finetune(student, train, epochs=20, teacher=model)
ajpq.ship(small, "folder"); ajpq.load("folder")
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AjpqError": "errors", "Network": "network", "trace": "tracing", "CompressionPolicy": "policy", "Choices": "space",
    "Problem": "problem", "Score": "problem", "SearchResult": "problem", "calibrate": "calibration",
    "compress": "compression",
    "reconstruct": "reconstruction",
    "freeze": "compression", "shrink": "surgery", "Size": "cost", "MACs": "cost", "BOPs": "cost", "UniqBOPs": "cost",
    "finetune": "finetuning", "fit": "training", "accuracy": "training", "recalibrate": "training",
    "ship": "shipping", "load": "shipping", "pad": "padding",
    "load_weights": "checkpoint", "save_weights": "checkpoint",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:  # torch is imported when it is first needed, not for `ajpq --help`
    if name not in _HOME:
        raise AttributeError(f"module 'ajpq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ajpq.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
