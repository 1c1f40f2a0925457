"""`Writer`: entries are written behind the training step, and never in its way."""

import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from latentdm.cache.shards import published, signature, write_shard
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


@dataclass
class Growing:
    """A shard that is not written yet.

    Attributes:
        store: where it belongs.
        folder: the `latentdm.cache.shards.signature` of its fields.
        since: when it was begun.
        keys: of its entries.
        parts: name → ``n …``, of entries that came together.
        size: of all parts, in bytes.
    """

    store: Store
    folder: str
    since: float = field(default_factory=monotonic)
    keys: list[bytes] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    size: int = 0

    def add(self, keys: Sequence[bytes], fields: dict[str, Tensor]) -> None:
        """Add entries; name → ``n …`` on the CPU."""
        self.keys += keys
        self.parts.append(fields)
        self.size += sum(tensor.nbytes for tensor in fields.values())

    def write(self, host: str, rank: int) -> int:
        """Write it under a name of its own; returns its bytes."""
        target = self.store.folder / "shards" / self.folder / f"{host}-{rank}-{uuid4().hex}.safetensors"
        with published(target, self.store.folder / "tmp") as new:
            write_shard(new, self.keys, {name: [part[name] for part in self.parts] for name in self.parts[0]})
        return target.stat().st_size


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
        self._queue: Queue[Callable[[], None]] = Queue(WAITING)
        self._open: dict[tuple[Path, str], Growing] = {}
        self._pending: set[bytes] = set()
        self._seal_s = FIRST_SEAL_S
        self._thread: Thread | None = None

    def put(self, store: Store, keys: Sequence[bytes], fields: Mapping[str, Tensor], wait: bool = False) -> None:
        """Hand over entries; returns at once.

        Args:
            store: where they belong.
            keys: ``n`` of them.
            fields: name → ``n …`` on any device, which nobody changes afterwards. Of them ``keep``, ``n`` bool, is not
                written: it leaves out rows.
            wait: rather than drop what comes too fast.
        """
        self._warn()
        if self.stopped or not keys:
            return
        if not wait and self._queue.full():
            self.dropped += len(keys)
            return
        on_host = {name: _to_host(tensor) for name, tensor in fields.items()}
        arrived = []
        for device in {tensor.device for tensor in fields.values() if tensor.device.type == "cuda"}:
            arrived.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            arrived[-1].record(torch.cuda.current_stream(device))
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._run, name="latentdm cache writer", daemon=True)
            self._thread.start()
        self._queue.put(partial(self._add, store, list(keys), on_host, arrived))

    def flush(self) -> None:
        """Write what waits; returns when it is on the disk. Warns, once, where it could not be written."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(self._seal_all)
            self._queue.join()
        self._warn()

    def __getstate__(self) -> dict[str, object]:
        return {"rank": self.rank}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["rank"])  # type: ignore[misc]  # a copy elsewhere writes nothing of this one's

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            try:
                work = self._queue.get(timeout=self._due())
            except Empty:
                self._guarded(self._seal_old)
                continue
            self._guarded(work)
            self._guarded(self._seal_old)
            self._queue.task_done()

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.stopped:
            return
        try:
            work()
        except Exception as error:
            # Whatever it is: training goes on without it.
            self.failures += 1
            self.stopped = f"{type(error).__name__}: {error}"
            self._open.clear()
            self._pending.clear()

    def _add(self, store: Store, keys: list[bytes], fields: dict[str, Tensor], arrived: Sequence[Any]) -> None:
        for event in arrived:
            event.synchronize()
        keep = fields.pop("keep", None)
        rows = [
            row
            for row, key in enumerate(keys)
            if (keep is None or bool(keep[row])) and key not in self._pending and keys.index(key) == row
        ]
        if not rows:
            return
        folder = signature(fields)
        grows = self._open.setdefault((store.folder, folder), Growing(store, folder))
        if len(rows) == len(keys):
            grows.add(keys, fields)
        else:
            for row in rows:
                grows.add([keys[row]], {name: tensor[row : row + 1] for name, tensor in fields.items()})
        self._pending.update(keys[row] for row in rows)
        if grows.size >= SEAL_BYTES:
            self._seal(grows)
        while sum(each.size for each in self._open.values()) > HELD_BYTES:
            self._seal(max(self._open.values(), key=lambda each: each.size))

    def _due(self) -> float:
        """Seconds until the oldest entry is to be written."""
        oldest = min((each.since for each in self._open.values()), default=monotonic())
        return max(oldest + self._seal_s - monotonic(), 0.01)

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

    def _seal(self, grows: Growing) -> None:
        """Write a shard."""
        del self._open[grows.store.folder, grows.folder]
        try:
            self.bytes += grows.write(self._host, self.rank)
            self.entries += len(grows.keys)
        except FileNotFoundError:
            # Somebody has removed the cache, or swept it by a clock of tomorrow: what was lost is encoded again.
            self.failures += 1
        finally:
            self._pending.difference_update(grows.keys)

    def _warn(self) -> None:
        if self.stopped and not self.warned:
            self.warned = True
            warnings.warn(
                f"the latent cache writes nothing any more ({self.stopped}); what it holds is read, and the rest is "
                "encoded each time. Make room, or set cache.dir",
                stacklevel=3,
            )


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.detach().contiguous()  # here and not in the thread, in which torch computes nothing
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return pinned.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
