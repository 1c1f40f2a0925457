"""Folders that do not answer, or lie inside one another: what a listing makes of them."""

import json
import os
from pathlib import Path
from threading import Event

import pytest
from PIL import Image

from latentdm.data import ImageFolderData, LatentsData, SampleError, files
from latentdm.data.index import NO_STAMP
from latentdm.data.listing import AT_ONCE, list_files

# -------------------------------------------------------------------- storage that is gone


@pytest.fixture
def dead(monkeypatch):
    """Lets calls of `os` on a path of some name hang, until the test is over."""
    over = Event()
    monkeypatch.setattr(files, "GRACE_S", 0.4)  # each test is over when the hanging call is given up

    def make(call, name):
        real = getattr(os, call)

        def hanging(path, *arguments, **options):
            if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(name):
                over.wait()
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, call, hanging)

    yield make
    over.set()


@pytest.fixture
def photos(tmp_path):
    for name in ("a/1.png", "a/b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    return tmp_path


def folder(root, **settings):
    return ImageFolderData(root, **{"size": 8, "batch_size": 1, "val_share": 0, "read_timeout": 0.05, **settings})


@pytest.mark.parametrize("call", ["scandir", "stat"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_folder_that_does_not_answer_ends_the_listing_with_its_name(photos, dead, call, on_error):
    data = folder(photos, on_error=on_error)
    dead(call, "a/b")
    with pytest.raises(
        SampleError, match=r"^ImageFolderData: cannot read \S*/a/b: nothing came within read_timeout=0\.05 s"
    ):
        data.setup()


def test_a_root_that_does_not_answer_is_named_at_once(photos, dead):
    dead("stat", photos.name)
    with pytest.raises(SampleError, match=rf"^ImageFolderData: cannot read \S*{photos.name}: nothing came within"):
        folder(photos)


def test_folders_beside_the_root_have_the_same_clock(photos, dead):
    dead("stat", "masks")
    with pytest.raises(SampleError, match=r"cannot read \S*masks: nothing came within read_timeout=0\.05"):
        folder(photos).setup()


def test_a_kept_index_of_storage_that_is_gone_is_no_reason_to_build_it_anew(
    photos, dead, monkeypatch, tmp_path_factory
):
    monkeypatch.setattr("latentdm.data.folder.KEPT_FROM", 1)
    for path in (photos, *photos.rglob("*")):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    settings = {"index_dir": tmp_path_factory.mktemp("kept")}
    folder(photos, **settings).setup()
    monkeypatch.setattr("latentdm.data.folder.find_images", None)  # or it would be built
    folder(photos, **settings).setup()
    dead("stat", "a/b")
    with pytest.raises(SampleError, match="nothing came within read_timeout"):
        folder(photos, **settings).setup()


def test_a_large_folder_is_taken_piece_by_piece(tmp_path):
    for number in range(2 * AT_ONCE + 1):
        (tmp_path / f"{number}.png").touch()
    assert len(list_files(tmp_path).images) == 2 * AT_ONCE + 1


def test_a_folder_that_cannot_be_listed_is_tried_again_the_next_time(photos, monkeypatch):
    real = os.scandir

    def forbidden(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    listing = list_files(photos)
    assert listing.problems == [
        f"cannot list {photos}/a/b: Permission denied; let it be read, or move it out of the root"
    ]
    assert listing.watched["a/b"] == NO_STAMP  # which no folder has that is there
    latents = LatentsData(photos)
    with pytest.raises(ValueError, match=r"^LatentsData: cannot list \S*/a/b: Permission denied"):
        latents.setup()


# -------------------------------------------------------------------- a folder for validation inside the root


def described(root, rows):
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def samples(data, part):
    return {sample["name"]: sample for sample in getattr(data, part)}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("masks", ["named", "folder"])
def test_what_is_written_above_is_of_both(tmp_path, on_error, masks):
    for name in ("1", "2", "val/3", "val/4"):
        mask = tmp_path / ("masks" if masks == "folder" else "mattes") / f"{name}.png"
        for path in (tmp_path / f"{name}.png", mask):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), 255 if path == mask else 7).save(path)
    rows = [{"file_name": f"{name}.png", "caption": f"caption {name}"} for name in ("1", "2", "val/3", "val/4")]
    if masks == "named":
        rows = [row | {"mask": f"mattes/{row['file_name']}"} for row in rows]
    described(tmp_path, rows)
    data = folder(tmp_path, val_root=tmp_path / "val", on_error=on_error)
    data.setup()
    assert data.problems() == []
    for part, names, first in (("train_set", ("1", "2"), 0), ("val_set", ("3", "4"), 2)):
        found = samples(data, part)
        assert [(name, sample["index"]) for name, sample in found.items()] == [
            (f"{name}.png", first + number) for number, name in enumerate(names)
        ]
        above = "val/" * (part == "val_set")
        assert [sample["caption"] for sample in found.values()] == [f"caption {above}{name}" for name in names]
        assert all(sample["mask"].min() == 255 for sample in found.values())
    assert list(samples(data, "predict_set")) == ["1.png", "2.png", "3.png", "4.png"]


def test_a_link_to_the_folder_for_validation_brings_none_of_it_into_training(photos, tmp_path_factory):
    (photos / "0").symlink_to(photos / "a" / "b")  # listed before it
    data = folder(photos, val_root=photos / "a" / "b")
    data.setup()
    assert list(samples(data, "train_set")) == ["a/1.png", "c/3.png"]
    assert list(samples(data, "val_set")) == ["2.png"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (9, 9)).save(elsewhere / "5.png")
    (photos / "1").symlink_to(elsewhere)
    data = folder(photos, val_root=elsewhere)
    data.setup()
    assert [*samples(data, "train_set"), *samples(data, "val_set")] == ["0/2.png", "a/1.png", "c/3.png", "5.png"]


@pytest.mark.parametrize(
    ("val_root", "message"),
    [(".", "no images in root="), ("empty", "no images in val_root="), ("..", r"root=\S* lies in val_root=\S*, whose")],
)
def test_neither_side_is_left_without_images_of_its_own(photos, val_root, message):
    (photos / "a" / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^ImageFolderData: {message}"):
        folder(photos / "a", val_root=Path(photos / "a" / val_root)).setup()
