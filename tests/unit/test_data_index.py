"""The index of a folder: built once, opened while it is true, rebuilt where it is not, and cheap to send to workers."""

import fcntl
import json
import os
import pickle
import random
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentdm.data import SampleError
from latentdm.data.folder import FolderImages, ImageFolderData
from latentdm.data.index import Entry, Found, folder_index
from latentdm.data.pairing import find_images
from latentdm.data.skips import Skips

LONG_AGO = 1_600_000_000


def age(folder):
    """Everything in a folder was changed long ago, so that its index may be kept."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def photos(tmp_path):
    """Files that nobody decodes: twelve images in two folders, two with masks, one with a caption, and metadata."""
    root = tmp_path / "photos"
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100 + number))
    for mask in ("a/00-mask.png", "masks/b/01.png"):
        (root / mask).parent.mkdir(parents=True, exist_ok=True)
        (root / mask).write_bytes(b"mask")
    (root / "a" / "02.txt").write_text("a caption")
    row = {"file_name": "b/03.png", "text": "ein Schloß", "score": 0.5, "tags": ["x", "y"], "none": None}
    (root / "metadata.jsonl").write_text(json.dumps(row))
    age(root)
    return root


class Opener:
    """Opens the index of a folder and counts how often it had to be built."""

    def __init__(self, root, cache, least=1, lenient=True):
        self.root, self.cache, self.least = root, cache, least
        self.lenient = lenient
        self.built = 0
        self.found = None  # what a walk finds, for a folder that stays as it is

    def build(self):
        self.built += 1
        return self.found or find_images(self.root, lenient=self.lenient)

    def __call__(self, **settings):
        return folder_index(self.root, settings, self.build, self.cache, self.least)

    @property
    def files(self):
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture
def opener(photos, tmp_path):
    return Opener(photos, tmp_path / "cache")


def everything(index):
    return [index[row] for row in range(len(index))]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


# Built once


def test_it_is_built_once_and_holds_what_the_walk_found(opener):
    entries = find_images(opener.root, lenient=True).entries
    first, second = opener(), opener()
    assert opener.built == 1
    assert everything(first) == everything(second) == entries
    assert len(first) == 12
    assert first.problems == second.problems == []
    assert first.count("mask") == 2
    assert first.count("source") == 0
    assert first.captioned == 2
    assert first.hashes.tolist() == second.hashes.tolist()
    assert len(set(first.hashes)) == 12
    by_name = {entry.name: entry for entry in everything(second)}
    assert by_name["a/00.png"] == Entry("a/00.png", 100, LONG_AGO * 10**9, mask="a/00-mask.png")
    assert by_name["b/01.png"].mask == "masks/b/01.png"
    assert by_name["a/02.png"].caption == "a/02.txt"
    assert by_name["b/03.png"].columns == {"caption": "ein Schloß", "score": 0.5, "tags": ["x", "y"], "none": None}


def test_opening_it_walks_no_folder(opener, monkeypatch):
    opener()
    monkeypatch.setattr(os, "scandir", None)
    assert len(opener()) == 12


def test_each_set_of_settings_has_its_own(opener):
    opener(masks="auto"), opener(masks="ignore"), opener(masks="auto"), opener(masks="ignore")
    assert opener.built == 2
    assert len(opener.files) == 2


def test_a_small_folder_is_not_kept(photos, tmp_path):
    opener = Opener(photos, tmp_path / "cache", least=13)
    opener(), opener()
    assert opener.built == 2
    assert opener.files == []
    assert opener().file is None


def test_a_folder_that_has_just_changed_is_not_kept(opener):
    (opener.root / "new.png").touch()  # another file may come within the same tick of the clock
    opener(), opener()
    assert opener.built == 2
    assert opener.files == []


def test_nothing_is_written_into_the_folder(opener):
    before = snapshot(opener.root)
    opener(), opener()
    assert snapshot(opener.root) == before
    assert len(opener.files) == 1


def test_problems_are_kept(opener):
    (opener.root / "orphan-mask.png").touch()
    age(opener.root)
    first, second = opener(), opener()
    assert opener.built == 1
    assert first.problems == second.problems
    assert "orphan-mask.png" in second.problems[0]


def test_names_that_are_no_utf_8(opener):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (opener.root / name).touch()
    except OSError:
        pytest.skip("this file system refuses such names")
    age(opener.root)
    opener()
    assert everything(opener())[-1].name == name
    assert opener.built == 1


# Stale


def edit(root, name, content, same_time=False):
    """Another content under the same name; a write of the same size shows in the time alone."""
    (root / name).write_bytes(content)
    if same_time:
        os.utime(root / name, (LONG_AGO, LONG_AGO))


def described(root, score, end=""):
    """The metadata with another number in them."""
    return (root / "metadata.jsonl").read_bytes().replace(b"0.5", score) + end.encode()


CHANGES = {
    "an image added": lambda root: (root / "a" / "new.png").touch(),
    "an image added at the top": lambda root: (root / "new.png").touch(),
    "an image removed": lambda root: (root / "b" / "05.png").unlink(),
    "an image renamed": lambda root: (root / "a" / "04.png").rename(root / "a" / "40.png"),
    "a folder added": lambda root: (root / "b" / "c").mkdir(),
    "a folder moved": lambda root: (root / "b").rename(root / "c"),
    "a mask added": lambda root: (root / "a" / "04-mask.png").touch(),
    "a mask removed": lambda root: (root / "masks" / "b" / "01.png").unlink(),
    "a caption added": lambda root: (root / "a" / "04.txt").touch(),
    "the time of an image": lambda root: edit(root, "a/06.png", bytes(106)),
    "the size of an image": lambda root: edit(root, "a/06.png", bytes(107), same_time=True),
    "the size of the last image": lambda root: edit(root, "b/11.png", bytes(5), same_time=True),
    "the time of metadata": lambda root: edit(root, "metadata.jsonl", described(root, b"0.7")),
    "the size of metadata": lambda root: edit(root, "metadata.jsonl", described(root, b"0.75"), same_time=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_makes_it_stale(opener, change):
    opener()
    change(opener.root)
    index = opener()
    assert opener.built == 2
    assert everything(index) == find_images(opener.root, lenient=True).entries
    age(opener.root)
    opener()
    built = opener.built
    opener()
    assert opener.built == built  # kept again


def test_each_image_of_a_folder_of_two_hundred_is_looked_at(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(200):
        (root / f"{number:03}.png").touch()
    age(root)
    opener = Opener(root, tmp_path / "cache")
    opener()
    for built, number in enumerate((0, 57, 130, 199), start=1):
        assert opener.built == built
        edit(root, f"{number:03}.png", b"x", same_time=True)
        opener()


def test_an_image_folder_s_own_index_is_opened_again(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("latentdm.data.folder.KEPT_FROM", 1)
    held_out = photos / "b"
    monkeypatch.chdir(photos)

    def names(**settings):
        data = ImageFolderData(photos, masks="ignore", on_error="skip", index_dir=tmp_path / "cache", **settings)
        data.setup()
        return [data.train_set.name(position) for position in range(len(data.train_set))]

    first = names(val_root="b")
    monkeypatch.setattr(os, "scandir", None)
    assert names(val_root="b") == names(val_root=held_out) == first
    assert "a/04.png" in first
    assert not any(name.startswith("b/") for name in first)


def test_where_it_is_kept_by_default_is_no_setting_of_a_run(photos, tmp_path, monkeypatch):
    settings = []
    for home in ("here", "there"):  # as on another machine
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        monkeypatch.setattr("latentdm.data.folder.KEPT_FROM", 1)
        data = ImageFolderData(photos, masks="ignore", on_error="skip")
        data.setup()
        assert len(list((tmp_path / home).rglob("*.index"))) == 1
        assert "index_dir" not in repr(data)
        settings.append(data.state_dict())
    assert settings[0] == settings[1]


# Broken files


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_half_written_file_is_rebuilt(opener, share):
    entries = everything(opener())
    content = opener.files[0].read_bytes()
    opener.files[0].write_bytes(content[: int(len(content) * share)])
    assert everything(opener()) == entries
    assert opener.built == 2
    opener()
    assert opener.built == 2
    assert len(opener.files) == 1


@pytest.mark.parametrize("content", [b"", b"abc", b"ARROW1\0\0" * 50, bytes(4000)])
def test_another_content_is_rebuilt(opener, content):
    opener()
    opener.files[0].write_bytes(content)
    assert len(opener()) == 12
    assert opener.built == 2


def resealed(content):
    """Any content of an index with the hash that it should have."""
    return bytes(content[:-32]) + blake2b(content[:-32], digest_size=32).digest()


@pytest.mark.parametrize("sealed", [False, True])
def test_wrong_bytes_with_a_right_checksum_are_built_anew(opener, sealed):
    """Arrow's own format ends the process over some of these. What may still be read are entries."""
    opener.found = find_images(opener.root, lenient=opener.lenient)
    opener()
    content = opener.files[0].read_bytes()
    draw = random.Random(0)
    for number in range(400):
        wrong = bytearray(content)
        for position in (draw.randrange(len(wrong) if number % 2 else 900) for _ in range(draw.randrange(1, 5))):
            wrong[position] ^= draw.randrange(1, 256)
        opener.files[0].write_bytes(resealed(wrong) if sealed else wrong)
        before, index = opener.built, opener()
        assert sealed or opener.built == before + 1
        for row in range(len(index)):
            with suppress(SampleError):
                assert isinstance(index[row], Entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.update(rows=10**12),
        lambda head: head.update(rows=2**62),
        lambda head: head.update(rows=10**30),
        lambda head: head.update(rows=-1),
        lambda head: head.update(rows="12"),
        lambda head: head.update(places={}),
        lambda head: head["places"]["name"].pop(),
        lambda head: head["places"]["name"].__setitem__(2, [0, 10**9]),
        lambda head: head["places"]["name"].__setitem__(1, [64 * 10**6, 8]),
        lambda head: head["places"]["name"].__setitem__(1, [-64, 104]),
        lambda head: head["places"]["name"].__setitem__(1, [0.5, True]),
        lambda head: head["places"]["size"].__setitem__(1, None),
        lambda head: head["facts"].update(problems=5),
        lambda head: head["facts"].update(problems="5"),
        lambda head: head["facts"].update(watched="[]"),
        lambda head: head["facts"].update(facts='{"notes": [5]}'),
        lambda head: head["facts"].update(facts='{"folders": {"mask": 5}}'),
        lambda head: head["facts"].update(facts='{"folders": 5}'),
        lambda head: head["facts"].update(captioned='"5"'),
        lambda head: head.pop("facts"),
    ],
)
def test_a_head_that_says_something_else_is_built_anew(opener, change):
    opener()
    content = opener.files[0].read_bytes()
    end = 8 + int.from_bytes(content[:8], "big")
    head = json.loads(content[8:end])
    change(head)
    new = json.dumps(head).encode()
    new += b" " * (-(8 + len(new)) % 64)
    opener.files[0].write_bytes(resealed(len(new).to_bytes(8, "big") + new + content[end:]))
    assert len(opener()) == 12
    assert opener.built == 2


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_index_that_others_may_have_written_is_not_opened(opener, mode):
    opener()
    assert opener.files[0].stat().st_mode & 0o777 == 0o600
    opener.files[0].chmod(mode)
    opener()
    assert opener.built == 2
    opener()
    assert opener.built == 2  # the new one is ours


