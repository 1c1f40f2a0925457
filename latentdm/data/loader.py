"""The loader of pixel batches: it can go on in the middle of an epoch, and says what a worker that died was reading.

A process that is killed cannot say why. Each worker notes in shared memory what it reads, which takes microseconds;
PyTorch's error holds the ids of the processes that died, and so the note can be found.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from time import monotonic, sleep
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, get_worker_info

from latentdm.errors import RunError, UserError

WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How PyTorch's error begins."""

CONNECTION_LOST = (ConnectionError, EOFError)
"""What PyTorch lets through when a worker dies while it hands over a batch: it does not say which one."""

SIGNAL_S = 0.5
"""Seconds within which the signal of that death comes, if at all; PyTorch answers it with an error that says which."""

TIMED_OUT = "DataLoader timed out"
"""How PyTorch's error begins when a batch does not come in time."""

POLL_S = 10.0
"""Seconds after which to see whether workers get any further; so much longer than a file may take they may stand still:
a worker ends the waiting for a file by itself, and decodes between two of them."""

STARTED_S = 120.0
"""Seconds in which workers start."""

NO_POSITION = -1
"""Noted by a worker that reads no sample."""


class Reading:
    """What each worker reads.

    Args:
        workers: the most that there are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
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


class PixelLoader(DataLoader[Any]):
    """A loader of a `BucketBatches` or an `EpochSampler`, which can go on in the middle of an epoch.

    Its state is how many batches of the epoch were yielded; Lightning saves it with a checkpoint. Errors of its workers
    are `explained`.
    """

    _yielded = 0
    _resume: dict[str, int] | None = None
    _of_samples: Any = None

    @property
    def sampler(self) -> Any:
        """The order of samples or of batches, where Lightning looks for it to set the epoch."""
        batches = self.batch_sampler
        return self._of_samples if batches is None or isinstance(batches, BatchSampler) else batches

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._of_samples = sampler

    def __iter__(self) -> Any:
        """The batches of this epoch; those that a loaded state had seen are left out, once.

        Raises:
            RunError: a worker died; it names the sample that it was reading.
            SampleError: a sample cannot be read.
            TooManySkipped: more samples cannot be read than may be skipped.
        """
        state, self._resume = self._resume, None
        start = state["batches"] if state and state["epoch"] == self._epoch else 0
        self.sampler.start = start * (self.batch_size or 1)  # which is None where the sampler yields batches
        self._yielded = start
        for batch in explained(super().__iter__(), self.dataset):
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were yielded."""
        return {"epoch": self._epoch, "batches": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that were yielded, in the iteration that comes next."""
        self._resume = dict(state_dict)

    @property
    def _epoch(self) -> int:
        epoch: int = getattr(self.sampler, "epoch", 0)  # Lightning may have set another sampler
        return epoch


def explained(batches: Iterator[Any], dataset: Any) -> Iterator[Any]:
    """The batches of a loader, with errors of its workers in words that help.

    Args:
        batches: what workers read.
        dataset: from which they read, a `latentdm.data.PixelDataset`.

    Raises:
        RunError: a worker died; it names the sample that it was reading.
        UserError: what a worker raised, in its words alone.
    """
    try:
        try:
            yield from _moving(batches, dataset)
        except CONNECTION_LOST:
            sleep(SIGNAL_S)  # otherwise the signal's error may come in the middle of anything that follows
            raise
    except UserError as error:
        kind = type(error)
        message = str(error).rpartition(f"{kind.__name__}: ")[2].strip()  # torch puts a traceback before it
        if message != str(error):
            # Without the traceback: torch's reraise makes a cycle of it, which keeps workers alive for seconds.
            raise kind(message) from error.with_traceback(None)
        raise
    except (RuntimeError, *CONNECTION_LOST) as error:
        why = explanation(error, dataset)
        if why:
            raise RunError(why) from error
        raise


def _moving(batches: Iterator[Any], dataset: Any) -> Iterator[Any]:
    """The batches, as long as any worker gets any further; RunError where none does for longer than a file may take."""
    reading: Reading | None = getattr(dataset, "reading", None)
    state: list[list[int]] | None = None
    since = monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if reading is None or not str(error).startswith(TIMED_OUT):
                raise
            if state != (state := reading.state()):
                since = monotonic()
            started = all(process != NO_POSITION for process, *_ in state)
            if monotonic() - since <= max(dataset.read_timeout + POLL_S, 0 if started else STARTED_S):
                continue
            raise _stuck(dataset, reading) from error
        state = None
        yield batch


def _stuck(dataset: Any, reading: Reading) -> RunError:
    """What to say of workers that stand still, which are ended: a stopped one would keep this process from ending."""
    names = [dataset.name(position) for position in reading.positions(None)]
    mine = {process for process, *_ in reading.state()}
    for child in [child for child in active_children() if child.pid in mine]:
        child.kill()
        while child.is_alive():
            with suppress(RuntimeError):  # of PyTorch's, that it is gone: by a signal, and so at any time
                child.join()
    with suppress(RuntimeError):
        sleep(SIGNAL_S)
    what = f"{', '.join(names)} was being read" if any(names) else "nothing was read"
    return RunError(
        f"{dataset.owner}: the processes that read images stand still: {what} for more than read_timeout="
        f"{dataset.read_timeout:g} seconds. They were stopped, or storage does not answer; for slow storage set a "
        "longer read_timeout"
    )


def explanation(error: BaseException, dataset: Any) -> str:
    """What to do about an error that says that a worker died; empty for any other one.

    Args:
        error: what was raised.
        dataset: from which the worker read; it knows what.
    """
    message, reading = str(error).strip(), getattr(dataset, "reading", None)
    if reading is None:
        return ""
    if isinstance(error, CONNECTION_LOST):
        processes, message = None, f"DataLoader worker exited unexpectedly: {message}"
    elif isinstance(error, RuntimeError) and (died := WORKER_DIED.match(message)):
        processes = set(map(int, died[1].split(",")))
    else:
        return ""
    names = [dataset.name(position) for position in reading.positions(processes)]
    what = f" while it read {', '.join(names)}" if any(names) else ""  # a stream's samples have names where it is read
    return (
        f"{dataset.owner}: a process that reads images died{what} ({message}). Most often memory ran out: "
        "set a smaller num_workers or batch_size, or give the machine or its /dev/shm more. With num_workers=0 a file "
        "that ends the process every time is found out"
    )
