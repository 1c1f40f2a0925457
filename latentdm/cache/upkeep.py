"""Looking after a cache: what it holds, whether that is whole, and putting it in order while others use it."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from latentdm.cache.keys import KEY_BYTES
from latentdm.cache.shards import BrokenShard, read_keys, read_layout, read_row
from latentdm.cache.store import Store
from latentdm.cache.writer import SEAL_BYTES, publish

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


def totals(store: Store) -> dict[str, int]:
    """``entries``, each counted once, and ``bytes`` of a store, as its shards say; none of them is read."""
    store.refresh(all_anew=True)
    shards = store.all_shards()
    gone = set(store.index.shards).difference(shards)
    index = store.index.without(gone) if gone else store.index
    prefixes = np.concatenate([index.prefix, store.new.prefix])
    return {"entries": len(np.unique(prefixes)), "bytes": sum(_size(store, shard) for shard in shards)}


def _size(store: Store, shard: str) -> int:
    try:
        return (store.folder / "shards" / shard).stat().st_size
    except OSError:
        return 0


def verify(folder: Path) -> Contents:
    """Read every entry of a space and compare its sum."""
    store, contents = Store(folder), Contents()
    for shard in tqdm(store.all_shards(), "verifying", unit=" shards", delay=1):
        contents.shards += 1
        contents.bytes += _size(store, shard)
        before = contents.failures
        try:
            for entry in _entries(folder / "shards" / shard):
                if entry is None:
                    contents.failures += 1
                else:
                    contents.entries += 1
        except FileNotFoundError:
            continue
        except (BrokenShard, OSError):
            contents.failures += 1
        if contents.failures > before:
            contents.broken.append(folder / "shards" / shard)
    return contents


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Tensor]] | None]:
    """The entries of a shard; None for one that is not what it should be."""
    file = os.open(path, os.O_RDONLY)
    try:
        layout = read_layout(file)
        keys, crc = read_keys(file, layout)
        for row in range(layout.count):
            key = keys[row].tobytes()
            try:
                yield key, read_row(file, layout, row, key, int(crc[row]))
            except BrokenShard:
                yield None
    finally:
        os.close(file)


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
        if all_shards or _size(store, shard) < SEAL_BYTES // 2:
            groups.setdefault(shard.rpartition("/")[0], []).append(shard)
    with tqdm(total=sum(map(len, groups.values())), desc="compacting", unit=" shards", delay=1) as bar:
        for name, shards in groups.items():
            if len(shards) < 2 and not all_shards:
                bar.update(len(shards))
                continue
            _merge(store, name, shards, keep, written, bar)
    store.refresh(all_anew=True)
    with suppress(OSError, BrokenShard):
        store.keep_index(least=1)
    return written


def _merge(store: Store, name: str, shards: list[str], keep: Keep, written: Contents, bar: Any) -> None:
    seen: set[bytes] = set()
    merged: list[str] = []
    keys: list[bytes] = []
    rows: list[dict[str, Tensor]] = []
    size = 0
    for shard in shards:
        bar.update()
        try:
            for entry in _entries(store.folder / "shards" / shard):
                if entry is None:
                    written.failures += 1
                elif entry[0] not in seen and keep(entry[0]):
                    seen.add(entry[0])
                    keys.append(entry[0])
                    rows.append({field: tensor[None] for field, tensor in entry[1].items()})
                    size += KEY_BYTES + sum(tensor.nbytes for tensor in entry[1].values())
        except BrokenShard:
            written.failures += 1
        except OSError:
            continue  # gone, or out of reach for now: it stays as it is
        merged.append(shard)
        if size >= SEAL_BYTES:
            _publish(store, name, keys, rows, merged, written)
            keys, rows, merged, size = [], [], [], 0
    _publish(store, name, keys, rows, merged, written)


def _publish(
    store: Store, name: str, keys: list[bytes], rows: list[dict[str, Tensor]], merged: list[str], written: Contents
) -> None:
    """Write a shard, and then remove those that it was made of."""
    if keys:
        target = store.shard_path(name, "compact", 0)
        written.bytes += publish(store, target, keys, {field: [row[field] for row in rows] for field in rows[0]})
        written.shards += 1
        written.entries += len(keys)
    for shard in merged:
        (store.folder / "shards" / shard).unlink(missing_ok=True)


def remove(folder: Path) -> int:
    """Remove a space; returns its bytes."""
    store = Store(folder)
    size = sum(_size(store, shard) for shard in store.all_shards())
    rmtree(folder, ignore_errors=True)
    return size
