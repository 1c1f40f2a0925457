"""Workers that die: which sample each one is reading, so that the error can say so.

A process that is killed tells nobody why. Each worker notes in shared memory what it reads, which takes microseconds;
PyTorch's error holds the ids of the processes that died, and so the note can be found.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from latentdm.data.skips import SampleError, TooManySkipped
from latentdm.errors import RunError

DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How PyTorch's error begins."""

LOST = (ConnectionError, EOFError)
"""What PyTorch lets through when a worker dies while it hands over a batch: it does not say which one."""

SIGNAL_S = 0.5
"""Seconds within which the signal of that death comes, if at all; PyTorch answers it with an error that says which."""

NOTHING = -1


class Reading:
    """What each worker reads.

    Args:
        owner: the class that an error names.
        workers: the most that there are.
    """

    def __init__(self, owner: str, workers: int) -> None:
        self.owner = owner
        self.workers = workers
        now = torch.full((workers, 2), NOTHING, dtype=torch.int64)  # process, place
        self._now: torch.Tensor = now.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Note that this worker reads a sample; without effect outside workers."""
        info = get_worker_info()
        if info is None:
            yield
            return
        now = self._now[info.id]
        now[0], now[1] = os.getpid(), place
        try:
            yield
        finally:
            now[1] = NOTHING

    def places(self, processes: set[int] | None) -> list[int]:
        """What workers were reading when they died; None: any of them."""
        notes = self._now.tolist()
        return [place for process, place in notes if place != NOTHING and (processes is None or process in processes)]


class WorkerLoader(DataLoader[Any]):
    """A loader that says what to do when a worker dies, and of a broken sample no more than what is wrong with it."""

    def __iter__(self) -> Any:
        """The batches.

        Raises:
            RuntimeError: a worker died; it names the sample that it was reading.
            SampleError: a sample cannot be read; in the words of the worker, without its traceback.
            TooManySkipped: more of them than may be skipped; likewise.
        """
        return self._explained(super().__iter__())

    def _explained(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            try:
                yield from batches
            except LOST:
                sleep(SIGNAL_S)  # otherwise the signal's error may come in the middle of anything that follows
                raise
        except (SampleError, TooManySkipped) as error:
            kind = type(error)
            said = str(error).rpartition(f"{kind.__name__}: ")[2].strip()  # torch puts a traceback before it
            if said != str(error):
                raise kind(said) from error
            raise
        except (RuntimeError, *LOST) as error:
            why = explanation(error, getattr(self.dataset, "reading", None), getattr(self.dataset, "name", str))
            if why:
                raise RunError(why) from error
            raise


def explanation(error: BaseException, reading: Reading | None, name: Callable[[int], str]) -> str:
    """What to do about an error that says that a worker died; empty for any other one.

    Args:
        error: what was raised.
        reading: what the workers were reading.
        name: a sample's name, from its place.
    """
    said = str(error).strip()
    if reading is None:
        return ""
    if isinstance(error, LOST):
        processes, said = None, f"DataLoader worker exited unexpectedly: {said}"
    elif isinstance(error, RuntimeError) and (died := DIED.match(said)):
        processes = set(map(int, died[1].split(",")))
    else:
        return ""
    names = [name(place) for place in reading.places(processes)]
    what = f" while it read {', '.join(names)}" if any(names) else ""  # a stream's samples have names where it is read
    return (
        f"{reading.owner}: a process that reads images died{what} ({said}). Most often memory ran out: "
        "set a smaller num_workers or batch_size, or give the machine or its /dev/shm more. With num_workers=0 a file "
        "that ends the process every time is found out"
    )
