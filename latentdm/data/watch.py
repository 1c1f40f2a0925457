"""Workers that stand still are ended: stopped by a signal, or stuck in what no clock reaches.

A worker ends the waiting for a file by itself. One that is stopped can do nothing, and whoever waits for its batch
would wait for ever, at the end of the program too. Once it is killed PyTorch raises its error, as of any that dies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from threading import Event, Thread
from time import monotonic, process_time
from typing import Any, TypeVar

from latentdm.data.files import Patience, patience
from latentdm.data.reading import NO_POSITION, Reading

T = TypeVar("T")

POLL_S = 1.0
"""Seconds after which to see whether workers get any further."""

DECODING_S = 10.0
"""Seconds that workers may stand still beyond the time of a file: they decode between two of them."""

WORKING_S = 0.001
"""Seconds of the processor's time by which a process shows that it works: what comes over a network takes more."""

WORKING_POLL_S = 5.0
"""Seconds in which it does."""

STARTING_S = 120.0
"""Seconds in which workers start."""


class Watch:
    """Sees whether workers get any further while somebody waits for them.

    Args:
        reading: what they read.
        limit: seconds that the reading of a file may take.
    """

    def __init__(self, reading: Reading, limit: float) -> None:
        self._reading = reading
        self._limit = limit
        self._waiting = False
        self._ended = Event()

    def awaited(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the time until each of them counts, and what is done with it does not."""
        while True:
            self._waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield batch

    def run(self) -> None:
        """Until `end`, or until workers were killed: the reading tells that they were."""
        state, since = self._reading.state(), monotonic()
        while not self._ended.wait(POLL_S):
            if not self._waiting or state != (state := self._reading.state()):
                since = monotonic()
            started = all(process != NO_POSITION for process, *_ in state)
            if monotonic() - since > max(self._limit + DECODING_S, 0 if started else STARTING_S):
                self._reading.stood_still = True
                mine = {process for process, *_ in state}
                for child in active_children():
                    if child.pid in mine:
                        child.kill()
                return

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()


def working(items: Iterator[T]) -> Iterator[T]:
    """Items that a library downloads without a word: while that goes on, this process gets further.

    Nobody sees the bytes as they come, but for the processor's time that they take. A network that is gone takes none,
    and the library has a clock of its own for it.

    Args:
        items: what is downloaded; the `Patience` of whoever asks for one of them hears of progress.
    """
    ended, awaiting = Event(), [Patience()]

    def look() -> None:
        used = process_time()
        while not ended.wait(WORKING_POLL_S):
            before, used = used, process_time()
            if used - before > WORKING_S:
                awaiting[0].progress()

    Thread(target=look, daemon=True, name="latentdm download").start()
    try:
        while True:
            awaiting[0] = patience()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                awaiting[0] = Patience()
            yield item
    finally:
        ended.set()


@contextmanager
def watched(dataset: Any) -> Iterator[Watch | None]:
    """Watch the workers of a dataset; None where it has none."""
    reading: Reading | None = getattr(dataset, "reading", None)
    if reading is None:
        yield None
        return
    reading.stood_still = False
    watch = Watch(reading, dataset.read_timeout)
    Thread(target=watch.run, daemon=True, name="latentdm watch").start()
    try:
        yield watch
    finally:
        watch.end()
