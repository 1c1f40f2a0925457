"""Two processes that build the index of a folder at once."""

import multiprocessing
import os

import pytest

from latentdm.data.index import folder_index
from latentdm.data.pairing import find_images

LONG_AGO = 1_600_000_000


def open_index(root, cache, built=lambda: None):
    """The names in the index of a folder; ``built`` is called between building and keeping it."""

    def build():
        result = find_images(root)
        built()
        return result

    index = folder_index(root, {}, build, cache, least=1)
    return [index[row].name for row in range(len(index))]


def open_together(root, cache, barrier, results):
    results.put(open_index(root, cache, lambda: barrier.wait(timeout=60)))  # both have built before either keeps


def test_two_processes_that_build_at_once_do_no_harm(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.png").write_bytes(bytes(100 + number))
        os.utime(root / f"{number:02}.png", (LONG_AGO, LONG_AGO))
    os.utime(root, (LONG_AGO, LONG_AGO))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    both = [context.Process(target=open_together, args=(root, cache, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get() for _ in both]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert found[0] == found[1] == [f"{number:02}.png" for number in range(12)]
    assert open_index(root, cache, lambda: pytest.fail("built once more")) == found[0]
    assert len(list(cache.iterdir())) == 1
