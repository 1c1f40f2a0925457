"""`Writer`: entries are written behind the training step, and never in its way."""

import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from time import monotonic
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from latentdm.cache.shards import signature_of, write_shard
from latentdm.cache.store import Store

SEAL_BYTES = 64 * 2**20
"""A shard is written when it has grown so large."""

SEAL_S = 30.0
"""A shard is written when its first entry is so old: what a killed process loses."""

FIRST_SEAL_S = 0.5
"""The first of a process is written so soon, and each later one after a longer while: an image may come again soon."""

LONGER = 1.25
"""How much longer: half a minute is reached after two."""

HELD_BYTES = 256 * 2**20
"""What all shards that are not yet written may hold; beyond, the largest is written."""

WAITING = 3
"""Batches that wait for the writer; what comes when so many do is dropped."""

Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class _Part:
    """Rows that came together, on their way to the host."""

    store: Store
    keys: list[bytes]
    fields: dict[str, Tensor]
    prepare: Prepare | None
    arrived: Any = None


@dataclass
class _Open:
    """A shard that grows."""

    store: Store
    folder: str
    since: float
    keys: list[bytes] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    bytes: int = 0


class Writer:
    """Writes entries from a thread of its own, in which torch computes nothing.

    On a CPU torch would start threads there for what is large, and they stay. Once there are more of them than cores,
    OpenMP's threads sleep whenever they wait for one another, and a small model trains at two thirds of the speed.

    A process that is killed loses what was not yet in a shard: of the last half minute. A disk that cannot be written
    to ends the writing, with one warning, and nothing else.

    Args:
        rank: of this process, for the names of files.

    Attributes:
        entries: written so far.
        bytes: written so far.
        dropped: entries that came too fast.
        failures: shards that could not be written.
        stopped: why nothing is written any more; "" while it is.
        warned: whether that was said.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.entries = self.bytes = self.dropped = self.failures = 0
        self.stopped = ""
        self._host = re.sub(r"[^\w.]", "_", platform.node())[:40] or "host"
        self.warned = False
        self._queue: Queue[_Part | bool | None] = Queue(WAITING)
        self._open: dict[tuple[Path, str], _Open] = {}
        self._pending: set[bytes] = set()
        self._seal_s = FIRST_SEAL_S
        self._thread: Thread | None = None

    def put(
        self,
        store: Store,
        keys: Sequence[bytes],
        fields: Mapping[str, Tensor],
        prepare: Prepare | None = None,
        wait: bool = False,
    ) -> None:
        """Hand over entries; returns at once.

        Args:
            store: where they belong.
            keys: ``n`` of them.
            fields: name → ``n …`` on any device, which nobody changes afterwards. Of them ``keep``, ``n`` bool, is not
                written: it leaves out rows.
            prepare: turns the fields on the host into those that are written; called by the writer's thread.
            wait: rather than drop what comes too fast.
        """
        self._warn()
        if self.stopped or not keys:
            return
        if not wait and self._queue.full():
            self.dropped += len(keys)
            return
        on_host = {name: _to_host(tensor) for name, tensor in fields.items()}
        part = _Part(store, list(keys), on_host, prepare)
        devices = {tensor.device for tensor in fields.values() if tensor.device.type == "cuda"}
        if devices:
            part.arrived = [torch.cuda.Event() for _ in devices]  # type: ignore[no-untyped-call]
            for event, device in zip(part.arrived, devices, strict=True):
                event.record(torch.cuda.current_stream(device))
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._run, name="latentdm cache writer", daemon=True)
            self._thread.start()
        try:
            self._queue.put(part, block=wait)
        except Full:
            self.dropped += len(keys)

    def flush(self) -> None:
        """Write what waits; returns when it is on the disk. Warns, once, where it could not be written."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(True)
            self._queue.join()
        self._warn()

    def close(self) -> None:
        """Flush, and end the thread."""
        self.flush()
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._thread = None

    def __getstate__(self) -> dict[str, object]:
        return {"rank": self.rank}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["rank"])  # type: ignore[misc]  # a copy elsewhere writes nothing of this one's

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            try:
                part = self._queue.get(timeout=self._due() if self._open else SEAL_S)
            except Empty:
                self._guarded(self._seal_old)
                continue
            try:
                if part is None:
                    return
                if part is True:
                    self._guarded(self._seal_all)
                elif isinstance(part, _Part) and not self.stopped:
                    self._guarded(lambda part=part: self._add(part))  # type: ignore[misc]
                    self._guarded(self._seal_old)
            finally:
                self._queue.task_done()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            # Whatever it is: training goes on without it.
            self.failures += 1
            self.stopped = self.stopped or f"{type(error).__name__}: {error}"
            self._open.clear()
            self._pending.clear()

    def _add(self, part: _Part) -> None:
        for event in part.arrived or ():
            event.synchronize()
        fields, keys = part.fields, part.keys
        if part.prepare is not None:
            fields = part.prepare(fields)
        keep = fields.pop("keep", None)
        rows = [
            row
            for row, key in enumerate(keys)
            if (keep is None or bool(keep[row])) and key not in self._pending and keys.index(key) == row
        ]
        if not rows:
            return
        if len(rows) < len(keys):
            keys = [keys[row] for row in rows]
            parts = [{name: tensor[row : row + 1] for name, tensor in fields.items()} for row in rows]
        else:
            parts = [fields]
        folder = signature_of(fields)
        grows = self._open.setdefault((part.store.folder, folder), _Open(part.store, folder, monotonic()))
        grows.keys += keys
        grows.parts += parts
        grows.bytes += sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())
        self._pending.update(keys)
        if grows.bytes >= SEAL_BYTES:
            self._seal(grows)
        while sum(each.bytes for each in self._open.values()) > HELD_BYTES:
            self._seal(max(self._open.values(), key=lambda each: each.bytes))

    def _due(self) -> float:
        """Seconds until the oldest entry is to be written."""
        return max(min(each.since for each in self._open.values()) + self._seal_s - monotonic(), 0.01)

    def _seal_old(self) -> None:
        now = monotonic()
        old = [each for each in self._open.values() if now - each.since >= self._seal_s]
        for grows in old:
            self._seal(grows)
        if old:
            self._seal_s = min(LONGER * self._seal_s, SEAL_S)

    def _seal_all(self) -> None:
        for grows in list(self._open.values()):
            self._seal(grows)

    def _seal(self, grows: _Open) -> None:
        """Write a shard."""
        del self._open[grows.store.folder, grows.folder]
        target = grows.store.shard_path(grows.folder, self._host, self.rank)
        try:
            fields = {name: [part[name] for part in grows.parts] for name in grows.parts[0]}
            size = publish(grows.store, target, grows.keys, fields)
        except FileNotFoundError:
            # Somebody has removed the cache, or swept it by a clock of tomorrow: what was lost is encoded again.
            self.failures += 1
            return
        finally:
            self._pending.difference_update(grows.keys)
        self.entries += len(grows.keys)
        self.bytes += size

    def _warn(self) -> None:
        if self.stopped and not self.warned:
            self.warned = True
            warnings.warn(
                f"the latent cache writes nothing any more ({self.stopped}); what it holds is read, and the rest is "
                "encoded each time. Make room, or set cache.dir",
                stacklevel=3,
            )


def publish(store: Store, target: Path, keys: Sequence[bytes], fields: Mapping[str, Sequence[Tensor]]) -> int:
    """Write a shard of a store: under another name first, so that nobody ever sees half of it; returns its bytes."""
    tmp = store.folder / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = tmp / uuid4().hex
    try:
        size = write_shard(new, keys, fields)
        new.rename(target)
        _sync_folder(target.parent)
    finally:
        new.unlink(missing_ok=True)
    return size


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


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.detach()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return pinned.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
