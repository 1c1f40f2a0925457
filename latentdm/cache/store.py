"""`Store`: the entries of one space, found by key; read by any number of processes while others write.

<space>/space.json                                what its entries have in common
        shards/<fields>/<host>-<id>.safetensors   immutable
        index/<generation>.safetensors            derived
        tmp/<id>                                  never read
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic, time
from typing import Any
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentdm.cache.index import Index, newest
from latentdm.cache.keys import key_of
from latentdm.cache.shards import BrokenShard, Layout, read_keys, read_layout, read_row

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


def is_old(path: Path) -> bool:
    """Whether nobody has touched a file or folder for a day: whoever made it was killed, or does not need it."""
    return time() - path.stat().st_mtime > DAY_S


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
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"space.{uuid4().hex}"
            part.write_text(json.dumps(space, indent=1), encoding="utf-8")
            part.replace(described_in)
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
        self._clear()

    def _clear(self) -> None:
        self.index = Index.of([])
        self.new = Index.of([])
        self._known: set[str] = set()
        self._seen: dict[str, float] = {}  # folder → its time of change when it was listed
        self._looked = -LOOK_AGAIN_S
        self._files: OrderedDict[str, tuple[int, Layout]] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # a copy in another process opens its own files
        self.refresh()

    def __len__(self) -> int:
        """Entries known, those that were written twice counted twice."""
        return len(self.index) + len(self.new)

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

    def _places(self, key: bytes) -> Iterator[tuple[str, int, int]]:
        for index in (self.index, self.new):
            for place in index.places(key):
                yield place.shard, place.row, place.crc

    def _read(self, key: bytes) -> Entry | None:
        for shard, row, crc in self._places(key):
            try:
                file, layout = self._open(shard)
                return read_row(file, layout, row, key, crc)
            except FileNotFoundError:
                continue  # a compaction has moved its entries: a miss, and no failure
            except (OSError, BrokenShard):
                self.failures += 1
                self._close(shard)
        return None

    def _open(self, shard: str) -> tuple[int, Layout]:
        found = self._files.get(shard)
        if found is not None:
            self._files.move_to_end(shard)
            return found
        file = os.open(self.folder / "shards" / shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            opened = file, read_layout(file)
        except BaseException:
            os.close(file)
            raise
        self._files[shard] = opened
        while len(self._files) > OPEN_FILES:
            self._close(next(iter(self._files)))
        return opened

    def _close(self, shard: str) -> None:
        if found := self._files.pop(shard, None):
            os.close(found[0])

    def close(self) -> None:
        """Close all files."""
        for shard in list(self._files):
            self._close(shard)

    def __del__(self) -> None:
        if self.__dict__.get("_files"):
            self.close()

    # ---------------------------------------------------------------- what there is

    def refresh(self, all_anew: bool = False) -> bool:
        """Look for new shards; whether there are any.

        Args:
            all_anew: forget what is known, and read the newest index as well.
        """
        self._looked = monotonic()
        if all_anew or not self._known:
            self.close()
            self._clear()
            self._looked = monotonic()
            self.index = newest(self.folder / "index") or self.index
            self._known = set(self.index.shards)
        there = self._listed()
        if there is None:
            return False
        fresh = sorted(there - self._known)
        parts = []
        for shard in list(fresh):
            try:
                file, layout = self._open(shard)
                parts.append((shard, *read_keys(file, layout)))
            except FileNotFoundError:
                continue
            except BrokenShard:
                self.failures += 1
                self._close(shard)
            except OSError:  # of a network, perhaps: it is asked again
                self.failures += 1
                self._close(shard)
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
        there = set(self.all_shards())
        gone = set(self.index.shards) - there
        if len(self.new) < least and not gone:
            return
        whole = self.index.joined(self.new).without((gone | set(self.new.shards)) - there)
        kept = whole.save(self.folder / "index", self.folder / "tmp")
        self.index, self.new = Index.open(kept), Index.of([])
        for path in (self.folder / "index").glob("*.safetensors"):
            # Others may have mapped the one before; on a network's file system it must not go away under them.
            if path != kept and is_old(path):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what writers that were killed have left, after a day."""
        try:
            for path in (self.folder / "tmp").iterdir():
                if is_old(path):
                    path.unlink(missing_ok=True)
        except OSError:
            return

    def shard_path(self, folder: str, host: str, rank: int) -> Path:
        """The name of a new shard."""
        return self.folder / "shards" / folder / f"{host}-{rank}-{uuid4().hex}.safetensors"
