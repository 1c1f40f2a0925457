"""What each worker reads, noted in shared memory: a process that is killed, or stopped, cannot say."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

NO_POSITION = -1
"""Noted by a worker that reads no sample."""


class Reading:
    """What each worker reads.

    Args:
        workers: the most that there are.

    Attributes:
        stood_still: they were ended because none got any further.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stood_still = False
        now = torch.full((workers, 3), NO_POSITION, dtype=torch.int64)  # process, position, a count of what was read
        self._now: torch.Tensor = now.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def note(self, worker: int, process: int, position: int) -> None:
        """A worker, which is the process of this id, reads a sample."""
        now = self._now[worker]
        now[0], now[1] = process, position
        now[2] += 1

    def tick(self) -> None:
        """Note that this worker has read something; without effect outside workers."""
        if (info := get_worker_info()) is not None:
            self._now[info.id, 2] += 1

    @contextmanager
    def at(self, position: int) -> Iterator[None]:
        """Note that this worker reads a sample; without effect outside workers."""
        info = get_worker_info()
        if info is None:
            yield
            return
        self.note(info.id, os.getpid(), position)
        try:
            yield
        finally:
            self.note(info.id, os.getpid(), NO_POSITION)

    def positions(self, processes: set[int] | None) -> list[int]:
        """What workers were reading when they died; None: any of them."""
        notes = [(process, position) for process, position, _ in self._now.tolist() if position != NO_POSITION]
        return [position for process, position in notes if processes is None or process in processes]

    def state(self) -> list[list[int]]:
        """The process, the position and the count of each worker: what does not change stands still."""
        state: list[list[int]] = self._now.tolist()
        return state
