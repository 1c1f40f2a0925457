"""Pairs: a source beside its image, found in each kind of data and given the same geometry to the pixel."""

import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from running import add_file, quiet_datasets

from latentdm.data import HuggingFaceData, ImageFolderData, SampleError, WebDatasetData
from latentdm.data.geometry import Record, ResizeCrop, square


def gradient(height=40, width=70):
    """``H W 3``: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([3 * x, 5 * y, x + y], axis=-1).astype(np.uint8)


def pair(height=40, width=70):
    """An image and its source, whose levels are the image's the other way round."""
    return Image.fromarray(gradient(height, width)), Image.fromarray(255 - gradient(height, width))


def write_pair(root, image="1.png", source="1-source.png", height=40, width=70):
    for name, picture in zip((image, source), pair(height, width), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)


def folder(root, **settings):
    data = ImageFolderData(root, **{"size": 16, "batch_size": 2, "val_share": 0, **settings})
    data.setup()
    return data


def names(data):
    return [data.predict_set.name(position) for position in range(len(data.predict_set))]


# Geometry


@pytest.mark.parametrize("settings", [{"size": 40}, {"size": 16}, {"size": 90}, {"buckets": {"area": 1024, "step": 8}}])
def test_a_source_has_the_crop_and_flip_of_its_image_to_the_pixel(tmp_path, settings):
    write_pair(tmp_path)
    data, seen = folder(tmp_path, flip=True, **settings), set()
    for epoch in range(30):
        sample = data.train_set[0, epoch]
        pixels, source = sample["pixels"], sample["source"]
        assert source.dtype == torch.uint8
        assert source.shape == pixels.shape
        assert source.is_contiguous() == pixels.is_contiguous()  # channels-last, both
        if settings == {"size": 40}:  # nothing is resized
            assert torch.equal(source, 255 - pixels)
        # Else the two filters round halves to different sides.
        assert (255 - pixels.int() - source.int()).abs().max() <= 1
        seen.add((tuple(sample["crop_top_left"].tolist()), bool(pixels[0, 0, 0] > pixels[0, 0, -1])))
    assert len(seen) > 5
    assert len({mirrored for _, mirrored in seen}) == 2


def test_identical_files_give_identical_pixels(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    for name in ("1.jpg", "1-source.jpg"):
        picture.save(tmp_path / name)
    data = folder(tmp_path, flip=True)
    for epoch in range(5):
        sample = data.train_set[0, epoch]
        assert torch.equal(sample["source"], sample["pixels"])


def test_a_source_of_another_size_is_resized_along(tmp_path):
    write_pair(tmp_path)
    large = Image.fromarray(255 - gradient()).resize((140, 80), Image.Resampling.BICUBIC)
    large.save(tmp_path / "1-source.png")
    data = folder(tmp_path, flip=True)
    for epoch in range(10):
        sample = data.train_set[0, epoch]
        assert (255 - sample["pixels"].int() - sample["source"].int()).abs().max() <= 6


@pytest.mark.parametrize("content", [False, True])
def test_a_source_of_another_shape_is_named(tmp_path, content):
    write_pair(tmp_path)
    Image.new("RGB", (40, 70)).save(tmp_path / "1-source.png")
    what = r"has 40 × 70 pixels, which is another shape than the 70 × 40 of its image 1\.png; replace or remove it$"
    if content:
        image, source = ((tmp_path / name).read_bytes() for name in ("1.png", "1-source.png"))
        with pytest.raises(SampleError, match=r"^the source of 1\.png " + what):
            ResizeCrop(square(16))(Record("1.png", 0, image, source=source), epoch=0)
        return
    with pytest.raises(SampleError, match=r"^ImageFolderData: .*1-source\.png " + what):
        list(folder(tmp_path).train_dataloader())


def test_image_mask_and_source_together_and_alpha_for_the_image_alone(tmp_path):
    write_pair(tmp_path)
    Image.fromarray(gradient()[..., 0]).save(tmp_path / "masks.png")
    (tmp_path / "masks.png").rename(tmp_path / "1-mask.png")
    (batch,) = folder(tmp_path, size=40, alpha=True, flip=True).train_dataloader()
    assert batch["pixels"].shape == (1, 4, 40, 40)
    assert batch["source"].shape == (1, 3, 40, 40)
    assert torch.equal(255 - batch["source"], batch["pixels"][:, :3])
    assert (batch["mask"][:, 0].int() - batch["pixels"][:, 0].int()).abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_source_is_named_or_skipped(tmp_path, workers):
    for number in range(4):
        write_pair(tmp_path, f"{number}.png", f"{number}-source.png")
    (tmp_path / "2-source.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"^ImageFolderData: cannot read .*2-source\.png: its content is no image"):
        list(folder(tmp_path, num_workers=workers).predict_dataloader())
    data = folder(tmp_path, num_workers=workers, on_error="skip", max_skipped_share=0.5)
    seen = [name for batch in data.predict_dataloader() for name in batch["name"]]
    assert len(seen) == 4
    assert "2.png" not in seen


# Folders


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("1.png", "1-source.png"),
        ("in/1.jpg", "in/1-source.tif"),
        ("1.png", "sources/1.png"),
        ("in/1.png", "sources/in/1.bmp"),
        ("in/1.png", "sources/in/1-source.png"),
    ],
)
@pytest.mark.parametrize("sources", ["auto", "require"])
def test_where_a_source_may_lie(tmp_path, image, source, sources):
    write_pair(tmp_path, image, source)
    data = folder(tmp_path, sources=sources)
    assert names(data) == [image]
    assert set(data.predict_set[0]) >= {"pixels", "source"}
    ignored = folder(tmp_path, sources="ignore")
    assert names(ignored) == [image]
    assert "source" not in ignored.predict_set[0]


