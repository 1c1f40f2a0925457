"""Samples that cannot be read: replaced, reported, and an error where there are too many."""

import errno
import json
import os
import tempfile

import numpy as np
import pytest
from PIL import Image

from latentdm.data import ImageFolderData


def loaded(root, **settings):
    defaults = {"size": 8, "batch_size": 7, "val_share": 0, "max_skipped_share": 1.0}
    data = ImageFolderData(root, **{**defaults, **settings})
    data.setup()
    return data


@pytest.fixture
def half_broken(tmp_path):
    """Twelve pictures, three of which are broken."""
    for number in range(12):
        Image.new("RGB", (10, 10), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in (3, 4, 9):
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    return tmp_path


def test_a_broken_sample_is_replaced_by_the_same_one_whatever_the_workers(half_broken):
    def names(workers, epoch):
        data = loaded(half_broken, on_error="skip", num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [name for batch in loader for name in batch["name"]]

    assert names(0, 0) == names(2, 0) == names(0, 0)
    assert len({tuple(names(0, epoch)) for epoch in range(4)}) == 4


def test_too_many_broken_samples_end_the_run(half_broken):
    data = loaded(half_broken, on_error="skip", max_skipped_share=0.2)
    with pytest.raises(
        RuntimeError, match=r"^ImageFolderData: 3 of 12 samples cannot be read, .*max_skipped_share=0.2"
    ):
        list(data.predict_dataloader())
    list(loaded(half_broken, on_error="skip", max_skipped_share=0.25).predict_dataloader())
    with pytest.raises(RuntimeError, match=r"^ImageFolderData: [^\n]*$"):  # not in a worker's traceback
        list(loaded(half_broken, on_error="skip", max_skipped_share=0.1, num_workers=1).predict_dataloader())


@pytest.mark.parametrize("share", [1, 0.9])
def test_what_is_wrong_with_a_folder_counts_as_a_sample_of_its_own(tmp_path, share):
    Image.new("RGB", (20, 10)).save(tmp_path / "1.png")
    rows = ({"file_name": f"{number}.png", "text": "fine"} for number in range(1, 6))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = loaded(tmp_path, on_error="skip", max_skipped_share=share)
    assert [batch["name"] for batch in data.predict_dataloader()] == [["1.png"]]
    assert data.skips.report().startswith("4 of 5 samples could not be read")
    with pytest.raises(RuntimeError, match=r"4 of 5 samples cannot be read, more than max_skipped_share=0\.7"):
        loaded(tmp_path, on_error="skip", max_skipped_share=0.7).predict_dataloader()


def test_captions_and_masks_that_are_wrong(tmp_path):
    for number in range(6):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{number}.png")
        Image.new("L", (20, 10)).save(tmp_path / f"{number}-mask.png")
        (tmp_path / f"{number}.txt").write_text("fine", encoding="utf-8")
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    (tmp_path / "1-mask.png").unlink()
    Image.new("L", (10, 20)).save(tmp_path / "2-mask.png")
    (tmp_path / "3.txt").unlink()
    (tmp_path / "3.json").write_text("{broken")
    Image.new("L", (20, 10)).save(tmp_path / "orphan-mask.png")
    data = loaded(tmp_path, on_error="skip")
    batches = list(data.predict_dataloader())
    assert {name for batch in batches for name in batch["name"]} == {"4.png", "5.png"}
    report = data.skips.report()
    for text in (
        "0.txt: it is not UTF-8",
        "an image without a mask",
        "10 × 20 pixels",
        "3.json: it is no JSON",
        "orphan",
    ):
        assert text in report


def test_a_report_names_the_class_once(half_broken):
    data = loaded(half_broken, on_error="skip")
    list(data.predict_dataloader())
    with pytest.warns(UserWarning, match=r"^ImageFolderData: 3 of 12 samples could not be read") as caught:
        data.teardown("predict")
    assert str(caught[0].message).count("ImageFolderData") == 1


@pytest.mark.parametrize("name", ["../outside.png", "/etc/outside.png", "a/../../outside.png"])
def test_metadata_that_leave_the_folder_are_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    for path in (tmp_path / "outside.png", root / "1.png"):
        Image.new("RGB", (10, 10)).save(path)
    (root / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "x"}}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1 names a file outside root="):
        loaded(root)
    data = loaded(root, on_error="skip")
    assert [batch["name"] for batch in data.predict_dataloader()] == [["1.png"]]
    assert "names a file outside" in data.skips.report()


def test_a_loader_without_a_trainer_leaves_a_folder_only_where_it_skipped_samples(half_broken, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    Image.new("RGB", (10, 10)).save(tmp_path / "temporary" / "1.png")
    list(loaded(tmp_path / "temporary", on_error="skip").predict_dataloader())
    (tmp_path / "temporary" / "1.png").unlink()
    assert list((tmp_path / "temporary").iterdir()) == []
    data = loaded(half_broken, on_error="skip")
    list(data.predict_dataloader())
    assert [path.parent.parent for path in data.skips.folder.iterdir()] == [*(tmp_path / "temporary").iterdir()]


@pytest.mark.parametrize("full", ["folder", "file", "half a line"])
def test_a_full_disk_costs_one_warning_and_no_count(half_broken, monkeypatch, full):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    written = os.write
    if full == "folder":
        monkeypatch.setattr("pathlib.Path.mkdir", no_space)
    elif full == "file":
        monkeypatch.setattr(os, "write", no_space)
    else:
        monkeypatch.setattr(os, "write", lambda file, content: written(file, content[: len(content) // 2]))
    data = loaded(half_broken, on_error="skip")
    with pytest.warns(UserWarning, match=r"skipped samples cannot be listed in .*No space left on device") as caught:
        names = [name for batch in data.predict_dataloader() for name in batch["name"]]
    assert len(caught) == 1
    assert len(names) == 12
    assert set(data.skips.read()) == {"03.png", "04.png", "09.png"}
    report = data.skips.report()
    assert "3 of 12 samples could not be read" in report
    assert "none listed" in report
    data = loaded(half_broken, on_error="skip", max_skipped_share=0.2)
    with pytest.raises(RuntimeError, match="3 of 12 samples cannot be read"), pytest.warns(UserWarning, match="listed"):
        list(data.predict_dataloader())


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_replaced_by_one_of_another_shape_keeps_its_planned_bucket(tmp_path, on_error, workers):
    for number in range(12):
        shape = (64, 24, 3) if number % 2 else (24, 64, 3)
        Image.fromarray(np.full(shape, number, np.uint8)).save(tmp_path / f"{number}.png")
    settings = {"buckets": {"area": 256, "step": 8}, "batch_size": 6, "num_workers": workers, "on_error": on_error}
    data = loaded(tmp_path, **settings)
    Image.fromarray(np.full((64, 24, 3), 2, np.uint8)).save(tmp_path / "2.png")
    shapes = {tuple(batch["pixels"].shape): batch["pixels"][:, 0, 0, 0].tolist() for batch in data.predict_dataloader()}
    assert {shape: sorted(levels) for shape, levels in shapes.items()} == {
        (6, 3, 8, 24): [0, 2, 4, 6, 8, 10],
        (6, 3, 24, 8): [1, 3, 5, 7, 9, 11],
    }
    if on_error == "skip":
        assert data.skips.read() == {}
