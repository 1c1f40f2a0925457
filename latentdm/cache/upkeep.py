"""Looking after a cache: what it holds, whether that is whole, and putting it in order while others use it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from tqdm import tqdm

from latentdm.cache.shards import BrokenShard, Shard
from latentdm.cache.store import Entry, Store
from latentdm.cache.writer import SEAL_BYTES, Growing

Keep = Callable[[bytes], bool]


@dataclass
class Contents:
    """What a look at every entry has found.

    Attributes:
        entries: that are whole.
        bytes: of all shards.
        shards: their number.
        failures: entries that are not what they should be, and shards that are not whole.
        broken: the shards that hold them.
    """

    entries: int = 0
    bytes: int = 0
    shards: int = 0
    failures: int = 0
    broken: list[Path] = field(default_factory=list)


def spaces(root: Path) -> list[Path]:
    """The spaces of a cache: a folder for each encoder that filled it."""
    return sorted(path.parent for path in root.glob("*/space.json"))


def totals(folder: Path) -> dict[str, int]:
    """``entries``, each counted once, and ``bytes`` of a space, as its shards say; none of them is read."""
    store = Store(folder)
    store.refresh()
    return {"entries": len(np.unique(store.whole().prefix)), "bytes": _size(store, store.all_shards())}


def _size(store: Store, shards: Iterable[str]) -> int:
    size = 0
    for shard in shards:
        with suppress(OSError):
            size += (store.folder / "shards" / shard).stat().st_size
    return size


def verify(folder: Path) -> Contents:
    """Read every entry of a space and compare its sum."""
    store, contents = Store(folder), Contents()
    for shard in tqdm(store.all_shards(), "verifying", unit=" shards", delay=1):
        contents.shards += 1
        contents.bytes += _size(store, [shard])
        before = contents.failures
        try:
            contents.entries += sum(1 for _ in _entries(store, shard, contents))
        except FileNotFoundError:
            continue
        except OSError:
            contents.failures += 1
        if contents.failures > before:
            contents.broken.append(folder / "shards" / shard)
    return contents


def _entries(store: Store, name: str, contents: Contents) -> Iterator[tuple[bytes, Entry]]:
    """The entries of a shard; what is not what it should be is counted among the failures.

    Raises:
        OSError: it cannot be read.
    """
    try:
        shard = Shard(store.folder / "shards" / name)
        keys, crc = shard.keys()
    except BrokenShard:
        contents.failures += 1
        return
    for row in range(len(shard)):
        key = keys[row].tobytes()
        try:
            entry = shard.read(row, key, int(crc[row]))
        except BrokenShard:
            contents.failures += 1
        else:
            yield key, entry


def compact(folder: Path, keep: Keep = lambda _: True, all_shards: bool = False) -> Contents:
    """Merge the small shards of a space, and leave out what is broken, there twice or unwanted.

    Others may read and write meanwhile: a merged shard is there before those that it was made of go.

    Args:
        folder: of the space.
        keep: which keys stay.
        all_shards: look at the large shards as well.

    Returns:
        What was written.
    """
    store, written = Store(folder), Contents()
    groups: dict[str, list[str]] = {}
    for shard in store.all_shards():
        if all_shards or _size(store, [shard]) < SEAL_BYTES // 2:
            groups.setdefault(shard.rpartition("/")[0], []).append(shard)
    with tqdm(total=sum(map(len, groups.values())), desc="compacting", unit=" shards", delay=1) as bar:
        for name, shards in groups.items():
            if len(shards) < 2 and not all_shards:
                bar.update(len(shards))
                continue
            _merge(store, name, shards, keep, written, bar)
    store.refresh()
    with suppress(OSError, BrokenShard):
        store.keep_index(least=1)
    return written


def _merge(store: Store, name: str, shards: list[str], keep: Keep, written: Contents, bar: Any) -> None:
    seen: set[bytes] = set()
    merged: list[str] = []
    grows = Growing(store, name)
    for shard in shards:
        bar.update()
        try:
            for key, entry in _entries(store, shard, written):
                if key not in seen and keep(key):
                    seen.add(key)
                    grows.add([key], {field: tensor[None] for field, tensor in entry.items()})
        except OSError:
            continue  # gone, or out of reach for now: it stays as it is
        merged.append(shard)
        if grows.size >= SEAL_BYTES:
            _replace(merged, grows, written)
            merged, grows = [], Growing(store, name)
    _replace(merged, grows, written)


def _replace(merged: Sequence[str], grows: Growing, written: Contents) -> None:
    """Write a shard, and then remove those that it was made of."""
    if grows.keys:
        written.bytes += grows.write("compact", 0)
        written.shards += 1
        written.entries += len(grows.keys)
    for shard in merged:
        (grows.store.folder / "shards" / shard).unlink(missing_ok=True)


def remove(folder: Path) -> int:
    """Remove a space; returns its bytes."""
    store = Store(folder)
    size = _size(store, store.all_shards())
    rmtree(folder, ignore_errors=True)
    return size
