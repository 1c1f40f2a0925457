"""The loader of pixel batches: it can go on in the middle of an epoch, and says what a worker that died was reading.

A process that is killed cannot say why. Each worker notes in shared memory what it reads, which takes microseconds;
PyTorch's error holds the ids of the processes that died, and so the note can be found.
"""

import re
from collections.abc import Iterator
from time import sleep
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from latentdm.data.watch import watched
from latentdm.errors import RunError, UserError

WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How PyTorch's error begins."""

CONNECTION_LOST = (ConnectionError, EOFError)
"""What PyTorch lets through when a worker dies while it hands over a batch: it does not say which one."""

SIGNAL_S = 0.5
"""Seconds within which the signal of that death comes, if at all; PyTorch answers it with an error that says which."""


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
        for batch in explained(self._batches(), self.dataset):
            self._yielded += 1
            yield batch

    def _batches(self) -> Iterator[Any]:
        yield from super().__iter__()  # which may wait for workers as well

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
            with watched(dataset) as watch:
                yield from watch.awaited(batches) if watch else batches
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
    if reading.stood_still:
        processes = None  # they were ended one after another
    names = [dataset.name(position) for position in reading.positions(processes)]
    if reading.stood_still:
        what = f"while they read {', '.join(names)}" if any(names) else "while nothing was read"
        return (
            f"{dataset.owner}: the processes that read images stood still {what}, for longer than read_timeout="
            f"{dataset.read_timeout:g} seconds, and were ended. Somebody stopped them, or storage hangs; for slow "
            "storage set a longer read_timeout"
        )
    what = f" while it read {', '.join(names)}" if any(names) else ""  # a stream's samples have names where it is read
    return (
        f"{dataset.owner}: a process that reads images died{what} ({message}). Most often memory ran out: "
        "set a smaller num_workers or batch_size, or give the machine or its /dev/shm more. With num_workers=0 a file "
        "that ends the process every time is found out"
    )