def test_an_index_of_another_user_is_not_opened(opener, monkeypatch):
    opener()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(opener.files[0]).st_uid + 1)
    opener()
    assert opener.built == 2


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\0.png", ""])
@pytest.mark.parametrize("column", ["name", "mask", "source", "segmentation", "caption"])
def test_a_name_that_leaves_the_folder_is_refused_on_use(tmp_path, column, name):
    entries = [Entry(**{"name": "1.png", column: name}), Entry("a/..b/2.png")]
    index = folder_index(tmp_path, {}, lambda: Found(entries), tmp_path / "cache", least=1)
    with pytest.raises(SampleError, match=r"names .*, which lies outside"):
        index[0]
    assert index[1].name == "a/..b/2.png"


def images_of(entries, tmp_path, **settings):
    """A data module of a folder whose kept index holds these entries, whoever wrote it."""
    kept = folder_index(tmp_path, {}, lambda: Found(entries), tmp_path / "cache", least=1)
    crops = ImageFolderData(tmp_path, size=8).crops(training=False)
    return FolderImages(kept, np.arange(len(kept)), crops, **settings)


COLUMNS = [
    {"\0rows": 5}, {"\0rows": [5]}, {"\0texts": 5}, {"\0texts": [5]}, {"\0texts": ["../secret.txt"]},
    {"\0broken": 5}, [5],
]  # fmt: skip


