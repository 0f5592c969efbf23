"""The packed file: `ship` writes a finished network, `load` rebuilds it with the same bits.

One safetensors file, no pickle. It holds a few flat tensors, of which the empty ones are left out. Everything is in the
order in which the graph first calls its modules, then the tensors it reads by itself; within a layer, kernel after
kernel.

    header  uint8    zlib-compressed JSON: format, version, nodes (see `ajpq.graph_json`), modules, tensors, extra
    widths  uint8    4 bits per kernel, the even kernel in the low half: 1 to 8 bits, 9 = 32 bits
    codes   uint8    one stream of bits, no padding: every weight of a b-bit kernel as b bits, lowest bit first, of its
                     integer minus the lowest integer of the kernel's grid (see `ajpq.quantize`)
    scale   float16  per kernel of 1 to 8 bits
    bias    float16  per kernel of 1 to 8 bits of a layer with a bias
    affine  float16  scales, then shifts, of every `ChannelAffine`
    raw     float32  per layer: weights of its 32-bit kernels, then their biases; other modules: all float32 tensors
    other   uint8    zlib-compressed; per tensor of another type: a byte k, then the differences of successive elements
                     (the first one's to 0) as little-endian integers of k bytes; float types enter as their bits

Bit p of the stream is ``codes[p >> 3] >> (p & 7) & 1``, so in C the next b bits are
``for (u = i = 0; i < b; i++, p++) u |= (codes[p >> 3] >> (p & 7) & 1) << i;`` and the integer is ``u + lowest``, with
lowest ``-(1 << (b - 1))`` up to 3 bits and ``1 - (1 << (b - 1))`` from 4 on.

The metadata of the file has one key, "ajpq": CRC-32 of the whole file, 8 hex digits, taken with 8 zeros in its place.

Rows of modules: ``["FrozenLayer", weight shape, geometry or null, [activation bits, signed, scale], bias]``, where
geometry is [stride, padding, dilation, groups, padding mode] and scale the 8 hex digits of a big-endian float32;
``["ActQuant", bits, signed, scale]``; ``["ChannelAffine", channels]``; or a class of torch.nn with its arguments. Rows
of tensors: [type, shape].
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, fx

from ajpq.bitstream import LIMIT, read_json
from ajpq.errors import AjpqError
from ajpq.files import replacing
from ajpq.layers import FrozenLayer
from ajpq.onnx_export import FILE as ONNX
from ajpq.onnx_export import to_onnx
from ajpq.packing import pack, unpack

FILE = "model.safetensors"
_CHECKSUM = re.compile(rb'"ajpq":"([0-9a-f]{8})"')


def to_bytes(parts: Mapping[str, Tensor]) -> bytes:
    """The file of these tensors, with its checksum."""
    data = bytearray(safetensors.torch.save(dict(parts), metadata={"ajpq": "0" * 8}))
    at = _CHECKSUM.search(data).start(1)
    data[at : at + 8] = b"%08x" % zlib.crc32(data)
    return bytes(data)


def _read(path: str | Path) -> tuple[Path, dict[str, Tensor]]:
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise AjpqError(
            f"a shipped network must be a readable {FILE} or the folder of one, but {file} cannot be read "
            f"({error.strerror}); check the path"
        ) from error
    size = int.from_bytes(data[:8], "little")
    found = _CHECKSUM.search(data, 8, min(8 + size, len(data)))
    if not found and (size > len(data) - 8 and size < LIMIT or b'"__metadata__"' in data[:64]):
        raise AjpqError(
            f"a shipped network must be a whole file, but {file} breaks off after {len(data)} bytes or is "
            "damaged; copy or ship it again"
        )
    if not found:
        raise AjpqError(f"a shipped network must be a file that ajpq wrote, but {file} is not; check the path")
    at = found.start(1)
    if b"%08x" % zlib.crc32(data[:at] + b"0" * 8 + data[at + 8 :]) != found[1]:
        raise AjpqError(
            f"a shipped network must have the checksum that it was written with, but {file} of {len(data)} "
            "bytes has another one and so is damaged or incomplete; copy or ship it again"
        )
    try:
        return file, safetensors.torch.load(data)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise AjpqError(
            f"a shipped network must be a safetensors file, but {file} is not ({error}); ship it again"
        ) from error


def ship(
    network: fx.GraphModule,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
    onnx: fx.GraphModule | None = None,
) -> Path:
    """Write a finished network to `folder`/model.safetensors, at once or not at all. Returns that path.

    images (n, C, H, W): training images; with them an int8 model.onnx is written beside it (see `ajpq.onnx_export`). An
    older model.onnx goes away in any case. onnx: what model.onnx is made of, if not of `network`: the same network
    with channels in whole blocks, from `padding.pad`. Raises AjpqError if ONNX lacks an operation; the packed file is
    kept.
    """
    path = _write(to_bytes(pack(network, extra)), Path(folder))
    beside = path.with_name(ONNX)
    beside.unlink(missing_ok=True)
    if images is not None:
        model = to_onnx(network if onnx is None else onnx, images)
        with replacing(beside) as partial:
            partial.write_bytes(model)
    return path


def _write(data: bytes, folder: Path) -> Path:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    draft = folder / f".{FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / FILE)
    except BaseException as error:
        for undo in (draft.unlink, *(made.rmdir for made in missing)):
            with contextlib.suppress(OSError):
                undo()
        if isinstance(error, OSError):
            raise AjpqError(
                f"a network must be shipped to a folder that can be written, but {folder} cannot "
                f"({error.strerror}); choose another one"
            ) from error
        raise
    return folder / FILE


def load(path: str | Path) -> fx.GraphModule:
    """The network of a shipped file, or of the folder that holds it: the same outputs, bit for bit, on the CPU.

    Safe with files of strangers: nothing in them is executed. Raises AjpqError if the file is not whole and sound.
    """
    file, parts = _read(path)
    try:
        return unpack(parts)
    except AjpqError as error:
        raise AjpqError(f"{file}: {error}") from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Everything in a shipped file but the numbers: format, version, nodes, modules, tensors and `extra`."""
    file, parts = _read(path)
    try:
        return read_json(parts)
    except AjpqError as error:
        raise AjpqError(f"{file}: {error}") from error


def describe(path: str | Path) -> str:
    """A table for people: the layers with their shapes and numbers of kernels by width, then the bytes by part."""
    file, parts = _read(path)
    network = load(file)
    lines = []
    for name, layer in network.named_modules():
        if isinstance(layer, FrozenLayer):
            widths = Counter(layer.bits.tolist())
            text = ", ".join(f"{widths[b]} x {b}" for b in sorted(widths))
            lines.append((name, "x".join(map(str, layer.codes.shape)), str(layer.act.bits), text))
    lines.insert(0, ("layer", "shape", "act bits", "kernels x bits"))
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(line, columns, strict=True)).rstrip() for line in lines]
    sizes = {part: values.numel() * values.element_size() for part, values in parts.items()}
    whole = file.stat().st_size
    sizes["file format"] = whole - sum(sizes.values())
    return "\n".join([*table, "", f"{whole:,} bytes: " + ", ".join(f"{part} {size:,}" for part, size in sizes.items())])
