"""The loader of pixel batches: it can go on in the middle of an epoch, and says what a worker that died was reading.

A process that is killed cannot say why. Each worker notes in shared memory what it reads, which takes microseconds;
PyTorch's error holds the ids of the processes that died, and so the note can be found.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from time import sleep
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import DataLoader

from latentdm.data.order import GlobalOrder, RankBatches, Taken
from latentdm.data.watch import watched
from latentdm.errors import RunError, UserError
from latentdm.progress import Progress
from latentdm.ranks import process_ranks

WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
"""How PyTorch's error begins."""

CONNECTION_LOST = (ConnectionError, EOFError)
"""What PyTorch lets through when a worker dies while it hands over a batch: it does not say which one."""

SIGNAL_S = 0.5
"""Seconds within which the signal of that death comes, if at all; PyTorch answers it with an error that says which."""

SOCKET = "/pymp-01234567/listener-01234567"
"""How multiprocessing names a socket below the folder of temporary files."""

SOCKET_BYTES = 107
"""The longest name of a socket on Linux."""


class PixelLoader(DataLoader[Any]):
    """A loader of a `latentdm.data.order.RankBatches`, which can go on in the middle of an epoch.

    Its state, which Lightning saves with a checkpoint, holds plain containers: the ``epoch``, its ``steps`` so far as
    pairs of (global batch, count), and the number of ``samples`` that these were on all ranks. It serves any number of
    ranks. Errors of workers are `explained`.

    Attributes:
        owner: the class that a warning names.
        progress: what the trainer has counted; None: without one.
        by_hand: whether no trainer has said how many ranks there are, but `process_ranks` has.
    """

    owner = "PixelLoader"
    progress: Progress | None = None
    by_hand = False
    _state: Mapping[str, Any] | None = None
    _epoch = 0
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
            UserError: without a trainer, there are other ranks now than when the loader was made; or workers could not
                hand over their batches.
        """
        # A generator, so that all of this waits for the first batch: Lightning calls iter() before it sets the epoch.
        order: GlobalOrder = self.sampler
        if self.by_hand and (ranks := process_ranks()["num_replicas"]) != order.num_replicas:
            raise UserError(
                f"{self.owner}: the loader was made for {order.num_replicas} of the {ranks} processes that share the "
                "data now; make it after torch's process group, as after fabric.launch(), Accelerator() or "
                "init_process_group(), or give a Trainer the data module instead of its loaders"
            )
        if self.num_workers:
            _check_sockets(self.owner)
        if isinstance(self.batch_sampler, RankBatches):
            self.batch_sampler.locked = False
        state, self._state = self._state, None
        self._epoch, self._yielded = order.epoch, 0
        order.taken = state["steps"] if state and state["epoch"] == order.epoch else ()
        if self.progress:
            if state is None and self.progress.resumes:
                order.taken = self._counted(order)
            self.progress.began()
            self._trained = self.progress.batches
        try:
            for batch in explained(self._batches(), self.dataset):
                self._yielded += 1
                yield batch
        except Exception:
            # Its workers end now. Torch waits 5 s for those that the collector of garbage finds: a traceback that
            # somebody keeps makes a cycle of all that it reaches.
            self._iterator = None
            raise

    def _batches(self) -> Iterator[Any]:
        yield from super().__iter__()  # which may wait for workers as well

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is. Of what was yielded, a batch that a failing step was not done with does not count."""
        if self._state is not None:
            return dict(self._state)
        order: GlobalOrder = self.sampler
        done = self._yielded if self.progress is None else min(self._yielded, self.progress.batches - self._trained)
        steps, now = [list(pair) for pair in order.taken], order.global_batch
        if not steps or steps[-1][0] != now:
            steps.append([now, 0])
        steps[-1][1] += max(done, 0)
        return {
            "epoch": self._epoch,
            "steps": steps,
            "samples": order.seen(self._epoch, steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were seen, in the iteration that comes next."""
        if not {"epoch", "steps"} <= set(state_dict):
            rank_zero_warn(
                f"{self.owner}: the checkpoint's state of the loader is another loader's: it holds "
                f"{', '.join(map(str, state_dict)) or 'nothing'}"
            )
            return
        self._state = state_dict
        if self.progress:
            self.progress.loaded(state_dict["epoch"])
        self._fit_steps(state_dict["epoch"], state_dict["steps"])

    def _counted(self, order: GlobalOrder) -> Taken:
        """What Lightning says was seen, where the checkpoint holds no state of ours."""
        count = self.progress.batches if self.progress else 0
        rank_zero_warn(
            f"{self.owner}: the checkpoint holds no state of this loader, so it goes on after {count} batches of epoch "
            f"{order.epoch}, which Lightning has counted. If they were of other data or another global batch, some of "
            "the epoch's samples come twice and others not"
        )
        return [(order.global_batch, count)]

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


def _check_sockets(owner: str) -> None:
    """Raise UserError where no worker could hand over a batch: whoever waits for it would hear nothing."""
    folder, room = tempfile.gettempdir(), SOCKET_BYTES - len(SOCKET)
    strategy = get_sharing_strategy()  # type: ignore[no-untyped-call]  # torch does not annotate it
    if strategy == "file_descriptor" and len(os.fsencode(folder)) > room:
        raise UserError(
            f"{owner}: workers hand over batches through sockets in the folder of temporary files, and the name of "
            f"{folder} is longer than the {room} bytes that leave room for theirs; set TMPDIR to a shorter one, or "
            "num_workers=0"
        )


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
            yield from watched(batches, dataset)
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
