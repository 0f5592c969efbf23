"""The flat tensors of the packed file while they are written and read: bit streams, kernel widths, everything else in
order.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ajpq.errors import AjpqError
from ajpq.quantize import FLOAT

VERSION = 1
LIMIT = 1 << 28  # bytes: nothing compressed in a file may grow past this
_FLOAT_WIDTH = 9  # how 32 bits are written in four
_TYPES = {
    "header": torch.uint8,
    "widths": torch.uint8,
    "codes": torch.uint8,
    "scale": torch.float16,
    "bias": torch.float16,
    "affine": torch.float16,
    "raw": torch.float32,
    "other": torch.uint8,
}
_BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, (1 << 20) // max(1, columns))
    return (slice(i, i + step) for i in range(0, rows, step))


def write_bits(kernels: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The bit stream, uint8, of pairs of codes uint8 (n, weights) and widths (n,) up to 8."""
    done, rest = [], np.empty(0, np.uint8)
    for codes, widths in kernels:
        for block in _blocks(*codes.shape):
            bits = np.unpackbits(codes[block][..., None], axis=-1, bitorder="little")  # (n, weights, 8)
            keep = np.arange(8) < widths[block][:, None, None]
            bits = np.concatenate([rest, bits[np.broadcast_to(keep, bits.shape)]])
            whole = len(bits) // 8 * 8
            done.append(np.packbits(bits[:whole], bitorder="little"))
            rest = bits[whole:]
    return np.concatenate([*done, np.packbits(rest, bitorder="little")])


def read_bits(stream: np.ndarray, start: int, widths: np.ndarray, weights: int) -> np.ndarray:
    """Codes uint8 (n, weights) of kernels of these widths, from bit `start` of the stream on."""
    codes = np.empty((len(widths), weights), np.uint8)
    for block in _blocks(*codes.shape):
        stop = start + int(widths[block].sum(dtype=np.int64)) * weights
        bits = np.unpackbits(stream[start // 8 : (stop + 7) // 8], bitorder="little")[start % 8 :][: stop - start]
        keep = np.arange(8) < widths[block][:, None, None]
        full = np.zeros((len(keep), weights, 8), np.uint8)
        full[np.broadcast_to(keep, full.shape)] = bits
        codes[block] = np.packbits(full, axis=-1, bitorder="little")[..., 0]
        start = stop
    return codes


def _inflate(data: Tensor) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data.numpy().tobytes(), LIMIT)
    if not stream.eof or stream.unused_data:
        raise AjpqError(
            f"compressed parts of a packed network must be whole and at most {LIMIT} bytes, but one is "
            "not; ship it again"
        )
    return plain


def _tensor(data: bytes | np.ndarray) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy() if isinstance(data, bytes) else data)


def _steps(values: Tensor) -> tuple[np.ndarray, int]:
    """A tensor that is not float32 as differences of integers, int64 (n,), and the bytes that each of them takes."""
    values = values.detach().cpu().contiguous()
    integers = values.view(_BITS_OF.get(values.dtype, values.dtype)).numpy().astype(np.int64).ravel()
    steps = np.diff(integers, prepend=np.int64(0))
    return steps, next(k for k in (1, 2, 4, 8) if (steps.astype(f"<i{k}") == steps).all())