@pytest.mark.parametrize("changed", [{"name": "../x.png"}, *({"columns": columns} for columns in COLUMNS)], ids=str)
def test_what_a_changed_index_says_of_an_image_is_that_image_s_error_and_skipped(tmp_path, changed):
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    images = images_of([Entry("1.png"), Entry(**{"name": "2.png", **changed})], tmp_path)
    with pytest.raises(SampleError):
        images[1]
    images.skips = Skips(tmp_path / "skipped", 0, 1, 0.5, 2)
    assert images[1]["name"] == "1.png"
    assert list(images.skips.read()) == [changed.get("name", "2.png")]


def test_a_pipe_in_the_cache_is_not_waited_for(opener):
    opener()
    file = opener.files[0]
    file.unlink()
    os.mkfifo(file)
    assert len(opener()) == 12
    assert file.is_file()


def test_what_a_killed_builder_left_is_swept_and_what_another_writes_is_not(opener):
    opener.cache.mkdir()
    left, written = (opener.cache / f"{name}.half-written" for name in ("left", "written"))
    left.write_bytes(b"half")
    with written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opener()
        assert not left.exists()
        assert written.exists()


def test_builders_of_the_same_folder_do_not_break_each_other_s_copies(opener):
    sent = pickle.dumps(opener())
    opener.files[0].unlink()
    opener()
    assert opener.built == 2
    assert len(pickle.loads(sent)) == 12  # the same content: the same index


