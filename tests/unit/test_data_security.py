"""What strangers may put into a data set: refused before it runs, reads or takes anything. SECURITY.md lists it all."""

import gc
import io
import os
import re
import tarfile
import tracemalloc
import zlib
from threading import Event

import datasets
import numpy as np
import pytest
import torch
from pictures import read_image
from PIL import Image, ImageCms
from running import ROOT, add_file, quiet_datasets
from safetensors.torch import save_file

from latentdm.cache.keys import IDENTITIES, identity
from latentdm.data import HuggingFaceData, ImageFolderData, LatentsData, SampleError, WebDatasetData, files
from latentdm.data.decode import FORMATS, MAX_TRANSFORMS, read_size
from latentdm.data.levels import mask_image

ROWS = re.findall(r"\| `(tests/\S+\.py)::(\w+)` \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), ROWS, ids=[name for _, name in ROWS])
def test_each_threat_has_its_test(file, name):
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_table_of_threats_is_not_empty():
    assert len(ROWS) >= 15


# Decoders


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
DANGEROUS = {
    "EPS": EPS,
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(500),
    "PSD": b"8BPS\0\1" + bytes(500),
    "ICNS": b"icns" + bytes(500),
}


def source(kind, tmp_path, content):
    """A data module whose only image is a file named .png of that content."""
    if kind == "folder":
        (tmp_path / "x.png").write_bytes(content)
        return ImageFolderData(tmp_path, size=8, batch_size=1, val_share=0)
    if kind == "shard":
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            (tmp_path / "x.png").write_bytes(content)
            tar.add(tmp_path / "x.png", "x.png")
        return WebDatasetData(str(tmp_path / "s.tar"), size=8, batch_size=1, epoch_length=1)
    with quiet_datasets():
        rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": "x.png"}]})
        rows.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "rows")
    return HuggingFaceData(str(tmp_path / "rows"), size=8, batch_size=1, val_share=0)


@pytest.mark.parametrize("kind", ["folder", "shard", "rows"])
@pytest.mark.parametrize("content", DANGEROUS.values(), ids=DANGEROUS)
def test_what_runs_programs_is_not_decoded(tmp_path, monkeypatch, kind, content):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    data = source(kind, tmp_path, content)
    data.setup()
    with pytest.raises(SampleError, match="its content is no image that Pillow knows; repair or remove the file"):
        list(data.train_dataloader())


@pytest.mark.parametrize("ending", [ending for endings in FORMATS.values() for ending in endings])
def test_every_listed_ending_is_read(tmp_path, ending):
    (tmp_path / "dot").mkdir()
    image = Image.new("L" if ending in (".pgm", ".pbm") else "RGB", (9, 8), "white")
    file = tmp_path / "dot" / f"x{ending}"
    image.save(file, {".apng": "PNG", ".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP"}.get(ending))
    data = ImageFolderData(tmp_path / "dot", size=8, batch_size=1, val_share=0)
    data.setup()
    assert data.train_set[0]["pixels"].min() >= 250


# Memory


def png_head(width, height, mode="RGB"):
    """The head of a PNG of any size, with hardly any content."""
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "PNG")
    content = file.getvalue()
    head = content[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


def test_the_rows_of_a_picture_of_one_row_count_as_well():
    with pytest.raises(SampleError, match=r"its 100000000 × 1 pixels of mode I;16 take \d+ MiB"):
        read_image(png_head(100_000_000, 1, "I;16"))


@pytest.mark.parametrize(("mode", "side"), [("RGB", 13_000), ("RGBA", 11_000), ("I;16", 13_300), ("LA", 11_000)])
def test_a_picture_that_takes_too_much_is_refused_before_it_is_decoded(mode, side):
    content = png_head(side, side, mode)
    message = (
        rf"its {side} × {side} pixels of mode {mode} take \d+ MiB, and a file of \d+ bytes may take 448 \(set max_"
    )
    for read in (read_image, mask_image, read_size):  # Pillow decodes a PNG to look for its orientation
        with pytest.raises(SampleError, match=message):
            read(content)
    with pytest.raises(SampleError, match="truncated"):  # allowed, and then not there
        read_image(content, max_pixels=10**9)


def profiled(number, size=10**6):
    """A picture with a profile of its own, of a megabyte."""
    file, profile = io.BytesIO(), ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    Image.new("RGB", (4, 4)).save(file, "TIFF", icc_profile=profile + np.random.default_rng(number).bytes(size))
    return file.getvalue()


def test_the_conversions_of_a_number_of_profiles_are_kept(monkeypatch):
    made, build = [], ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *given: made.append(given) or build(*given))
    for number, count in ((100, 1), (100, 1), *((100 + other, 1 + other) for other in range(1, MAX_TRANSFORMS + 1))):
        read_image(profiled(number, 8))
        assert len(made) == count
    read_image(profiled(100, 8))
    assert len(made) == MAX_TRANSFORMS + 2  # the first had made room


