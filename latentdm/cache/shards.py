"""A shard: one immutable safetensors file of entries whose fields have the same shapes.

The tensor ``keys`` (U8 ``n 16``) says which entry a row is, ``crc`` (U32 ``n``) is the CRC-32 over its key and all of
its fields, and each field is a tensor of ``n`` rows. The first and largest begins on a boundary of `ALIGNMENT` bytes.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    torch.uint32: "U32",
    torch.uint64: "U64",
}
"""torch → safetensors."""

TORCH = {name: dtype for dtype, name in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""

Bytes = npt.NDArray[np.uint8]

ToWrite = tuple[str, Sequence[int], Sequence[npt.NDArray[Any]]]
"""A tensor: its dtype as the format calls it, its shape, and arrays that hold its data one after another."""


class BrokenShard(Exception):
    """A file is no whole shard."""


@dataclass(frozen=True)
class Field:
    """Where the rows of a tensor lie in a file.

    Attributes:
        dtype: of its values.
        shape: ``n …``.
        offset: where the first row begins.
        row_bytes: of each.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    row_bytes: int


def read_head(file: int) -> tuple[dict[str, str], dict[str, Field]]:
    """What an open safetensors file says of itself.

    Returns:
        Its metadata; and name → where a tensor lies, sorted by name.

    Raises:
        BrokenShard: it is none, or not whole.
        OSError: it cannot be read.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise BrokenShard("no head")
    head, base = os.pread(file, length, 8), 8 + length
    try:
        header = json.loads(head)
        metadata = header.pop("__metadata__")
        fields, end = {}, 0
        for name, entry in sorted(header.items()):
            first, last = map(int, entry["data_offsets"])
            shape, dtype = tuple(map(int, entry["shape"])), TORCH[entry["dtype"]]
            if min(first, *shape) < 0 or last - first != prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} of shape {shape} in {last - first} bytes")
            fields[name] = Field(dtype, shape, base + first, (last - first) // max(shape[0], 1))
            end = max(end, last)
    except Exception as error:  # a broken head makes json and what follows raise nearly anything
        raise BrokenShard(f"its head cannot be read: {error}") from error
    if base + end != size:
        raise BrokenShard(f"{size} bytes instead of {base + end}")
    return metadata, fields


def signature(fields: Mapping[str, Any]) -> str:
    """Names, dtypes and shapes of a row of each `Field` or tensor, as ``moments-bf16-2x4x64x64``: a folder's name."""
    return "+".join(
        f"{name}-{DTYPES[field.dtype].lower()}-{'x'.join(map(str, field.shape[1:]))}"
        for name, field in sorted(fields.items())
    )


class Shard:
    """A shard that is open; it closes with the last reference to it.

    Args:
        path: of the file.

    Attributes:
        fields: name → where it lies, but for ``keys`` and ``crc``.

    Raises:
        BrokenShard: the file is none, or not whole.
        OSError: it cannot be read.
    """

    _file = -1

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        _, fields = read_head(self._file)
        try:
            self._keys, self._crc = fields.pop("keys"), fields.pop("crc")
        except KeyError as error:
            raise BrokenShard(f"it has no {error}") from error
        if self._keys.shape != (len(self), KEY_BYTES) or self._crc.shape != (len(self),):
            raise BrokenShard(f"keys of shape {self._keys.shape}, sums of shape {self._crc.shape}")
        self.fields = fields
        self._signature = signature(fields).encode()

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def __len__(self) -> int:
        return self._keys.shape[0]

    def keys(self) -> tuple[Bytes, npt.NDArray[np.uint32]]:
        """Keys ``n 16`` and sums ``n``.

        Raises:
            BrokenShard: the file has become shorter.
        """
        keys = os.pread(self._file, len(self) * KEY_BYTES, self._keys.offset)
        crc = os.pread(self._file, len(self) * 4, self._crc.offset)
        if len(keys) < len(self) * KEY_BYTES or len(crc) < len(self) * 4:
            raise BrokenShard("a short read")
        return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), np.frombuffer(crc, "<u4")

    def read(self, row: int, key: bytes, crc: int) -> dict[str, Tensor]:
        """The fields of one entry.

        Raises:
            BrokenShard: what is read is not that entry.
            OSError: it cannot be read.
        """
        if not 0 <= row < len(self):
            raise BrokenShard("no such row")
        buffers = []
        for field in self.fields.values():
            buffer = np.empty(field.row_bytes, np.uint8)
            read = os.preadv(self._file, [buffer.data], field.offset + row * field.row_bytes)
            if read < field.row_bytes:
                raise BrokenShard("a short read")
            buffers.append(buffer)
        if checksum(key, self._signature, buffers) != crc:
            raise BrokenShard("a wrong sum")
        return {
            name: torch.from_numpy(buffer).view(field.dtype).view(field.shape[1:])
            for (name, field), buffer in zip(self.fields.items(), buffers, strict=True)
        }