def test_a_cache_that_cannot_be_written_costs_a_warning(photos, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    opener = Opener(photos, tmp_path / "cache" / "folders")
    with pytest.warns(UserWarning, match="cannot keep the index of .*photos in .*: each run builds it anew; set index"):
        assert len(opener()) == 12


def test_a_disk_that_is_full_leaves_nothing_behind(opener, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(opener()) == 12
    assert opener.files == []


# Processes


def test_it_is_sent_to_workers_without_its_table(tmp_path):
    entries = [Entry(f"folder/{number:05}.png", columns={"caption": "a caption " * 5}) for number in range(5000)]
    settings = (tmp_path, {}, lambda: Found(entries), tmp_path / "cache")
    small, kept = folder_index(*settings, least=5001), folder_index(*settings, least=1)
    assert len(pickle.dumps(small)) > 300_000
    sent = pickle.dumps(kept)
    assert len(sent) < 1000
    before = pa.total_allocated_bytes()
    copy = pickle.loads(sent)
    assert pa.total_allocated_bytes() == before  # mapped, not read
    assert [copy[0], copy[4999]] == [entries[0], entries[4999]] == [kept[0], kept[4999]]
    assert everything(pickle.loads(pickle.dumps(small)))[::999] == entries[::999]


def test_a_worker_never_gets_another_index_than_was_sent(opener):
    sent = pickle.dumps(opener())
    assert len(pickle.loads(sent)) == 12
    edit(opener.root, "a/00.png", b"x", same_time=True)
    opener()
    with pytest.raises(RuntimeError, match=r"photos has changed and its index .* was built anew .*; start the run"):
        pickle.loads(sent)
    opener.files[0].unlink()
    with pytest.raises(RuntimeError, match=r"the index of .*photos is gone from .*; start the run again"):
        pickle.loads(sent)
