"""Milliseconds of networks on a runtime: pinned threads, warmed up, several networks in turns, medians with spread."""

from __future__ import annotations

import copy
import importlib.util
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import onnx
import torch
from torch import nn

from ajpq.errors import AjpqError
from ajpq.layers import ActQuant
from ajpq.quantize import FLOAT

SAMPLE = 2e-3  # seconds that a sample takes at least, by repeating short runs: our choice
WARM = 5  # samples that are not counted: our choice
K = TypeVar("K")  # what networks are called
Run = Callable[[], object]  # one pass of a network over its images


@dataclass(frozen=True)
class Device:
    """What a time depends on beside the network and the batch."""

    processor: str
    runtime: str
    version: str  # of the runtime
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.processor}, {self.runtime} {self.version}, {threads}"


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to be timed. onnx: of any batch, for runtimes of ONNX files; module: for torch."""

    images: np.ndarray  # (batch, ...), of the type that the network reads
    onnx: bytes | None = None
    module: nn.Module | None = None

    def of_one_shape(self) -> bytes:
        """`onnx` for batches of just this size, as one would deploy it: runtimes then plan shapes once, not per run."""
        model = onnx.load_model_from_string(self.onnx)
        for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, self.images.shape, strict=True):
            dim.dim_value = size
        del model.graph.value_info[:]
        return model.SerializeToString()


class Runner(Protocol):
    """A runtime on this machine."""

    device: Device

    def start(self, subject: Subject) -> Run:
        """Load a network; what comes back runs it once and returns when it is done."""
        ...


class OnnxRuntime:
    """ONNX Runtime on the processor. Threads of one network stop spinning when its run ends, so that they do not
    disturb the next one."""

    def __init__(self, threads: int = 1) -> None:
        import onnxruntime

        self.device = Device(processor(), "onnxruntime", onnxruntime.__version__, threads)

    def start(self, subject: Subject) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.device.threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(subject.of_one_shape(), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: subject.images}
        return lambda: session.run(None, feed)


class OpenVINO:
    """OpenVINO on the processor. Where it has bfloat16 or float16 instructions OpenVINO computes float32 networks in
    them, unless `precision` is "f32"."""

    def __init__(self, threads: int = 1, precision: str | None = None) -> None:
        import openvino

        name = f"openvino_{precision}" if precision else "openvino"
        self.device = Device(processor(), name, openvino.__version__, threads)
        self.core = openvino.Core()
        self.options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        if precision:
            self.options["INFERENCE_PRECISION_HINT"] = precision

    def start(self, subject: Subject) -> Run:
        import openvino

        model = self.core.read_model(subject.of_one_shape(), b"")
        request = self.core.compile_model(model, "CPU", self.options).create_infer_request()
        tensor = openvino.Tensor(np.ascontiguousarray(subject.images), shared_memory=True)
        request.set_input_tensor(tensor)
        return lambda held=tensor: request.infer()  # the request does not keep the tensor's memory alive


class TorchCUDA:
    """PyTorch on the first GPU. It has no int8 convolutions, so a shipped network runs as the float network of the
    channels that it kept: what is measured is its pruning."""

    def __init__(self, threads: int = 1) -> None:
        self.device = Device(torch.cuda.get_device_name(0), "cuda", torch.__version__, threads)

    def start(self, subject: Subject) -> Run:
        module, images = copy.deepcopy(subject.module).eval().cuda(), torch.from_numpy(subject.images).cuda()
        for part in module.modules():
            if isinstance(part, ActQuant):
                part.bits = FLOAT

        @torch.no_grad()
        def run() -> None:
            module(images)
            torch.cuda.synchronize()

        return run


RUNTIMES: dict[str, Callable[[int], Runner]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
    "openvino_f32": lambda threads: OpenVINO(threads, "f32"),
    "cuda": TorchCUDA,
}


def runner(name: str, threads: int = 1) -> Runner:
    """Raises AjpqError for an unknown runtime, one that is not here, and a number of threads below 1."""
    if name not in RUNTIMES:
        raise AjpqError(f"runtime must be one of {', '.join(RUNTIMES)}, but it is {name!r}; choose one")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise AjpqError(f"threads must be a whole number of at least 1, but it is {threads!r}; write threads=1")
    module = name.partition("_")[0]
    here = torch.cuda.is_available() if name == "cuda" else importlib.util.find_spec(module) is not None
    if not here:
        way = "take a machine with an NVIDIA GPU" if name == "cuda" else f"pip install {module}"
        raise AjpqError(f"the runtime {name} must be on this machine, but it is not; {way}, or choose another runtime")
    return RUNTIMES[name](threads)


@cache
def processor() -> str:
    """The model name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    keys = ("cpu family", "model", "stepping")
    exact = "/".join(facts[key] for key in keys if facts.get(key))
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({exact})" if exact else name


@dataclass(frozen=True, eq=False)
class Times:
    """Milliseconds of one network. samples: float64 (n,), one per round."""

    samples: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)

    def row(self, images: int = 1) -> dict[str, float]:
        """Median and quartiles (low, high), each divided by the images of a run."""
        low, high = self.quartiles
        return {"median": self.median / images, "low": low / images, "high": high / images}

    def over(self, other: Times) -> Times:
        """Ratios, round by round, to a network that was measured in the same rounds; without a unit."""
        return Times(self.samples / other.samples)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.4g} ({low:.4g} to {high:.4g})"


def interleaved(
    runs: Mapping[K, Run], rounds: int | None = None, seconds: float = 1.0, warmed: Mapping[K, int] | None = None
) -> dict[K, Times]:
    """Time several networks in turns, so that all of them see the same moods of the machine.

    In every round each network gives one sample: the mean of so many passes in a row that they take `SAMPLE` seconds or
    more. Every other round goes backwards. rounds: at least 1; by default as many as fit in `seconds`, at least 5.
    warmed: networks that are warm already, and their `passes_of`.
    """
    known = warmed or {}
    passes = {name: known[name] if name in known else passes_of(run) for name, run in runs.items()}
    found: dict[K, list[float]] = {name: [] for name in runs}
    end, done = time.perf_counter() + seconds, 0
    while done < rounds if rounds else done < 5 or time.perf_counter() < end:
        for name in runs if done % 2 else reversed(runs):
            found[name].append(_sample(runs[name], passes[name]) * 1e3)
        done += 1
    return {name: Times(np.array(samples)) for name, samples in found.items()}


def passes_of(run: Run) -> int:
    """How many passes in a row make a sample; the network is warm then."""
    return max(1, round(SAMPLE / warm(run)))


def warm(run: Run) -> float:
    """Run a network until it is warm; about how many seconds a pass takes then."""
    run()
    passes = max(1, min(100, round(SAMPLE / 4 / max(_sample(run, 1), 1e-7))))
    return max(1e-7, float(np.median([_sample(run, passes) for _ in range(WARM)])))


def _sample(run: Run, passes: int) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    for _ in range(passes):
        run()
    return (time.perf_counter() - start) / passes