def checksum(key: bytes, names: bytes, fields: Iterable[Any]) -> int:
    """The CRC-32 over an entry's key, what its fields are (a `signature`), and the fields, sorted by name."""
    total = zlib.crc32(names, zlib.crc32(key))
    for field in fields:
        total = zlib.crc32(field, total)
    return total


def write_shard(path: Path, keys: Sequence[bytes], fields: Mapping[str, Sequence[Tensor]]) -> None:
    """Write a new file.

    Args:
        path: of the file, in a folder that exists.
        keys: ``n`` of them.
        fields: name → tensors ``n' …`` on the CPU, whose rows together are ``n``.
    """
    parts = {name: [_bytes_of(tensor) for tensor in tensors] for name, tensors in sorted(fields.items())}
    first = {name: fields[name][0] for name in parts}
    names = signature(first).encode()
    entries = zip(*map(chain.from_iterable, parts.values()), strict=True)
    crc = [checksum(key, names, entry) for key, entry in zip(keys, entries, strict=True)]
    count = len(keys)
    tensors: dict[str, ToWrite] = {
        name: (DTYPES[first[name].dtype], [count, *first[name].shape[1:]], parts[name])
        for name in sorted(parts, key=lambda name: -parts[name][0].shape[1])  # the largest begins on the boundary
    }
    tensors["crc"] = "U32", [count], [np.array(crc, "<u4")]
    tensors["keys"] = "U8", [count, KEY_BYTES], [np.frombuffer(b"".join(keys), np.uint8)]
    write_tensors(path, tensors, {"format": "pt", "latentdm": "1"})


def write_tensors(path: Path, tensors: Mapping[str, ToWrite], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with blanks in its head up to a multiple of `ALIGNMENT`, where the data begin.

    Args:
        path: of the file, in a folder that exists.
        tensors: in the order of the file.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, arrays) in tensors.items():
        end = offset + sum(array.nbytes for array in arrays)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, _, arrays in tensors.values():
            for array in arrays:
                file.write(array.data)


def _bytes_of(tensor: Tensor) -> Bytes:
    """``n …`` on the CPU → its ``n row_bytes`` bytes."""
    rows = tensor.detach().contiguous()
    flat: Bytes = rows.view(len(rows), -1).view(torch.uint8).numpy()
    return flat


@contextmanager
def published(target: Path, tmp: Path) -> Iterator[Path]:
    """A file to write that gets its name when all of it is on the disk: nobody ever sees half of it.

    Args:
        target: the name; its folder is made if need be.
        tmp: a folder of the same file system, likewise.
    """
    tmp.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = tmp / uuid4().hex
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(target)
        _sync_folder(target.parent)
    finally:
        new.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make sure that the names of new files are on the disk, where the system can."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(file)
    except OSError:
        pass
    finally:
        os.close(file)