def words_of(name: str, values: Tensor) -> int:
    """32-bit words that a tensor of a module that is no layer takes in the file, at most; a batch-norm's count of
    batches is not written."""
    if name.endswith("num_batches_tracked"):
        return 0
    if values.dtype == torch.float32 or values.is_complex() or values.is_quantized:
        return values.numel()
    return -(-values.numel() * _steps(values)[1] // 4)


class Writer:
    """The flat tensors while they grow."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.kernels: list[tuple[np.ndarray, np.ndarray]] = []
        self.other: list[bytes] = []

    def put(self, part: str, values: Tensor) -> None:
        self.parts[part].append(values.detach().cpu().flatten())

    def put_any(self, name: str, values: Tensor) -> None:
        if values.dtype == torch.float32:
            return self.put("raw", values)
        if values.is_complex() or values.is_quantized:
            raise AjpqError(f"tensors of a shipped network must be real, but {name} is {values.dtype}; split it in two")
        steps, size = _steps(values)
        self.other += [bytes([size]), steps.astype(f"<i{size}").tobytes()]

    def finish(self, header: Mapping[str, Any]) -> dict[str, Tensor]:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
        flat = {part: torch.cat(values) for part, values in self.parts.items()}
        flat["header"] = _tensor(zlib.compress(text.encode(), 9))
        flat["codes"] = _tensor(write_bits(self.kernels))
        if "widths" in flat:
            width = flat["widths"].numpy()
            width = np.append(np.where(width == FLOAT, _FLOAT_WIDTH, width), np.zeros(len(width) % 2, np.uint8))
            flat["widths"] = _tensor((width[0::2] | width[1::2] << 4).astype(np.uint8))
        if self.other:
            flat["other"] = _tensor(zlib.compress(b"".join(self.other), 9))
        return {part: flat[part] for part in _TYPES if part in flat and flat[part].numel()}


class Reader:
    """The flat tensors, each read from its start to its end."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        for part, values in parts.items():
            if _TYPES.get(part) != values.dtype or values.ndim != 1:
                raise AjpqError(
                    f"a packed network consists of flat {', '.join(_TYPES)}, but it has {part!r}, a "
                    f"{values.dtype} tensor of shape {tuple(values.shape)}; ship it again"
                )
        self.header = read_json(parts)
        self.parts = {part: parts.get(part, torch.empty(0, dtype=dtype)) for part, dtype in _TYPES.items()}
        halves = self.parts["widths"].numpy()
        width = np.stack([halves & 15, halves >> 4], axis=1).ravel()
        self.parts["widths"] = _tensor(np.where(width == _FLOAT_WIDTH, FLOAT, width).astype(np.uint8))
        self.codes = self.parts.pop("codes").numpy()
        self.other = _inflate(self.parts.pop("other")) if "other" in parts else b""
        self.at: Counter[str] = Counter()

    def take(self, part: str, *shape: int) -> Tensor:
        start = self.at[part]
        self.at[part] += math.prod(shape)
        if min(shape, default=0) < 0 or self.at[part] > len(self.parts[part]):
            raise AjpqError(f"a packed network must hold all of its {part}, but they end early; ship it again")
        return self.parts[part][start : self.at[part]].clone().reshape(shape)

    def take_codes(self, widths: np.ndarray, weights: int) -> np.ndarray:
        start = self.at["codes"]
        self.at["codes"] += int(widths.sum(dtype=np.int64)) * weights
        if self.at["codes"] > 8 * len(self.codes):
            raise AjpqError("a packed network must hold all of its codes, but they end early; ship it again")
        return read_bits(self.codes, start, widths, weights)

    def take_any(self, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
        if dtype == torch.float32:
            return self.take("raw", *shape)
        start = self.at["other"]
        size = self.other[start]
        self.at["other"] += 1 + math.prod(shape) * size
        steps = np.frombuffer(self.other[start + 1 : self.at["other"]], f"<i{size}").astype(np.int64)
        integers = torch.from_numpy(np.cumsum(steps, dtype=np.int64)).to(_BITS_OF.get(dtype, dtype))
        return integers.view(dtype).reshape(tuple(shape))

    def finish(self) -> None:
        ends = {part: len(values) for part, values in self.parts.items()}
        ends |= {"header": 0, "other": len(self.other), "codes": 8 * len(self.codes)}
        for part, end in ends.items():
            if not 0 <= end - self.at[part] <= {"codes": 7, "widths": 1}.get(part, 0):
                raise AjpqError(
                    f"a packed network must hold exactly what its header lists, but of its {part} "
                    f"{self.at[part]} of {end} are used; ship it again"
                )


def read_json(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        header = json.loads(_inflate(parts["header"]))
    except (LookupError, TypeError, ValueError, RecursionError, zlib.error) as error:
        if isinstance(error, AjpqError):
            raise
        header = None
    if not (isinstance(header, dict) and header.get("format") == "ajpq" and isinstance(header.get("version"), int)):
        raise AjpqError(
            "a packed network must have a header that says ajpq, but this has none; give one that ajpq shipped"
        )
    if header["version"] > VERSION:
        raise AjpqError(
            f"a packed network must have format version {VERSION} or older, but this has "
            f"{header['version']}; update ajpq"
        )
    return header
