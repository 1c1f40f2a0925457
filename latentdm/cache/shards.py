"""A shard: one immutable safetensors file of entries whose fields have the same shapes.

The tensor ``keys`` (U8 ``n 16``) says which entry a row is, ``crc`` (U32 ``n``) is the CRC-32 over its key and all of
its fields, and each field is a tensor of ``n`` rows. The first and largest begins on a boundary of `ALIGNMENT` bytes.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentdm.cache.keys import KEY_BYTES

ALIGNMENT = 4096

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""torch → safetensors."""

TORCH = {name: dtype for dtype, name in DTYPES.items()}

MAX_HEADER_BYTES = 1 << 20

Bytes = npt.NDArray[np.uint8]


class BrokenShard(Exception):
    """A file is no whole shard."""


@dataclass(frozen=True)
class FieldLayout:
    """Where a field's rows lie in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class Layout:
    """What a shard's head says.

    Attributes:
        count: entries.
        keys: where the keys begin.
        crc: where the sums begin.
        fields: name → where it lies.
        names: their `signature`, which the sums cover.
    """

    count: int
    keys: int
    crc: int
    fields: Mapping[str, FieldLayout]
    names: bytes


def field_bytes(tensor: Tensor) -> Bytes:
    """``n …`` on the CPU → its ``n row_bytes`` bytes."""
    rows = tensor.detach().contiguous()
    flat: Bytes = rows.view(len(rows), -1).view(torch.uint8).numpy()
    return flat


def checksum(key: bytes, names: bytes, fields: Sequence[Any]) -> int:
    """The CRC-32 over an entry's key, what its fields are (a `signature`), and the fields, sorted by name."""
    total = zlib.crc32(names, zlib.crc32(key))
    for field in fields:
        total = zlib.crc32(field, total)
    return total


def signature(fields: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> str:
    """Names, dtypes and shapes of a row of each field, as ``moments-bf16-2x4x64x64``: a folder's name."""
    return "+".join(
        f"{name}-{DTYPES[dtype].lower()}-{'x'.join(map(str, shape))}" for name, (dtype, shape) in sorted(fields.items())
    )


def signature_of(fields: Mapping[str, Tensor]) -> str:
    """The same of tensors ``n …``."""
    return signature({name: (tensor.dtype, tensor.shape[1:]) for name, tensor in fields.items()})


def write_shard(path: Path, keys: Sequence[bytes], fields: Mapping[str, Sequence[Tensor]]) -> int:
    """Write a new file and make sure that it is on the disk.

    Args:
        path: of the file, in a folder that exists.
        keys: ``n`` of them.
        fields: name → tensors ``n' …`` on the CPU, whose rows together are ``n``.

    Returns:
        The bytes written.
    """
    names = sorted(fields)
    rows = {name: [field_bytes(part) for part in fields[name]] for name in names}
    crc = np.zeros(len(keys), dtype="<u4")
    at = [iter(_rows(rows[name])) for name in names]
    described = signature_of({name: fields[name][0] for name in names}).encode()
    for number, key in enumerate(keys):
        crc[number] = checksum(key, described, [next(field) for field in at])
    largest_first = sorted(names, key=lambda name: -rows[name][0].shape[1])
    count = len(keys)
    tensors = [
        (name, DTYPES[first.dtype], [count, *first.shape[1:]], count * rows[name][0].shape[1])
        for name in largest_first
        for first in fields[name][:1]
    ]
    tensors += [("crc", "U32", [count], 4 * count), ("keys", "U8", [count, KEY_BYTES], KEY_BYTES * count)]
    head = safetensors_head(tensors, {"format": "pt", "latentdm": "1"})
    with path.open("wb") as file:
        file.write(head)
        for name in largest_first:
            for part in rows[name]:
                file.write(part.data)
        file.write(crc.tobytes() + b"".join(keys))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def safetensors_head(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, blanks included up to a multiple of `ALIGNMENT`, where the data follow.

    Args:
        tensors: name, dtype as the format calls it, shape and bytes of each, in the order of the data.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    return len(head).to_bytes(8, "little") + head


def _rows(parts: Sequence[Bytes]) -> Iterator[Bytes]:
    for part in parts:
        yield from part


def read_layout(file: int) -> Layout:
    """The head of an open shard.

    Raises:
        BrokenShard: it is none, or not whole.
        OSError: it cannot be read.
    """
    size = os.fstat(file).st_size
    start = os.pread(file, 8, 0)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 0 < length <= MAX_HEADER_BYTES:
        raise BrokenShard("no head")
    try:
        header = json.loads(os.pread(file, length, 8))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        count = int(header["keys"]["shape"][0])
        base = 8 + length
        if base + max(ends) != size or header["keys"]["shape"] != [count, KEY_BYTES]:
            raise BrokenShard(f"{size} bytes instead of {base + max(ends)}")
        places = {name: base + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
        fields = {
            name: FieldLayout(
                TORCH[entry["dtype"]],
                tuple(entry["shape"][1:]),
                places[name],
                (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(count, 1),
            )
            for name, entry in header.items()
            if name not in ("__metadata__", "keys", "crc")
        }
        names = signature({name: (field.dtype, field.shape) for name, field in fields.items()})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BrokenShard(f"its head cannot be read: {error}") from error
    return Layout(count, places["keys"], places["crc"], dict(sorted(fields.items())), names.encode())


def read_keys(file: int, layout: Layout) -> tuple[Bytes, npt.NDArray[np.uint32]]:
    """Keys ``n 16`` and sums ``n``.

    Raises:
        BrokenShard: the file has become shorter.
    """
    keys = os.pread(file, layout.count * KEY_BYTES, layout.keys)
    crc = os.pread(file, layout.count * 4, layout.crc)
    if len(keys) < layout.count * KEY_BYTES or len(crc) < layout.count * 4:
        raise BrokenShard("a short read")
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), np.frombuffer(crc, "<u4")


def read_row(file: int, layout: Layout, row: int, key: bytes, crc: int) -> dict[str, Tensor]:
    """The fields of one entry.

    Raises:
        BrokenShard: what is read is not that entry.
        OSError: it cannot be read.
    """
    if not 0 <= row < layout.count:
        raise BrokenShard("no such row")
    buffers = []
    for field in layout.fields.values():
        buffer = np.empty(field.row_bytes, np.uint8)
        read = os.preadv(file, [buffer.data], field.offset + row * field.row_bytes)
        if read < field.row_bytes:
            raise BrokenShard("a short read")
        buffers.append(buffer)
    if checksum(key, layout.names, buffers) != crc:
        raise BrokenShard("a wrong sum")
    return {
        name: torch.from_numpy(buffer).view(field.dtype).view(field.shape)
        for (name, field), buffer in zip(layout.fields.items(), buffers, strict=True)
    }
