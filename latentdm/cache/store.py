"""`Store`: the entries of one space, found by key; read by any number of processes while others write.

<space>/space.json                                what its entries have in common
        shards/<fields>/<host>-<id>.safetensors   immutable
        index/<generation>.safetensors            derived
        tmp/<id>                                  never read
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from time import monotonic, time
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentdm.cache.index import Index, Place, newest
from latentdm.cache.keys import key_of
from latentdm.cache.shards import BrokenShard, Shard, published

OPEN_FILES = 128
"""Shards that a process holds open."""

LOOK_AGAIN_S = 0.1
"""Seconds after which a missing entry is a reason to look for new shards."""

SETTLED_S = 3.0
"""Seconds after which a folder's time of change is trusted to differ from that of the next change."""

INDEX_FROM = 4096
"""New entries from which an index is written anew."""

DAY_S = 86400.0

Entry = dict[str, Tensor]


def remove_old(paths: Iterable[Path]) -> None:
    """Remove files and folders that nobody has touched for a day: who made them was killed, or does not need them."""
    with suppress(OSError):
        for path in paths:
            with suppress(OSError):
                if time() - path.stat().st_mtime > DAY_S:
                    if path.is_dir():
                        rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()


def open_space(root: Path, space: Mapping[str, Any]) -> "Store":
    """The entries of one space, which is described in a file for people to read.

    Args:
        root: of the cache.
        space: all that the entries have in common, as JSON; it names the folder.
    """
    folder = root / key_of(space).hex()
    described_in = folder / "space.json"
    try:
        if not described_in.exists():
            with published(described_in, folder / "tmp") as new:
                new.write_text(json.dumps(space, indent=1), encoding="utf-8")
    except OSError as error:
        if not folder.exists():
            rank_zero_warn(f"Cache: cannot write to dir={str(root)!r} ({error}); nothing is kept. Set another one")
    store = Store(folder)
    store.refresh()
    return store


class Store:
    """The entries of a space.

    Args:
        folder: of the space; it need not exist.

    Attributes:
        index: of the shards that it was built from.
        new: of those that have come since.
        failures: rows and shards that could not be read so far, by this copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures = 0
        self.index = Index.of([])
        self.new = Index.of([])
        self._known: set[str] = set()
        self._seen: dict[str, float] = {}  # folder → its time of change when it was listed
        self._looked = -LOOK_AGAIN_S
        self._shards: OrderedDict[str, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # a copy in another process opens its own files
        self.refresh()

    # ---------------------------------------------------------------- reading

    def read(self, key: bytes) -> Entry | None:
        """An entry, or None. Whatever goes wrong is a miss."""
        found = self._read(key)
        if found is None and monotonic() - self._looked >= LOOK_AGAIN_S and self.refresh():
            found = self._read(key)
        return found

    def __contains__(self, key: bytes) -> bool:
        """Whether an index names the entry; reading it may still fail."""
        return next(self._places(key), None) is not None

    def _places(self, key: bytes) -> Iterator[Place]:
        yield from self.index.places(key)
        yield from self.new.places(key)

    def _read(self, key: bytes) -> Entry | None:
        for place in self._places(key):
            try:
                return self._open(place.shard).read(place.row, key, place.crc)
            except FileNotFoundError:
                continue  # a compaction has moved its entries: a miss, and no failure
            except (OSError, BrokenShard):
                self.failures += 1
                self._shards.pop(place.shard, None)
        return None

    def _open(self, name: str) -> Shard:
        shard = self._shards.get(name)
        if shard is None:
            shard = self._shards[name] = Shard(self.folder / "shards" / name)
            if len(self._shards) > OPEN_FILES:
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return shard

    def close(self) -> None:
        """Close all files."""
        self._shards.clear()

    # ---------------------------------------------------------------- what there is

    def refresh(self) -> bool:
        """Look for new shards; whether there are any."""
        self._looked = monotonic()
        if not self._known:
            self._seen = {}
            self.index = newest(self.folder / "index") or self.index
            self._known = set(self.index.shards)
        there = self._listed()
        if there is None:
            return False
        fresh = sorted(there - self._known)
        parts = []
        for shard in list(fresh):
            try:
                parts.append((shard, *self._open(shard).keys()))
            except FileNotFoundError:
                continue
            except (BrokenShard, OSError) as error:
                self.failures += 1
                self._shards.pop(shard, None)
                if isinstance(error, OSError):  # of a network, perhaps: it is asked again
                    fresh.remove(shard)
        self._known |= set(fresh)
        if parts:
            self.new = self.new.joined(Index.of(parts))
        if len(self.new) >= INDEX_FROM:
            self._adopt()
        return bool(parts)

    def _adopt(self) -> None:
        """Take an index that was written meanwhile, which all processes share, for what this one holds by itself."""
        index = newest(self.folder / "index", but=self.index.name)
        if index is None:
            return
        lost = set(self.index.shards).difference(index.shards)
        if not any((self.folder / "shards" / shard).exists() for shard in lost):
            self.index, self.new = index, self.new.without(set(index.shards))
            self._known.update(index.shards)

    def _listed(self) -> set[str] | None:
        """The names of all shards, where a folder has changed since they were listed last; else None."""
        root = self.folder / "shards"
        try:
            folders = {entry.name: entry.stat().st_mtime for entry in os.scandir(root) if entry.is_dir()}
        except OSError:
            return set()
        if folders == self._seen:
            return None
        now = time()
        changed = [name for name, then in folders.items() if self._seen.get(name) != then]
        self._seen = {name: then for name, then in folders.items() if now - then > SETTLED_S}
        names: set[str] = set()
        for folder in changed:
            try:
                names.update(f"{folder}/{name}" for name in os.listdir(root / folder) if name.endswith(".safetensors"))
            except OSError:
                continue
        return names

    def all_shards(self) -> list[str]:
        """The names of all shards, listed now."""
        self._seen = {}
        return sorted(self._listed() or ())

    def keep_index(self, least: int = INDEX_FROM) -> None:
        """Write the index anew if it lacks many entries, so that the next one to open the store reads only that.

        Raises:
            OSError: it cannot be written.
            BrokenShard: nor read.
        """
        if len(self.new) < least and set(self.index.shards) <= set(self.all_shards()):
            return
        kept = self.whole().save(self.folder / "index", self.folder / "tmp")
        self.index, self.new = Index.open(kept), Index.of([])
        # Others may have mapped the one before; on a network's file system it must not go away under them.
        remove_old(path for path in (self.folder / "index").glob("*.safetensors") if path != kept)

    def whole(self) -> Index:
        """All entries whose shards are there."""
        both = self.index.joined(self.new)
        return both.without(set(both.shards).difference(self.all_shards()))

    def sweep(self) -> None:
        """Remove what writers that were killed have left, after a day."""
        remove_old((self.folder / "tmp").glob("*"))
