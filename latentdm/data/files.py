"""The one place that opens files of data: regular ones alone, and with an end to waiting for them.

A pipe under the name of an image blocks whoever opens it, and so does a file whose storage is gone; a process cannot
interrupt that. So a thread of its own opens and reads, and is left behind where it does not come back.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, local
from time import monotonic
from typing import Any, BinaryIO, TypeVar

from latentdm.data.skips import SampleError

T = TypeVar("T")

READ_TIMEOUT_S = 300.0
"""Seconds that a file may keep its reader waiting: a disk spins up in 10, a network's server comes back in 100."""

GRACE_S = 1.0
"""Seconds that are waited once more: a process that was stopped in between has not waited for the storage."""

PIECE = 1 << 18
"""Bytes that are read at once: one hand-over to the thread suffices for most files."""

THREADS = 8
"""They wait for the file system, which may be a network's."""

MAX_BYTES = 4 << 30
"""The most that a file may hold that is read whole, of texts for example."""

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NoAnswerError(SampleError):
    """Storage does not answer."""


@dataclass(frozen=True)
class Patience:
    """How long reading may wait.

    Attributes:
        seconds: for each file, all its waiting together.
        progress: called whenever something came.
    """

    seconds: float = READ_TIMEOUT_S
    progress: Callable[[], None] = lambda: None


_patience: ContextVar[Patience] = ContextVar("patience", default=Patience())  # noqa: B039  # it is frozen


@contextmanager
def patient(patience: Patience) -> Iterator[None]:
    """What is opened within waits so long, in this thread."""
    token = _patience.set(patience)
    try:
        yield
    finally:
        _patience.reset(token)


def patience() -> Patience:
    """How long this thread waits."""
    return _patience.get()


def threads() -> ThreadPoolExecutor:
    """Threads that ask storage side by side, each as long as this one."""
    return ThreadPoolExecutor(THREADS, initializer=_patience.set, initargs=(_patience.get(),))


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, in bytes; links are followed.

    Returns:
        A file whose ``read`` ends in time, and takes no memory for more than is there. It has no descriptor, which a
        decoder would read without a clock.

    Raises:
        SampleError: it is no regular file, or does not answer within the `Patience`; names it.
        OSError: it cannot be opened.
    """
    return _Buffered(_Waited(lambda: open_regular(path), path), PIECE)


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file, without a clock; what is none is not touched, because opening it may act or wait."""
    _check_kind(path, os.stat(path).st_mode)
    stream = io.FileIO(path)
    try:
        _check_kind(path, os.fstat(stream.fileno()).st_mode)  # another one may lie there by now
    except SampleError:
        stream.close()
        raise
    return stream


def open_stream(opened: Callable[[], BinaryIO], name: str) -> BinaryIO:
    """A stream from elsewhere, as a shard on a server: each reading from it has the `Patience` of its own.

    Args:
        opened: opens it.
        name: what an error calls it.

    Raises:
        SampleError: it does not answer in time.
        Exception: whatever ``opened`` raises.
    """
    return io.BufferedReader(_Waited(opened, name, endless=True), PIECE)


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        limit: the most bytes that it may hold.

    Raises:
        SampleError: it cannot be read, is no regular file, holds more, or does not answer in time; names it.
    """
    try:
        with open_file(path) as file:
            if size_of(file) > limit:
                raise SampleError(f"cannot read {path}: it holds more than {limit} bytes; shorten or remove it")
            return file.read()
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror or error}; repair or remove the file") from error


def size_of(file: BinaryIO) -> int:
    """The bytes that a file of `open_file` holds; 0 where that is unknown."""
    raw = getattr(file, "raw", None)
    return raw.size if isinstance(raw, _Waited) else 0


def asked(
    call: Callable[[], T], name: object, discard: Callable[[T], Any] | None = None, seconds: float | None = None
) -> T:
    """What storage says of a file or a folder: what a call gives, made by another thread and waited for so long.

    Args:
        call: asks for it, as `os.stat` does, and may block.
        name: of the file or folder, for the error.
        discard: called with what comes too late.
        seconds: to wait; None: those of the `Patience`.

    Raises:
        NoAnswerError: nothing came.
        Exception: whatever the call raises.
    """
    thread: _Reader | None = getattr(_mine, "reader", None)
    if thread is None or not thread.is_alive():  # it does not survive a fork
        thread = _mine.reader = _Reader()
    future: Future[T] = Future()
    thread.calls.put((future, call))
    limit = _patience.get().seconds
    first = limit if seconds is None else max(seconds, 0)
    try:
        if not any(wait([future], timeout).done for timeout in (first, GRACE_S)):
            if discard is not None:
                future.add_done_callback(lambda late: late.exception() or discard(late.result()))
            raise NoAnswerError(
                f"cannot read {name}: nothing came within read_timeout={limit:g} seconds; see whether its storage "
                "answers, or set a longer read_timeout"
            )
    finally:
        if not future.done():  # an exception of a signal's leaves a thread behind as well
            _mine.reader = None
    _patience.get().progress()
    return future.result()


class _Reader:
    """A thread that makes calls one after another, as long as anybody may hand it one."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # As a daemon: a process does not wait at its end for storage that is gone.
        self._thread = Thread(target=_serve, args=(self.calls,), daemon=True, name="latentdm reader")
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def __del__(self) -> None:
        self.calls.put(None)


_mine = local()
"""The reader of each thread."""


def _serve(calls: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (asked := calls.get()) is not None:
        future, call = asked
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del asked, future, call  # or what they hold lives until the next call


class _Waited(io.RawIOBase):
    """A stream that a thread of its own opens and reads.

    Attributes:
        size: of a regular file, in bytes; 0 where it is unknown.
    """

    def __init__(self, opened: Callable[[], BinaryIO], name: object, endless: bool = False) -> None:
        self.name = name
        self.size = 0
        self._endless = endless
        self._left = _patience.get().seconds
        self._stream: BinaryIO = self._answer(opened, discard=lambda stream: stream.close())
        if isinstance(self._stream, io.FileIO):
            self.size = os.fstat(self._stream.fileno()).st_size

    def _answer(self, call: Callable[[], T], discard: Callable[[T], Any]) -> T:
        started = monotonic()
        try:
            return asked(call, self.name, discard, None if self._endless else self._left)
        finally:
            self._left -= monotonic() - started

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), PIECE)
        try:
            content = self._answer(lambda: self._stream.read(count), discard=lambda _: self._stream.close())
        except SampleError:
            super().close()  # the stream itself is read until it answers, and closed then
            raise
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _Buffered(io.BufferedReader):
    """A reader that knows how much there is: Python takes the memory that is asked for before it reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(size_of(self) - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_kind(path: Path, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        raise SampleError(f"cannot read {path}: it is {KINDS.get(kind, 'no regular file')}, not a file; remove it")
