"""Which shard and row an entry lies in: sorted arrays, 20 bytes an entry, mapped into memory and shared by workers.

An index is derived from the shards and may be deleted at any time. What it says is never trusted: the sum over key and
fields decides whether a row is the entry that was asked for.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from latentdm.cache.keys import KEY_BYTES
from latentdm.cache.shards import BrokenShard, Bytes, published, read_head, write_tensors

VERSION = 1
"""Of the file; one of another version is passed over and made anew."""

PARTS = {"prefix": "<u8", "shard": "<u4", "row": "<u4", "crc": "<u4"}
"""The arrays of the file."""

SAFETENSORS = {"<u8": "U64", "<u4": "U32"}
"""numpy → safetensors."""


@dataclass(frozen=True)
class Place:
    """Where an entry may lie."""

    shard: str
    row: int
    crc: int


class Index:
    """Entries sorted by the first half of their keys.

    Args:
        shards: the names of the files.
        prefix: ``n`` uint64, in order.
        shard: ``n`` uint32, positions in ``shards``.
        row: ``n`` uint32.
        crc: ``n`` uint32.

    Attributes:
        name: of the file that it was read from.
    """

    name = ""

    def __init__(
        self,
        shards: Sequence[str],
        prefix: npt.NDArray[np.uint64],
        shard: npt.NDArray[np.uint32],
        row: npt.NDArray[np.uint32],
        crc: npt.NDArray[np.uint32],
    ) -> None:
        self.shards = list(shards)
        self.prefix, self.shard, self.row, self.crc = prefix, shard, row, crc

    def __len__(self) -> int:
        return len(self.prefix)

    def places(self, key: bytes) -> Iterator[Place]:
        """Where an entry may lie; more than one where it was written twice, or where prefixes are alike."""
        wanted = np.frombuffer(key, "<u8", count=1)[0]
        at = int(self.prefix.searchsorted(wanted))
        while at < len(self.prefix) and self.prefix[at] == wanted:
            number = int(self.shard[at])
            if number < len(self.shards):  # a flipped bit may say anything
                yield Place(self.shards[number], int(self.row[at]), int(self.crc[at]))
            at += 1

    @classmethod
    def of(cls, parts: Sequence[tuple[str, Bytes, npt.NDArray[np.uint32]]]) -> "Index":
        """The index of some shards: their names, keys ``n 16`` and sums ``n``."""
        counts = [len(crc) for _, _, crc in parts]
        total = sum(counts)
        keys = np.concatenate([keys for _, keys, _ in parts]) if parts else np.empty((0, KEY_BYTES), np.uint8)
        prefix = np.ascontiguousarray(keys[:, :8]).view("<u8").reshape(-1)
        order = prefix.argsort(kind="stable")
        shard = np.repeat(np.arange(len(parts), dtype="<u4"), counts)
        starts = np.repeat(np.cumsum([0, *counts[:-1]]) if counts else np.empty(0, int), counts)
        row = (np.arange(total) - starts).astype("<u4")
        crc = np.concatenate([crc for _, _, crc in parts]) if parts else np.empty(0, "<u4")
        return cls([name for name, _, _ in parts], prefix[order], shard[order], row[order], crc[order])

    def joined(self, other: "Index") -> "Index":
        """Both together."""
        prefix = np.concatenate([self.prefix, other.prefix])
        order = prefix.argsort(kind="stable")  # two sorted runs are merged, in one pass
        return Index(
            [*self.shards, *other.shards],
            prefix[order],
            np.concatenate([self.shard, other.shard + np.uint32(len(self.shards))])[order],
            np.concatenate([self.row, other.row])[order],
            np.concatenate([self.crc, other.crc])[order],
        )

    def without(self, gone: set[str]) -> "Index":
        """Without the entries of some shards."""
        numbers = {number for number, name in enumerate(self.shards) if name in gone}
        kept = ~np.isin(self.shard, list(numbers))
        places = np.cumsum([number not in numbers for number in range(len(self.shards))]) - 1
        names = [name for name in self.shards if name not in gone]
        shard = places[self.shard[kept]].astype("<u4")
        return Index(names, self.prefix[kept], shard, self.row[kept], self.crc[kept])

    def save(self, folder: Path, tmp: Path) -> Path:
        """Write it as a file of its own; readers take the newest."""
        tensors = {
            name: (SAFETENSORS[kind], [len(self)], [np.ascontiguousarray(getattr(self, name), dtype=kind)])
            for name, kind in PARTS.items()
        }
        generations = [_generation(path) for path in folder.glob("*.safetensors")]
        target = folder / f"{max(generations, default=0) + 1:08}-{uuid4().hex[:8]}.safetensors"
        with published(target, tmp) as new:
            write_tensors(new, tensors, {"version": str(VERSION), "shards": json.dumps(self.shards)})
        return target

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Map a file into memory; nothing of it is read that is not asked for.

        Raises:
            BrokenShard: it is none, not whole, or of another version.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            metadata, fields = read_head(file.fileno())
        try:
            if metadata["version"] != str(VERSION):
                raise BrokenShard(f"version {metadata['version']}")
            mapped, arrays = np.memmap(path, np.uint8, "r"), {}
            for name, kind in PARTS.items():
                at = fields[name]
                arrays[name] = mapped[at.offset : at.offset + at.shape[0] * at.row_bytes].view(kind)
            index = cls([str(name) for name in json.loads(metadata["shards"])], **arrays)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BrokenShard(f"its head cannot be read: {error}") from error
        if len({len(array) for array in arrays.values()}) > 1:
            raise BrokenShard("its arrays differ in length")
        index.name = path.name
        return index


def newest(folder: Path, but: str = "") -> Index | None:
    """The newest index in a folder that can be opened; None where that is the file of a name."""
    try:
        paths = sorted(folder.glob("*.safetensors"), key=lambda path: (_generation(path), path.name), reverse=True)
    except OSError:
        return None
    for path in paths:
        if path.name == but:
            return None
        try:
            return Index.open(path)
        except (BrokenShard, OSError):
            continue
    return None


def _generation(path: Path) -> int:
    number = path.name.split("-")[0]
    return int(number) if number.isdigit() else 0