def test_colour_profiles_are_not_kept():
    """Of 40 files none is held on to."""
    read_image(profiled(0))
    tracemalloc.start()
    for number in range(1, 41):
        read_image(profiled(number))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2_000_000


# Files that do not answer


@pytest.mark.parametrize("name", ["2.png", "2.txt", "2-mask.png"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_file_that_answers_after_an_hour_is_skipped_or_named(tmp_path, monkeypatch, name, on_error):
    for number in range(4):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
        Image.new("L", (9, 9)).save(tmp_path / f"{number}-mask.png")
        (tmp_path / f"{number}.txt").write_text("a caption")
    hour, opened = Event(), files.open_regular

    def slow(path):
        if path.name == name:
            hour.wait()
        return opened(path)

    monkeypatch.setattr(files, "open_regular", slow)
    monkeypatch.setattr(files, "GRACE_S", 0.4)  # the test is over when the hanging call is given up
    data = ImageFolderData(
        tmp_path, size=8, batch_size=4, val_share=0, on_error=on_error, max_skipped_share=0.5, read_timeout=0.05
    )
    data.setup()
    if on_error == "raise":
        with pytest.raises(
            SampleError, match=rf"^ImageFolderData: cannot read \S*/{name}: nothing came within read_tim"
        ):
            list(data.train_dataloader())
    else:
        (batch,) = data.train_dataloader()
        assert len(batch["name"]) == 4
        assert "2.png" not in batch["name"]
        assert f"{name}: nothing came within read_timeout=0.05 seconds" in data.skips.report()
    hour.set()


@pytest.mark.parametrize("name", ["2.png", "2.txt", "2-mask.png"])
def test_a_pipe_in_a_folder_is_named_and_not_waited_for(tmp_path, name):
    for number in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
        Image.new("L", (9, 9)).save(tmp_path / f"{number}-mask.png")
        (tmp_path / f"{number}.txt").write_text("a caption")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    data = ImageFolderData(tmp_path, size=8, batch_size=3, val_share=0, on_error="skip", max_skipped_share=1)
    data.setup()
    (batch,) = data.train_dataloader()
    assert "2.png" not in batch["name"]
    assert f"{name}: it is a pipe, not a file; remove it" in data.skips.report()


def test_a_pipe_as_metadata_or_as_a_shard_is_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: it is a pipe, not a file; remove it"):
        ImageFolderData(tmp_path, size=8, val_share=0).setup()
    os.mkfifo(tmp_path / "s.tar")
    for shard in (tmp_path / "s.tar", f"file://{tmp_path}/s.tar"):
        data = WebDatasetData(str(shard), size=8, batch_size=1, epoch_length=1)
        data.setup()
        with pytest.raises(SampleError, match=r"s\.tar: it is a pipe, not a file; remove it"):
            list(data.train_dataloader())


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.latent"])
def test_a_pipe_among_exported_latents_is_named(tmp_path, name):
    save_file({"latent_tensor": torch.ones(1, 4, 2, 2)}, tmp_path / "good.latent")
    os.mkfifo(tmp_path / name)
    data = LatentsData(tmp_path, batch_size=1, val_share=0)
    data.setup()
    with pytest.raises(SampleError, match=rf"{re.escape(name)}: it is a pipe, not a file"):
        [data.predict_set.sample(position, 0) for position in range(len(data.predict_set))]
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(SampleError, match=r"pipe\.tar: it is a pipe, not a file"):
        LatentsData(tmp_path, batch_size=1, val_share=0).setup()


@pytest.mark.parametrize("how", IDENTITIES)
def test_what_a_cached_picture_is_found_by_waits_for_no_pipe(tmp_path, how):
    os.mkfifo(tmp_path / "1.png")
    if how == "stat":  # nothing is opened
        assert identity(tmp_path / "1.png", how)[1] == 0
        return
    with pytest.raises(SampleError, match=r"1\.png: it is a pipe, not a file; remove it"):
        identity(tmp_path / "1.png", how)


# Data sets and shards


@pytest.mark.parametrize("column", ["image", "mask"])
def test_rows_that_name_files_outside_the_data_set_are_refused(tmp_path, column):
    Image.new("RGB", (9, 9), (7, 0, 0)).save(tmp_path / "secret.png")
    (tmp_path / "rows").mkdir()
    inside = io.BytesIO()
    Image.new("RGB", (9, 9)).save(inside, "PNG")
    for outside in (tmp_path / "secret.png", tmp_path / "rows" / ".." / "secret.png"):
        row = {name: {"bytes": inside.getvalue(), "path": None} for name in ("image", "mask")}
        row[column] = {"bytes": None, "path": str(outside)}
        with quiet_datasets():
            features = datasets.Features({name: datasets.Image(decode=False) for name in row})
            table = datasets.Dataset.from_dict({name: [value] for name, value in row.items()}, features)
            table.to_parquet(tmp_path / "rows" / "train.parquet")
            data = HuggingFaceData(str(tmp_path / "rows"), size=8, batch_size=1, val_share=0)
            data.setup()
        message = (
            rf"cannot read the {column} of train/0: its path \S*secret.png lies outside the data set; .*allow_outside"
        )
        with pytest.raises(SampleError, match=message):
            list(data.train_dataloader())
        with quiet_datasets():
            data = HuggingFaceData(str(tmp_path / "rows"), size=8, batch_size=1, val_share=0, allow_outside=True)
            data.setup()
        assert len(list(data.train_dataloader())) == 1


def tar_of(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            add_file(tar, name, Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("shards", ["pipe:touch {}/run", ["{}/s.tar", "pipe:touch {}/run"], "{{pipe:touch {}/run,x}}"])
@pytest.mark.parametrize("setting", ["shards", "val_shards"])
def test_a_command_among_shards_is_refused(tmp_path, shards, setting):
    shards = [shard.format(tmp_path) for shard in shards] if isinstance(shards, list) else shards.format(tmp_path)
    tar_of(tmp_path / "s.tar", "1.png")
    data = WebDatasetData(**{"shards": str(tmp_path / "s.tar"), setting: shards})
    with pytest.raises(
        ValueError, match=r"^WebDatasetData: shards holds 'pipe:touch .*/run', which runs a command .*allow_p"
    ):
        data.setup()
    assert not (tmp_path / "run").exists()


def files_of(path):
    """The members of a tar, without its end."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    return path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512]


def promising(size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo("2.png")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "head",
    [promising(10**10), promising(10**9, tarfile.GNUTYPE_LONGNAME), promising(10**9, tarfile.XHDTYPE)],
    ids=["member", "name", "attributes"],
)
def test_a_member_that_promises_gigabytes_is_refused(tmp_path, head):
    tar_of(tmp_path / "s.tar", "1.png")
    (tmp_path / "s.tar").write_bytes(files_of(tmp_path / "s.tar") + head + bytes(100_000))
    data = WebDatasetData(str(tmp_path / "s.tar"), size=8, batch_size=1, epoch_length=9, on_error="skip")
    data.setup()
    with pytest.raises(RuntimeError, match="cannot be read"):  # each turn meets it anew
        list(data.train_dataloader())
    assert "bytes" in data.skips.report()


def test_a_sparse_member_is_refused(tmp_path):
    tar_of(tmp_path / "s.tar", "1.png")
    sparse = promising(512, tarfile.GNUTYPE_SPARSE) + bytes(20_000)
    (tmp_path / "s.tar").write_bytes(files_of(tmp_path / "s.tar") + sparse)
    data = WebDatasetData(str(tmp_path / "s.tar"), size=8, batch_size=1, epoch_length=9)
    data.setup()
    with pytest.raises(SampleError, match="sparse"):
        list(data.train_dataloader())
