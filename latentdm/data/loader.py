"""The loader of pixel batches: it can go on in the middle of an epoch, and says what a worker that died was reading.

A process that is killed cannot say why. Each worker notes in shared memory what it reads, which takes microseconds;
PyTorch's error holds the ids of the processes that died, and so the note can be found.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import sleep
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, get_worker_info

from latentdm.data.order import GlobalOrder, Taken
from latentdm.errors import RunError, UserError
from latentdm.progress import Progress

WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How PyTorch's error begins."""

CONNECTION_LOST = (ConnectionError, EOFError)
"""What PyTorch lets through when a worker dies while it hands over a batch: it does not say which one."""

SIGNAL_S = 0.5
"""Seconds within which the signal of that death comes, if at all; PyTorch answers it with an error that says which."""

NO_POSITION = -1
"""Noted by a worker that reads no sample."""


class Reading:
    """What each worker reads.

    Args:
        workers: the most that there are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        now = torch.full((workers, 2), NO_POSITION, dtype=torch.int64)  # process, position
        self._now: torch.Tensor = now.share_memory_()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def note(self, worker: int, process: int, position: int) -> None:
        """A worker, which is the process of this id, reads a sample."""
        now = self._now[worker]
        now[0], now[1] = process, position

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
        notes = [(process, position) for process, position in self._now.tolist() if position != NO_POSITION]
        return [position for process, position in notes if processes is None or process in processes]


class PixelLoader(DataLoader[Any]):
    """A loader of a `latentdm.data.order.RankBatches`, which can go on in the middle of an epoch.

    Its state, which Lightning saves with a checkpoint, holds plain containers: the ``epoch``, its ``steps`` so far as
    pairs of (global batch, count), the number of ``samples`` that these were on all ranks, and the ``settings``. It
    serves any number of ranks. Errors of workers are `explained`.

    Attributes:
        owner: the class that a warning names.
        settings: what a run that goes on should not change; plain values, which are saved.
        progress: what the trainer has counted; None: without one.
    """

    owner = "PixelLoader"
    settings: Mapping[str, Any] = {}
    progress: Progress | None = None
    _state: Mapping[str, Any] | None = None
    _epoch = 0
    _taken: Taken = ()
    _yielded = 0
    _trained = 0  # Lightning's count when the iteration began

    @property
    def sampler(self) -> Any:
        """The order, where Lightning looks for it to set the epoch."""
        return getattr(self.batch_sampler, "sampler", None)

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        """Without effect: torch sets one of its own where there is a batch sampler."""

    def __iter__(self) -> Any:
        """The batches of this epoch; those that a loaded state had seen are left out, once.

        Raises:
            RunError: a worker died; it names the sample that it was reading.
            SampleError: a sample cannot be read.
            TooManySkipped: more samples cannot be read than may be skipped.
        """
        # A generator, so that all of this waits for the first batch: Lightning calls iter() before it sets the epoch.
        order: GlobalOrder = self.sampler
        state, self._state = self._state, None
        self._epoch, self._yielded = order.epoch, 0
        self._taken = state["steps"] if state and state["epoch"] == order.epoch else ()
        if self.progress:
            self.progress.began()
            self._trained = self.progress.batches
        order.taken = self._taken
        for batch in explained(super().__iter__(), self.dataset):
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is. Of what was yielded, a batch that a failing step was not done with does not count."""
        if self._state is not None:
            return dict(self._state)
        order: GlobalOrder = self.sampler
        done = self._yielded if self.progress is None else min(self._yielded, self.progress.batches - self._trained)
        steps, now = [list(pair) for pair in self._taken], order.global_batch
        if not steps or steps[-1][0] != now:
            steps.append([now, 0])
        steps[-1][1] += max(done, 0)
        return {
            "epoch": self._epoch,
            "steps": steps,
            "samples": order.seen(self._epoch, steps),
            "settings": {**self.settings, "samples": len(self.dataset)},  # type: ignore[arg-type]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were seen, in the iteration that comes next; warn of what has changed."""
        if not {"epoch", "steps", "settings"} <= set(state_dict):
            rank_zero_warn(
                f"{self.owner}: the checkpoint's state of the loader is another loader's (it holds "
                f"{', '.join(map(str, state_dict)) or 'nothing'}); the epoch begins anew, and its samples so far repeat"
            )
            return
        self._state = state_dict
        settings = {**self.settings, "samples": len(self.dataset)}  # type: ignore[arg-type]
        before = state_dict["settings"]
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            told = ", ".join(f"{name}={before.get(name)!r}, now {settings[name]!r}" for name in changed)
            rank_zero_warn(
                f"{self.owner}: the run that goes on was begun with {told}. What these change is different from here "
                "on; where it is the samples or the seed, the order is, and the rest of this epoch may repeat samples"
            )
        if self.progress:
            self.progress.loaded(state_dict["epoch"])
        self._fit_steps(state_dict["epoch"], state_dict["steps"])

    def _fit_steps(self, epoch: int, steps: Taken) -> None:
        """Where the global batch has changed: say what is kept, and let Lightning count in batches of the new size."""
        order: GlobalOrder = self.sampler
        if steps[-1][0] == order.global_batch or (self.progress and not self.progress.within(epoch)):
            return
        rest = len(order.rest(epoch, steps)[0])
        seen, total = order.seen(epoch, steps), len(self.dataset)  # type: ignore[arg-type]
        rank_zero_warn(
            f"{self.owner}: the run that goes on had {steps[-1][0]} samples a step on all ranks, now "
            f"{order.global_batch}. The {total - seen} of {total} samples of epoch {epoch} that were not seen follow, "
            f"in {rest} steps; noise, masks and crops stay. For the same steps set batch_size × ranks to {steps[-1][0]}"
        )
        if self.progress:
            self.progress.move(len(order) - rest - self.progress.batches)


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
            yield from batches
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
