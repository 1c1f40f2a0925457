"""Files that are none, and files that do not answer: ended in time, with their name."""

import io
import os
import socket
from pathlib import Path
from threading import Event, Thread

import pytest
from PIL import Image

from latentdm.data import SampleError, files
from latentdm.data.files import Patience, asked, open_file, open_stream, patient, read_file, size_of
from latentdm.data.watch import working


@pytest.fixture
def stuck(monkeypatch):
    """A call that blocks until the test is over, which it is when the call is given up."""
    monkeypatch.setattr(files, "GRACE_S", 0.4)
    event = Event()
    yield event.wait
    event.set()


def test_a_file_is_read_in_whole_and_in_parts(tmp_path):
    content = os.urandom(1_000_000)
    (tmp_path / "a").write_bytes(content)
    with open_file(tmp_path / "a") as file:
        assert size_of(file) == len(content)
        assert file.read(10) == content[:10]
        assert file.seek(-5, os.SEEK_END) == len(content) - 5
        assert file.read(10**15) == content[-5:]  # no memory is taken for what is not there
        file.seek(300_000)
        assert file.read() == content[300_000:]
    assert read_file(tmp_path / "a", len(content)) == content


def test_it_has_no_descriptor_to_be_read_without_a_clock(tmp_path):
    (tmp_path / "a").touch()
    with open_file(tmp_path / "a") as file, pytest.raises(OSError, match="fileno"):
        file.fileno()


def test_a_file_over_the_limit_is_named_and_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(10**13)
    with pytest.raises(SampleError, match=r"^cannot read .*a: it holds more than 100 bytes; shorten or remove it$"):
        read_file(tmp_path / "a", 100)


def test_a_missing_file_is_the_system_s_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "a")


def pipe(path):
    os.mkfifo(path)
    return "a pipe"


def folder(path):
    path.mkdir()
    return "a folder"


def device(path):
    path.symlink_to("/dev/zero")
    return "a device"


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return "a socket"


@pytest.mark.parametrize("make", [pipe, folder, device, listening])
def test_what_is_no_regular_file_is_named_and_not_opened(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    kind = make(Path("x.png"))
    monkeypatch.setattr(io, "FileIO", None)
    with pytest.raises(SampleError, match=rf"^cannot read x\.png: it is {kind}, not a file; remove it$"):
        open_file(Path("x.png"))


def test_what_lies_there_by_now_is_looked_at_again(tmp_path, monkeypatch):
    (tmp_path / "x.png").symlink_to("/dev/zero")
    (tmp_path / "regular").touch()
    before = os.stat(tmp_path / "regular")
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: before)  # as it was a moment ago
        with pytest.raises(SampleError, match=r"x\.png: it is a device, not a file; remove it"):
            open_file(tmp_path / "x.png")


def test_a_call_that_hangs_is_given_up_with_its_name_and_the_next_one_answers(stuck):
    for _ in range(2):
        with pytest.raises(
            SampleError, match=r"^cannot read x: nothing came within read_timeout=300 seconds; .*longer"
        ):
            asked(stuck, "x", seconds=0.01)
    assert asked(lambda: 7, "y") == 7


def test_what_comes_too_late_is_discarded(monkeypatch):
    monkeypatch.setattr(files, "GRACE_S", 0.4)
    event, discarded = Event(), Event()
    with pytest.raises(SampleError):
        asked(
            lambda: event.wait() and "late", "x", seconds=0.01, discard=lambda late: late == "late" and discarded.set()
        )
    event.set()
    assert discarded.wait(60)


def test_an_error_of_the_call_is_its_own():
    def broken():
        raise TimeoutError("of the network file system")

    with pytest.raises(TimeoutError, match="network"):
        asked(broken, "x")


class Slow(io.BytesIO):
    """A stream that answers some times, and then hangs."""

    def __init__(self, content, answers, hang):
        super().__init__(content)
        self.answers, self.hang = answers, hang

    def read(self, size=-1):
        self.answers -= 1
        if self.answers < 0:
            self.hang()
        return super().read(size)


def test_a_stream_that_stops_is_named(stuck):
    seen = []
    with patient(Patience(0.05, lambda: seen.append(1))):
        stream = open_stream(lambda: Slow(bytes(600_000), 2, stuck), "s3://shard.tar")
        assert len(stream.read(500_000)) == 500_000
        with pytest.raises(SampleError, match=r"^cannot read s3://shard\.tar: nothing came within read_timeout=0.05 s"):
            stream.read(100_000)
    assert len(seen) == 3  # opened, and twice read


def test_a_fork_has_readers_of_its_own(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert read_file(tmp_path / "a", 10) == b"content"
    child = os.fork()
    if child == 0:
        os._exit(0 if read_file(tmp_path / "a", 10) == b"content" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_do_not_wait_for_each_other(stuck, tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    hanging = Thread(target=lambda: asked(stuck, "x", seconds=600), daemon=True)
    hanging.start()
    assert read_file(tmp_path / "a.png", 1000)


@pytest.mark.parametrize("works", [True, False])
def test_a_silent_download_is_progress_as_long_as_it_takes_the_processor_s_time(monkeypatch, works):
    monkeypatch.setattr("latentdm.data.watch.WORKING_POLL_S", 0.05)
    monkeypatch.setattr("latentdm.data.watch.WORKING_S", 0.01)
    heard = Event()

    def download():
        if works:
            yield any(heard.is_set() for _ in range(100_000_000))
        else:
            yield heard.wait(0.5)

    items = working(download())
    with patient(Patience(progress=heard.set)):
        assert next(items) == works
    assert list(items) == []
