"""The cache's files: what was written is read, and whatever is broken, gone or of another kind is a miss."""

import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdm.cache.index import Index, newest
from latentdm.cache.keys import identity, key_of
from latentdm.cache.rows import packed, unpacked
from latentdm.cache.store import Store, open_space
from latentdm.cache.writer import Writer

COUNT = 10


def key(number):
    return key_of("entry", number)


def entries(count=COUNT, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {
        "moments": torch.randn(count, 2, 4, 8, 8, generator=generator).to(dtype),
        "sizes": torch.arange(count * 6, dtype=torch.int32).view(count, 6),
    }


def write(folder, first=0, count=COUNT, dtype=torch.bfloat16):
    writer = Writer()
    writer.put(Store(folder), [key(first + row) for row in range(count)], entries(count, dtype))
    writer.flush()
    return writer


def opened(folder):
    store = Store(folder)
    store.refresh()
    return store


def shard_of(folder):
    [path] = (folder / "shards").rglob("*.safetensors")
    return path


def found(store, count=COUNT):
    return [row for row in range(count) if store.read(key(row)) is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_written_is_read_bit_for_bit(tmp_path, dtype):
    writer = write(tmp_path, dtype=dtype)
    assert writer.entries == COUNT
    assert writer.bytes == shard_of(tmp_path).stat().st_size
    store, expected = opened(tmp_path), entries(dtype=dtype)
    for row in range(COUNT):
        entry = store.read(key(row))
        assert entry.keys() == expected.keys()
        for name, tensor in expected.items():
            assert entry[name].dtype == tensor.dtype
            assert torch.equal(entry[name], tensor[row])
    assert store.read(key(COUNT)) is None
    assert store.failures == 0


def test_a_shard_is_a_safetensors_file(tmp_path):
    write(tmp_path)
    loaded = load_file(shard_of(tmp_path))
    assert torch.equal(loaded["moments"], entries()["moments"])
    assert bytes(loaded["keys"][3].tolist()) == key(3)


def test_rows_begin_on_a_boundary(tmp_path):
    write(tmp_path)
    content = shard_of(tmp_path).read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 4096 == 0


def test_every_flipped_byte_is_a_miss_or_right(tmp_path):
    write(tmp_path, count=2)
    path, expected = shard_of(tmp_path), entries(2)
    content = path.read_bytes()
    for at in [*range(0, 400, 7), *range(4096, len(content), 61)]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        store = opened(tmp_path)
        for row in range(2):
            entry = store.read(key(row))
            assert entry is None or torch.equal(entry["moments"], expected["moments"][row])
        inside = 4096 <= at < 4096 + expected["moments"].nbytes
        assert not inside or None in [store.read(key(row)) for row in range(2)]


HEADS = {
    "backwards": {"moments": {"data_offsets": [512, 0]}},
    "before the file": {"sizes": {"data_offsets": [-240, 0]}},
    "too many": {"keys": {"shape": [2**60, 16]}, "crc": {"shape": [2**60]}},
    "fewer than none": {"keys": {"shape": [-1, 16]}, "crc": {"shape": [-1]}},
    "another shape": {"moments": {"shape": [COUNT, 2, 4, 8, 9]}},
    "no such dtype": {"moments": {"dtype": "F3"}},
    "no number": {"moments": {"shape": ["ten", 2, 4, 8, 8]}},
    "endless": {"keys": {"shape": [float("inf"), 16]}},
    "no span": {"crc": {"data_offsets": None}},
}


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_a_head_that_makes_no_sense_is_a_counted_miss(tmp_path, changes):
    write(tmp_path)
    path = shard_of(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    for name, change in changes.items():
        head[name] |= change
    path.write_bytes(content[:8] + json.dumps(head).encode().ljust(length) + content[8 + length :])
    store = opened(tmp_path)
    assert found(store) == []
    assert store.failures > 0


@pytest.mark.parametrize("head", [b"[" * 4088, b"[1]", b"7", b"{}", b'{"keys": 1}', b"\xff"])
def test_a_head_of_another_kind_is_a_counted_miss(tmp_path, head):
    write(tmp_path)
    path = shard_of(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:8] + head.ljust(4088) + content[4096:])
    store = opened(tmp_path)
    assert (found(store), store.failures > 0) == ([], True)


@pytest.mark.parametrize("shards", ["7", "[[1], {}]", "{}", "[" * 5000])
def test_an_index_of_what_are_no_names_is_harmless(tmp_path, shards):
    write(tmp_path)
    opened(tmp_path).keep_index(least=1)
    [path] = (tmp_path / "index").iterdir()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"]["shards"] = shards
    changed = json.dumps(head).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    assert found(opened(tmp_path)) == list(range(COUNT))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_shard_is_a_counted_miss(tmp_path, share):
    write(tmp_path)
    path = shard_of(tmp_path)
    store = opened(tmp_path)
    os.truncate(path, int(path.stat().st_size * share))
    if share < 0.9:  # else the end is gone, which holds the keys that this store has read
        assert len(found(store)) < COUNT
        assert store.failures > 0
    again = opened(tmp_path)
    assert found(again) == []
    assert again.failures > 0


def test_a_row_of_another_entry_is_a_miss(tmp_path):
    write(tmp_path)
    store = opened(tmp_path)
    places = [next(store.new.places(key(row))) for row in range(2)]
    index = Index.of([(places[0].shard, np.frombuffer(key(0), np.uint8)[None], np.array([places[1].crc], "<u4"))])
    index.row[:] = places[1].row
    index.save(tmp_path / "index", tmp_path / "tmp")
    wrong = opened(tmp_path)
    assert wrong.read(key(0)) is None
    assert wrong.failures == 1


def test_an_entry_that_is_broken_in_one_shard_is_read_from_another(tmp_path):
    write(tmp_path)
    broken = shard_of(tmp_path)
    write(tmp_path)
    os.truncate(broken, 5000)
    assert found(opened(tmp_path)) == list(range(COUNT))


def test_new_shards_are_found_by_a_store_that_is_open(tmp_path):
    store = opened(tmp_path)
    assert found(store) == []
    write(tmp_path)
    assert store.refresh()
    assert found(store) == list(range(COUNT))
    write(tmp_path, first=COUNT)
    assert store.refresh()
    assert found(store, 2 * COUNT) == list(range(2 * COUNT))
    assert not store.refresh()


def test_the_index_is_kept_and_derived(tmp_path):
    write(tmp_path)
    opened(tmp_path).keep_index(least=1)
    assert len(newest(tmp_path / "index")) == COUNT
    assert found(opened(tmp_path)) == list(range(COUNT))
    write(tmp_path, first=COUNT)
    assert found(opened(tmp_path), 2 * COUNT) == list(range(2 * COUNT))
    opened(tmp_path).keep_index(least=1)
    assert len(newest(tmp_path / "index")) == 2 * COUNT
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    assert found(opened(tmp_path), 2 * COUNT) == list(range(2 * COUNT))


@pytest.mark.parametrize("harm", ["version", "cut", "empty", "text"])
def test_an_index_that_is_broken_is_passed_over(tmp_path, harm):
    write(tmp_path)
    opened(tmp_path).keep_index(least=1)
    [path] = (tmp_path / "index").iterdir()
    content = path.read_bytes()
    harmed = {
        "version": content.replace(b'"version": "1"', b'"version": "0"'),
        "cut": content[:-7],
        "empty": b"",
        "text": b"no index" * 100,
    }
    path.write_bytes(harmed[harm])
    assert newest(tmp_path / "index") is None
    assert found(opened(tmp_path)) == list(range(COUNT))


def test_an_index_may_say_anything(tmp_path):
    """Its sums protect nothing but rows: what it points to is checked on each read."""
    write(tmp_path)
    opened(tmp_path).keep_index(least=1)
    [path] = (tmp_path / "index").iterdir()
    content, expected = path.read_bytes(), entries()["moments"]
    for at in range(4096, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        store = opened(tmp_path)
        for row in range(COUNT):
            entry = store.read(key(row))
            assert entry is None or torch.equal(entry["moments"], expected[row])


def test_a_shard_that_is_gone_is_a_miss_and_no_failure(tmp_path):
    write(tmp_path)
    opened(tmp_path).keep_index(least=1)
    shard_of(tmp_path).unlink()
    store = opened(tmp_path)
    assert found(store) == []
    assert store.failures == 0


def test_an_error_of_the_system_is_a_counted_miss(tmp_path, monkeypatch):
    write(tmp_path)
    store = opened(tmp_path)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as context:
        context.setattr(os, "preadv", stale)
        assert found(store) == []
    assert store.failures == COUNT
    assert found(store) == list(range(COUNT))


def test_a_pickled_store_reads(tmp_path):
    write(tmp_path)
    store = opened(tmp_path)
    assert found(pickle.loads(pickle.dumps(store))) == list(range(COUNT))


def test_an_entry_is_written_once(tmp_path):
    writer, store = Writer(), Store(tmp_path)
    for _ in range(3):
        writer.put(store, [key(0), key(1), key(0)], entries(3), wait=True)
    writer.flush()
    assert writer.entries == 2


def test_rows_left_out_are_not_written(tmp_path):
    writer = Writer()
    keep = torch.arange(COUNT) % 2 == 0
    writer.put(Store(tmp_path), [key(row) for row in range(COUNT)], entries() | {"keep": keep})
    writer.flush()
    assert found(opened(tmp_path)) == [0, 2, 4, 6, 8]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_writing_with_one_warning(tmp_path, monkeypatch):
    writer, store = Writer(), Store(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    writer.put(store, [key(0)], entries(1))
    with pytest.warns(UserWarning, match=r"No space left.*Make room"):
        writer.flush()
    for row in range(5):
        writer.put(store, [key(row)], entries(1))
    writer.flush()
    assert writer.failures == 1
    assert writer.entries == 0
    assert list((tmp_path / "tmp").iterdir()) == []  # nothing of it is left on the disk


def test_a_folder_that_cannot_be_written_to_ends_the_writing(tmp_path):
    (tmp_path / "space").write_text("a file in the way of a folder")
    writer = Writer()
    writer.put(Store(tmp_path / "space"), [key(0)], entries(1))
    with pytest.warns(UserWarning, match="writes nothing any more"):
        writer.flush()


def test_a_disk_that_was_full_is_written_to_by_the_next_run(tmp_path, monkeypatch):
    write(tmp_path, count=2)
    writer = Writer()
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full_disk)
        writer.put(opened(tmp_path), [key(row) for row in range(COUNT)], entries())
        with pytest.warns(UserWarning, match="writes nothing any more"):
            writer.flush()
        assert found(opened(tmp_path)) == [0, 1]  # what is there is read meanwhile
    writer.flush()
    write(tmp_path)
    assert found(opened(tmp_path)) == list(range(COUNT))


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.getuid() != 0, reason="needs a user who may not write")
def test_a_folder_that_may_only_be_read_is_read():
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # pytest's own folders nobody else may enter
        write(folder)
        os.seteuid(65534)
        try:
            store, writer = opened(folder), Writer()
            assert found(store) == list(range(COUNT))
            with pytest.raises(PermissionError):
                store.keep_index(least=0)
            store.sweep()
            writer.put(store, [key(COUNT)], entries(1))
            with pytest.warns(UserWarning, match=r"PermissionError.*set cache\.dir"):
                writer.flush()
            with pytest.warns(UserWarning, match="cannot write to dir"):
                assert open_space(folder, {"other": 1}).read(key(0)) is None
        finally:
            os.seteuid(0)
        assert found(opened(folder)) == list(range(COUNT))


@pytest.mark.parametrize("call", ["open", "preadv", "pread", "scandir", "listdir"])
def test_a_network_that_fails_for_a_moment_is_a_miss_for_that_moment(tmp_path, monkeypatch, call):
    write(tmp_path)
    store = opened(tmp_path)
    write(tmp_path, first=COUNT)
    with monkeypatch.context() as context:
        context.setattr(os, call, fails(errno.ESTALE))
        store.close()
        for row in range(2 * COUNT):
            store.read(key(row))
        store.refresh()
    store.refresh()
    assert found(store, 2 * COUNT) == list(range(2 * COUNT))


def fails(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


def test_a_cache_that_is_removed_meanwhile_is_filled_again(tmp_path):
    folder = tmp_path / "space"
    write(folder)
    store, writer = opened(folder), Writer()
    rmtree(folder)
    store.close()  # of a file that is open the system keeps what it holds
    assert found(store) == []
    writer.put(store, [key(row) for row in range(COUNT)], entries(), wait=True)
    writer.flush()
    store.refresh()
    assert found(store) == list(range(COUNT))
    writer.flush()
    assert store.failures == writer.failures == 0


def test_a_file_that_was_swept_by_a_clock_of_tomorrow_is_lost_and_nothing_else(tmp_path, monkeypatch):
    writer, store, sync = Writer(), Store(tmp_path), os.fsync

    def swept(file):
        sync(file)
        rmtree(tmp_path / "tmp", ignore_errors=True)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", swept)
        writer.put(store, [key(0)], entries(1))
        writer.flush()
    assert (writer.failures, writer.stopped) == (1, "")
    writer.put(store, [key(row) for row in range(COUNT)], entries())
    writer.flush()
    assert found(opened(tmp_path)) == list(range(COUNT))


@pytest.mark.parametrize("hours", [-30, 30])
def test_clocks_may_differ_and_be_set_back(tmp_path, monkeypatch, hours):
    """Of a server, whose times of change these are, and of this machine."""
    write(tmp_path)
    [folder] = (tmp_path / "shards").iterdir()
    now = folder.stat().st_mtime
    monkeypatch.setattr("latentdm.cache.store.time", lambda: now + 3600 * hours)
    store = opened(tmp_path)
    for turn in range(1, 4):
        write(tmp_path, first=turn * COUNT)
        os.utime(folder, (now - 50 * turn,) * 2)
        store.refresh()
        assert found(store, (turn + 1) * COUNT) == list(range((turn + 1) * COUNT))
    store.keep_index(least=1)
    assert found(opened(tmp_path), 4 * COUNT) == list(range(4 * COUNT))


def test_two_configurations_fill_one_folder_at_once(tmp_path):
    def fill(number):
        store, writer = open_space(tmp_path, {"encoder": number % 2}), Writer(rank=number)
        for row in range(COUNT):
            values = {"moments": torch.full((1, 2, 4, 8, 8), float(number % 2))}
            writer.put(store, [key(row)], values, wait=True)
            if row % 4 == 0:
                writer.flush()
        writer.flush()
        return store.folder

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(fill, range(4)))
    assert len(set(folders)) == 2
    for number, folder in enumerate(folders):
        store = opened(folder)
        assert all((store.read(key(row))["moments"] == number % 2).all() for row in range(COUNT))


def test_what_others_index_is_taken_over(tmp_path, monkeypatch):
    """So that a worker does not hold by itself what all may share."""
    monkeypatch.setattr("latentdm.cache.store.INDEX_FROM", 1)
    store = opened(tmp_path)
    write(tmp_path)
    store.refresh()
    assert (len(store.index), len(store.new)) == (0, COUNT)
    other = opened(tmp_path)
    other.keep_index(least=1)
    assert isinstance(other.index.prefix.base, np.memmap)  # its writer too
    write(tmp_path, first=COUNT)
    store.refresh()
    assert (len(store.index), len(store.new)) == (COUNT, COUNT)
    assert found(store, 2 * COUNT) == list(range(2 * COUNT))


def test_the_first_shards_of_a_run_come_soon(tmp_path, monkeypatch):
    for first, shards in ((0.0, 3), (1000.0, 1)):
        monkeypatch.setattr("latentdm.cache.writer.FIRST_SEAL_S", first)
        writer, store = Writer(), Store(tmp_path / str(shards))
        for row in range(3):
            writer.put(store, [key(row)], entries(1), wait=True)
        writer.flush()
        assert len(store.all_shards()) == shards


def test_shards_are_sealed_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr("latentdm.cache.writer.SEAL_BYTES", entries(1)["moments"].nbytes * 4)
    writer, store = Writer(), Store(tmp_path)
    for row in range(8):
        writer.put(store, [key(row)], entries(1), wait=True)
    writer.flush()
    assert len(list((tmp_path / "shards").rglob("*.safetensors"))) == 2


def test_different_shapes_lie_in_different_shards(tmp_path):
    writer, store = Writer(), Store(tmp_path)
    for number, side in enumerate((8, 16)):
        writer.put(store, [key(number)], {"moments": torch.ones(1, 2, 4, side, 8)}, wait=True)
    writer.flush()
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert found(opened(tmp_path), 2) == [0, 1]


# -------------------------------------------------------------------- keys


def test_parts_of_a_key_do_not_run_together():
    keys = {key_of(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (b"ab", "c"), ("abc", "")]}
    assert len(keys) == 6


def test_a_file_is_told_from_what_it_was(tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(b"one")
    stat, content = (identity(path, how) for how in ("stat", "content"))
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identity(path, "stat") != stat
    assert identity(path, "content") != content
    path.write_bytes(b"one")
    assert identity(path, "content") == content
    assert identity(b"one", "stat") == content


def test_masks_are_kept_in_bits():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 7, 8, 9, 33):
        masks = torch.rand(3, 1, 5, width, generator=generator) > 0.5
        bits = packed(masks)
        assert bits.shape == (3, 5, -(-width // 8))
        for row in range(3):
            assert torch.equal(unpacked(bits[row], width), masks[row].to(torch.uint8) * 255)
