"""The images of a folder as one Arrow table: a million of them cost a process next to nothing.

A Python object for each image would take a kilobyte, and every worker would get its own copy as soon as it counts
references. The table lies in one piece, is shared by forked workers, and large ones are kept in a file that is mapped
into memory: but for a checksum, opening it reads nothing that is not asked for.
"""

import json
import os
import random
import stat
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from latentdm.batch import CAPTION
from latentdm.data.decode import read_size
from latentdm.data.files import NoAnswerError, asked, threads
from latentdm.data.index_file import SUFFIX, BrokenIndexError, read_table, write_table
from latentdm.data.skips import SampleError
from latentdm.errors import RunError

VERSION = 4
"""Of the file's layout; an index of another one is built anew."""

NAMES = ("name", "mask", "source", "segmentation", "caption")
"""The columns that hold a file's name: as bytes, because it need not be UTF-8."""

SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_binary(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.int64(), nullable=False),
        pa.field("mask", pa.large_binary()),
        pa.field("source", pa.large_binary()),
        pa.field("segmentation", pa.large_binary()),
        pa.field("caption", pa.large_binary()),
        pa.field("columns", pa.large_binary()),
        pa.field("hash", pa.float64(), nullable=False),
    ]
)

SETTLED_S = 2.0
"""Seconds after which a folder's time of change is trusted to differ from that of the next change."""

CHECKED_FILES = 200
"""How many files' sizes and times are compared when an index is opened. Those of every folder are, which shows a file
that has come or gone."""

NO_STAMP = (0, -1)
"""The `stamp` of what cannot be looked at, which equals that of nothing else."""


