"""The file of a folder's index: columns of Arrow's as they lie in memory, so that they can be mapped.

Nothing in it is believed: Arrow ends the process over a broken file of its own format, so where each buffer lies is
written in JSON, and what it holds is checked. A file that somebody else may have written is not opened at all.
"""

import json
import os
from contextlib import suppress
from hashlib import blake2b
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pyarrow as pa

from latentdm.data.files import open_regular

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None  # type: ignore[assignment]

SUFFIX = ".index"

HALF_WRITTEN = ".half-written"

HEAD_BYTES = 8
"""At the beginning: the length of the head."""

IDENTITY_BYTES = 32
"""At the end: the hash of all before it, which is what the index is called."""

ALIGNMENT = 64
"""Of each buffer, as Arrow wants it."""

MAX_HEAD_BYTES = 1 << 30
"""The head holds what to watch for changes: a name and two numbers for each folder."""


class BrokenIndexError(ValueError):
    """The file is none of ours, or not whole."""


def write_table(table: pa.RecordBatch, file: Path) -> None:
    """Write an index beside ``file`` and rename it at once: another process may be opening or writing it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(file.parent)
    new = file.with_suffix(f".{uuid4().hex}{HALF_WRITTEN}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:  # for its user alone
            if flock is not None:
                with suppress(OSError):  # a file system without locks
                    flock(out, LOCK_EX)
            _write(table, out)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def read_table(file: Path, schema: pa.Schema, identity: bytes | None = None) -> tuple[pa.RecordBatch, bytes]:
    """The table in a file, mapped into memory, and its identity.

    Args:
        file: as `write_table` leaves it.
        schema: of the table.
        identity: that which the file must have; it is trusted then, as it was read before. None: any.

    Raises:
        OSError: it cannot be opened.
        BrokenIndexError: others may have written it, or it is not whole, or another one.
    """
    with open_regular(file) as content:
        status = os.fstat(content.fileno())
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise BrokenIndexError(f"{file} belongs to another user, or others may write to it")
        size = status.st_size - IDENTITY_BYTES
        if size < HEAD_BYTES:
            raise BrokenIndexError(f"{file} is too short")
        content.seek(size)
        written = content.read()
        if written != (identity or _hash(content, size)):
            raise BrokenIndexError(f"{file} is another index, or not whole")
        mapped = mmap(content.fileno(), 0, access=ACCESS_READ)
    try:
        return _table(memoryview(mapped)[:size], schema, checked=identity is not None), written
    except Exception as error:  # whoever wrote it may have written anything
        raise BrokenIndexError(f"{file} holds no index: {error}") from error


def _write(table: pa.RecordBatch, out: BinaryIO) -> None:
    places: dict[str, list[list[int] | None]] = {}
    pieces: list[Any] = []
    end = 0
    for name in table.schema.names:
        places[name] = []
        for buffer in table.column(name).buffers():
            places[name].append(None if buffer is None else [end, buffer.size])
            if buffer is not None:
                pieces += [memoryview(buffer), bytes(-buffer.size % ALIGNMENT)]
                end += buffer.size + -buffer.size % ALIGNMENT
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    head = json.dumps({"rows": table.num_rows, "places": places, "facts": facts}).encode()
    head += b" " * (-(HEAD_BYTES + len(head)) % ALIGNMENT)
    identity = blake2b(digest_size=IDENTITY_BYTES)
    for piece in (len(head).to_bytes(HEAD_BYTES, "big"), head, *pieces):
        out.write(piece)
        identity.update(piece)
    out.write(identity.digest())


def _table(content: memoryview, schema: pa.Schema, checked: bool) -> pa.RecordBatch:
    head_bytes = int.from_bytes(content[:HEAD_BYTES], "big")
    start = HEAD_BYTES + head_bytes
    if head_bytes > MAX_HEAD_BYTES or start % ALIGNMENT:
        raise BrokenIndexError("its head goes on past its end")
    head = json.loads(bytes(content[HEAD_BYTES:start]))
    rows, buffers = head["rows"], content[start:]
    if not 0 <= rows <= len(buffers):
        raise BrokenIndexError(f"it cannot hold {rows} rows")

    def buffer(offset: int, size: int) -> pa.Buffer:
        if offset < 0 or size < 0 or offset % ALIGNMENT:
            raise BrokenIndexError("a buffer lies elsewhere")
        return pa.py_buffer(buffers[offset : offset + size])  # which ends with the file, and is too short then

    arrays = []
    for field in schema:
        parts = [None if place is None else buffer(*place) for place in head["places"][field.name]]
        array = pa.Array.from_buffers(field.type, rows, parts)
        if not checked:
            array.validate(full=True)  # every offset lies in its buffer
            if array.null_count and not field.nullable:
                raise BrokenIndexError(f"its column {field.name} has gaps")
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema.with_metadata(head["facts"]))


def _hash(content: BinaryIO, size: int) -> bytes:
    """Of the first ``size`` bytes: read piece by piece, since mapped ones would count as this process's memory."""
    content.seek(0)
    total = blake2b(digest_size=IDENTITY_BYTES)
    while size > 0 and (piece := content.read(min(size, 1 << 20))):
        total.update(piece)
        size -= len(piece)
    return total.digest()


def _sweep(folder: Path) -> None:
    """Remove what was left by processes that were killed as they wrote: nobody holds its lock any more."""
    for left in folder.glob(f"*{HALF_WRITTEN}") if flock is not None else ():
        with suppress(OSError), left.open("rb") as file:
            flock(file, LOCK_EX | LOCK_NB)
            left.unlink()