@pytest.mark.parametrize("column", ["source", "source_file_name", "before"])
@pytest.mark.parametrize("sources", ["auto", "ignore"])
def test_metadata_may_name_the_source(tmp_path, column, sources):
    write_pair(tmp_path, "1.png", "then/old.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", column: "then/old.png", "text": "x"}))
    data = folder(tmp_path, size=40, sources=sources, columns={"source": "before"} if column == "before" else {})
    assert names(data) == ["1.png"]
    sample = data.predict_set[0]
    assert sample["caption"] == "x"
    if sources == "ignore":
        assert "source" not in sample
    else:
        assert torch.equal(255 - sample["source"], sample["pixels"])


def test_what_is_wrong_with_the_sources_of_a_folder_is_named(tmp_path):
    write_pair(tmp_path)
    write_pair(tmp_path, "2.png", "sources/2.png")
    (tmp_path / "1-source.png").unlink()
    with pytest.raises(
        ValueError, match=r"^ImageFolderData: an image without a source: .*1\.png .*add 1-source\.png .*sources=ignore$"
    ):
        folder(tmp_path)
    write_pair(tmp_path)
    write_pair(tmp_path, "2.png", "2-source.png")
    with pytest.raises(
        ValueError, match=r"^ImageFolderData: two sources for one image, .*2-source.png and .*sources/2"
    ):
        folder(tmp_path)
    (tmp_path / "2-source.png").rename(tmp_path / "7-source.png")
    with pytest.raises(
        ValueError, match=r"^ImageFolderData: a source without an image: .*7-source.png; .*sources=ignore"
    ):
        folder(tmp_path)
    assert len(folder(tmp_path, sources="ignore").predict_set) == 2
    (tmp_path / "1-source.png").unlink()
    data = folder(tmp_path, on_error="skip", max_skipped_share=1)
    assert [batch["name"] for batch in data.predict_dataloader()] == [["2.png", "2.png"]]
    assert all(text in data.skips.report() for text in ("7-source.png", "an image without a source"))


def test_sources_that_are_required(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"^ImageFolderData: an image without a source: .*1\.png"):
        folder(tmp_path, sources="require")


# Data sets and shards


def test_a_data_set_with_sources(tmp_path):
    images = {name: datasets.Image() for name in ("image", "source", "before")}
    image, source = pair()
    content = {"image": [image], "source": [source], "before": [image]}
    with quiet_datasets():
        datasets.Dataset.from_dict(content, datasets.Features(images)).save_to_disk(tmp_path / "rows")
    for columns, same in (({}, False), ({"source": "before"}, True)):
        for streaming in (False, True):
            data = HuggingFaceData(
                str(tmp_path / "rows"), size=40, batch_size=1, columns=columns, flip=True, streaming=streaming,
                epoch_length=4,
            )  # fmt: skip
            data.setup()
            for batch in data.train_dataloader():
                expected = batch["pixels"] if same else 255 - batch["pixels"]
                assert torch.equal(batch["source"], expected)
    data = HuggingFaceData(str(tmp_path / "rows"), columns={"source": None})
    data.setup()
    assert "source" not in data.train_set[0]


def test_a_column_that_says_where_a_row_is_from_is_no_source(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "source": datasets.Value("string")})
    with quiet_datasets():
        content = {"image": [pair()[0]], "source": ["a web site"]}
        datasets.Dataset.from_dict(content, features).save_to_disk(tmp_path / "rows")
    data = HuggingFaceData(str(tmp_path / "rows"), size=16)
    data.setup()
    assert "source" not in data.train_set[0]


@pytest.mark.parametrize("columns", [{}, {"source": "before.png"}])
def test_shards_with_sources(tmp_path, columns):
    image, source = pair()
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add_file(tar, "1.png", image)
        add_file(tar, f"1.{columns.get('source', 'source.png')}", source)
        add_file(tar, "1.json", {"mask": "a text", "license": "free"})
    data = WebDatasetData(str(tmp_path / "s.tar"), size=40, batch_size=1, epoch_length=4, columns=columns, flip=True)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert torch.equal(batch["source"], 255 - batch["pixels"])
        assert batch["license"] == ["free"]
        assert "mask" not in batch  # a column that has the name of a picture is left out
