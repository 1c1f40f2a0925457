"""Two processes that index a folder at once."""

import multiprocessing
import os

from latentdm.data.files import Pairing, find_images
from latentdm.data.index import folder_index

LONG_AGO = 1_600_000_000


def open_with(root, cache, build):
    """The names in the index of a folder."""
    index = folder_index(root, {}, build, cache, least=1)
    return [index[row].name for row in range(len(index))]


def open_together(root, cache, barrier, results):
    """In a process of its own."""

    def late():
        built = find_images(root, "Test", Pairing(lenient=True))
        barrier.wait(timeout=30)  # both have built before either keeps
        return built

    results.put(open_with(root, cache, late))


def test_two_processes_that_build_at_once_do_no_harm(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.png").write_bytes(b"not decoded")
    for path in [*root.iterdir(), root]:
        os.utime(path, (LONG_AGO, LONG_AGO))  # an index of what changes now is not kept
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
    assert len(list(cache.iterdir())) == 1

    def again():
        raise AssertionError("the index that was kept is not used")

    assert open_with(root, cache, again) == found[0]