@dataclass(frozen=True)
class Entry:
    """An image of a folder.

    Attributes:
        name: its path inside the folder, with ``/`` on every system.
        size: of the file in bytes; −1 where it is unknown.
        mtime: when it was changed last, in nanoseconds.
        mask: the name of its mask.
        source: the name of the picture that the model is shown in its stead.
        segmentation: the name of its label map.
        caption: the name of the file with its caption.
        columns: what a metadata file says of it.
    """

    name: str
    size: int = -1
    mtime: int = 0
    mask: str | None = None
    source: str | None = None
    segmentation: str | None = None
    caption: str | None = None
    columns: Mapping[str, Any] | None = None


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        entries: its images, sorted by name.
        problems: what is wrong with it.
        watched: what to watch for changes: for each folder and metadata file its `stamp`.
        notes: what was left out, and what else a person should know, as parts of a sentence.
        folders: kind → the folder of companions that lie beside the root.
    """

    entries: Sequence[Entry]
    problems: Sequence[str] = ()
    watched: Mapping[str, Sequence[int]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    folders: Mapping[str, str] = field(default_factory=dict)


class FolderIndex:
    """A table of images, sorted by name.

    Args:
        root: the folder.
        table: as `to_table` makes it, in one piece.
        identity: a hash of its content.
        file: where the table lies, if it is mapped into memory: then it is opened anew wherever it is sent to.

    Attributes:
        problems: what is wrong with the folder.
        notes: what of the folder was left out, and what else a person should know.
        folders: ``mask`` or ``source`` → the folder that their names are relative to, where it is not the root.
        captioned: how many images have a caption.
    """

    def __init__(self, root: Path, table: pa.RecordBatch, identity: bytes = b"", file: Path | None = None) -> None:
        self.root = root
        self.table = table
        self.identity = identity
        self.file = file
        self._columns = dict(zip(table.schema.names, table.columns, strict=True))
        metadata = {name: json.loads(table.schema.metadata[name]) for name in (b"problems", b"facts", b"captioned")}
        self.problems: list[str] = metadata[b"problems"]
        self.notes: list[str] = metadata[b"facts"]["notes"]
        self.folders: dict[str, str] = metadata[b"facts"]["folders"]
        self.captioned: int = metadata[b"captioned"]

    def __len__(self) -> int:
        return len(self._columns["name"])

    def __getitem__(self, row: int) -> Entry:
        """The image in one row.

        Raises:
            SampleError: one of its names leads out of the folder: somebody has changed the index.
        """
        value = {name: column[row].as_py() for name, column in self._columns.items()}
        del value["hash"]
        for name in NAMES:
            value[name] = None if value[name] is None else os.fsdecode(value[name])
            if value[name] is not None and not is_inside(value[name]):
                raise SampleError(
                    f"the index of {self.root} names {value[name]}, which lies outside; remove {self.file}"
                )
        if value["columns"] is not None:
            value["columns"] = self._parsed(value["columns"])
        return Entry(**value)

    def name(self, row: int) -> str:
        """The name of an image, to be told and not to be opened."""
        return os.fsdecode(self._columns["name"][row].as_py())

    def below(self, prefix: str) -> npt.NDArray[np.bool_]:
        """``n``: whether each name begins so."""
        begins: npt.NDArray[np.bool_] = pc.starts_with(self._columns["name"], os.fsencode(prefix)).to_numpy(False)
        return begins

    def _parsed(self, columns: bytes) -> dict[str, Any]:
        try:
            found = json.loads(columns)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise SampleError(f"the index of {self.root} holds columns that are none; remove {self.file}")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is not None:
            return _reopened, (self.root, self.file, self.identity)
        return FolderIndex, (self.root, self.table)

    def count(self, companion: str) -> int:
        """How many images have a ``mask``, a ``source`` or a ``segmentation``."""
        return len(self) - int(self._columns[companion].null_count)

    @property
    def hashes(self) -> npt.NDArray[np.float64]:
        """``n``: each name as a number in 0…1, by which the folder is split."""
        hashes: npt.NDArray[np.float64] = self._columns["hash"].to_numpy(zero_copy_only=False)
        return hashes

    def is_same(self, other: "FolderIndex | None") -> bool:
        """Whether another one holds the same images, as they were when both were built."""
        return other is not None and self.table.equals(other.table, check_metadata=True)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """``n 2``: width and height of each image, from its head, in parallel.

        A file that cannot be read counts as a square, and is replaced by one if at all.
        """
        # Reading silences warnings, which threads do side by side: the last to end may leave them silent.
        with warnings.catch_warnings(), threads() as pool:
            sizes = pool.map(partial(_image_size, self), range(len(self)))
            found = np.array(list(tqdm(sizes, "reading sizes", len(self), leave=False)), dtype=np.int32)
            return np.maximum(found.reshape(-1, 2), 1)


def folder_index(
    root: Path, settings: Mapping[str, Any], build: Callable[[], Found], cache: Path, least: int
) -> FolderIndex:
    """The index of a folder: opened if it is kept and still true, else built, and kept if it is large.

    Args:
        root: the folder.
        settings: of the build; another file is kept for each set.
        build: walks the folder.
        cache: the folder in which indices are kept.
        least: the number of images from which an index is kept.
    """
    root = asked(root.resolve, root)
    key = json.dumps([VERSION, str(root), dict(settings)], sort_keys=True, default=str)
    file = cache / f"{blake2b(key.encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}{SUFFIX}"
    index = _kept(root, file)
    if index is not None:
        return index
    started = time.time_ns()
    found = build()
    table = to_table(found)
    settled = all(started - mtime > SETTLED_S * 1e9 for mtime, _ in found.watched.values())
    if len(found.entries) < least or not settled:
        return FolderIndex(root, table)
    try:
        write_table(table, file)
    except OSError as error:
        rank_zero_warn(f"cannot keep the index of {root} in {cache} ({error}): each run builds it anew; set index_dir")
        return FolderIndex(root, table)
    return _kept(root, file) or FolderIndex(root, table)


def to_table(found: Found) -> pa.RecordBatch:
    """What a folder holds as the table of a `FolderIndex`."""
    entries = found.entries

    def texts(attribute: str) -> list[bytes | None]:
        values = (getattr(entry, attribute) for entry in entries)
        return [None if value is None else os.fsencode(value) for value in values]

    data = {
        **{name: texts(name) for name in NAMES},
        "size": [entry.size for entry in entries],
        "mtime": [entry.mtime for entry in entries],
        "columns": [None if entry.columns is None else json.dumps(entry.columns).encode() for entry in entries],
        "hash": [unit_hash(entry.name) for entry in entries],
    }
    captioned = sum(entry.caption is not None or CAPTION in (entry.columns or {}) for entry in entries)
    facts = {"notes": found.notes, "folders": found.folders}
    metadata = {"problems": found.problems, "watched": found.watched, "facts": facts, "captioned": captioned}
    schema = SCHEMA.with_metadata({name: json.dumps(fact) for name, fact in metadata.items()})
    arrays = [pa.array(data[name], SCHEMA.field(name).type) for name in SCHEMA.names]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def is_inside(name: str) -> bool:
    """Whether a relative name, with ``/``, leads to something inside the folder that it is relative to."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def unit_hash(name: str) -> float:
    """A name as a number in 0…1."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64


def _kept(root: Path, file: Path) -> FolderIndex | None:
    """The index in a file that still is true; None if there is none, whatever is wrong with it."""
    try:
        index = FolderIndex(root, *read_table(file, SCHEMA), file)
        texts = [*index.problems, *index.notes, *index.folders, *index.folders.values()]
        whole = all(isinstance(text, str) for text in texts) and isinstance(index.captioned, int)
        return index if whole and _is_true(index) else None
    except NoAnswerError:  # of the folder, which nobody could list either
        raise
    except Exception:  # whoever wrote it may have written anything
        return None


def _reopened(root: Path, file: Path, identity: bytes) -> FolderIndex:
    """The index that another process has opened."""
    try:
        return FolderIndex(root, *read_table(file, SCHEMA, identity), file)
    except OSError as error:
        raise RunError(f"the index of {root} is gone from {file} ({error}); start the run again") from error
    except BrokenIndexError as error:
        raise RunError(
            f"{root} has changed and its index {file} was built anew meanwhile ({error}); start the run again"
        ) from error


def _is_true(index: FolderIndex) -> bool:
    """Whether folders, metadata files and some of the images still are what they were."""
    rows = random.Random().sample(range(len(index)), min(CHECKED_FILES, len(index)))
    images = {entry.name: (entry.mtime, entry.size) for entry in map(index.__getitem__, rows)}
    watched = list({**json.loads(index.table.schema.metadata[b"watched"]), **images}.items())

    def unchanged(part: Sequence[tuple[str, Sequence[int]]]) -> bool:
        return all(list(stamp(index.root / name)) == list(then) for name, then in part)

    parts = (watched[start : start + CHECKED_FILES] for start in range(0, len(watched), CHECKED_FILES))
    return all(asked(partial(unchanged, part), index.root) for part in parts)


def stamp(path: Path | str) -> tuple[int, int]:
    """A file's time of change in nanoseconds and its size; of a folder the time alone; `NO_STAMP` without one."""
    try:
        status = os.stat(path)
    except OSError:
        return NO_STAMP
    return status.st_mtime_ns, (0 if stat.S_ISDIR(status.st_mode) else status.st_size)


def _image_size(index: FolderIndex, row: int) -> tuple[int, int]:
    try:
        return read_size(index.root / index[row].name)
    except SampleError:
        return 0, 0
