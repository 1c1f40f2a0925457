"""Workers that stand still are ended: stopped by a signal, or stuck in what no clock reaches.

A worker ends the waiting for a file by itself. One that is stopped can do nothing, and whoever waits for its batch
would wait for ever, at the end of the program too. Once it is killed PyTorch raises its error, as of any that dies.
"""

from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from threading import Event, Thread
from time import monotonic, process_time
from typing import Any, TypeVar

from latentdm.data.files import patience
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


def watched(batches: Iterator[T], dataset: Any) -> Iterator[T]:
    """The batches of a loader; workers that get no further while somebody waits for one are ended.

    Args:
        batches: what workers read.
        dataset: from which they read: its ``reading`` tells how far they are; without one there are no workers.
    """
    reading: Reading | None = getattr(dataset, "reading", None)
    if reading is None:
        yield from batches
        return
    reading.stood_still = False
    waiting, ended = Event(), Event()
    watch = partial(_watch, reading, dataset.read_timeout, waiting, ended)
    Thread(target=watch, daemon=True, name="latentdm watch").start()
    try:
        yield from _awaited(batches, waiting)
    finally:
        ended.set()


def working(items: Iterator[T]) -> Iterator[T]:
    """Items that a library downloads without a word: while that goes on, this process gets further.

    Nobody sees the bytes as they come, but for the processor's time that they take. A network that is gone takes none,
    and the library has a clock of its own for it.

    Args:
        items: what is downloaded; the `Patience` of whoever asks for the first of them hears of progress.
    """
    waiting, ended, asking = Event(), Event(), patience()

    def look() -> None:
        used = process_time()
        while not ended.wait(WORKING_POLL_S):
            before, used = used, process_time()
            if waiting.is_set() and used - before > WORKING_S:
                asking.progress()

    Thread(target=look, daemon=True, name="latentdm download").start()
    try:
        yield from _awaited(items, waiting)
    finally:
        ended.set()


def _awaited(items: Iterator[T], waiting: Event) -> Iterator[T]:
    """The items; ``waiting`` is set until each of them comes, and not while something is done with it."""
    while True:
        waiting.set()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            waiting.clear()
        yield item


def _watch(reading: Reading, limit: float, waiting: Event, ended: Event) -> None:
    """Until it has ended, or until workers were killed: the reading tells that they were.

    Args:
        reading: what workers read.
        limit: seconds that the reading of a file may take.
        waiting: set while somebody waits for them.
        ended: set when nobody will any more.
    """
    state, since = reading.state(), monotonic()
    while not ended.wait(POLL_S):
        if not waiting.is_set() or state != (state := reading.state()):
            since = monotonic()
        started = all(process != NO_POSITION for process, *_ in state)
        if monotonic() - since > max(limit + DECODING_S, 0 if started else STARTING_S):
            reading.stood_still = True
            mine = {process for process, *_ in state}
            for child in active_children():
                if child.pid in mine:
                    child.kill()
            return
