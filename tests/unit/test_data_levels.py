"""Masks and label maps of every dtype, palette and depth, and their resizing, of which what is kept is computed."""

import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pictures import read_mask, resize_mask
from PIL import Image

from latentdm.data import ImageFolderData, SampleError
from latentdm.data.geometry import Record, ResizeCrop, square
from latentdm.data.levels import label_image, mask_image, nearest, of_image, resized

VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
"""The first colours of the palette in which PASCAL VOC and DAVIS have their label maps."""


def file_of(levels, kind="png", **options):
    out = io.BytesIO()
    image = levels if isinstance(levels, Image.Image) else Image.fromarray(levels)
    image.save(out, {"tif": "TIFF", "png": "PNG", "bmp": "BMP", "gif": "GIF", "pgm": "PPM"}[kind], **options)
    return out.getvalue()


def mask_of(levels, kind="png", **options):
    return np.asarray(mask_image(file_of(levels, kind, **options)))


def palette(numbers, colours):
    numbers = np.asarray(numbers, dtype=np.uint8)
    paletted = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    paletted.putpalette(colours)
    return paletted


def raw_tiff(levels, bits, sample_format):
    """An uncompressed TIFF of one channel, for the layouts that Pillow reads but does not write."""
    height, width = levels.shape
    content = levels.astype(levels.dtype.newbyteorder("<")).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
            (279, len(content)), (339, sample_format)]  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags
    )
    head = b"II*\0" + (8 + len(content)).to_bytes(4, "little")
    return head + content + len(tags).to_bytes(2, "little") + entries + bytes(4)


# What a level means

ONES = np.array([[0, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    "content",
    [
        file_of(ONES.astype(bool)),
        file_of(ONES.astype(np.uint8)),
        file_of(ONES.astype(np.uint16)),
        file_of(ONES.astype(np.uint16), "tif"),
        file_of(ONES.astype(np.uint16), "tif", compression="tiff_lzw"),
        file_of(ONES.astype(np.int32), "tif"),
        file_of(ONES.astype(np.int32), "tif", compression="tiff_deflate"),
        file_of(ONES.astype(np.float32), "tif"),
        file_of(palette(ONES, VOC)),
        file_of(palette(ONES, [0, 0, 0, 255, 255, 255])),
        file_of(palette(ONES, [0, 0, 0, 1, 1, 1])),
        file_of(palette(1 - ONES, [255, 255, 255, 0, 0, 0])),
        file_of(palette(ONES, VOC), "gif"),
        file_of(palette(ONES, VOC), transparency=0),
        file_of(np.repeat(ONES.astype(np.uint8)[..., None] * 255, 3, axis=-1)),
        file_of(np.repeat(ONES.astype(np.uint8)[..., None], 3, axis=-1)),
        raw_tiff(ONES.astype(np.uint32), 32, 1),
        raw_tiff(ONES.astype(np.uint32) * (2**32 - 1), 32, 1),
        raw_tiff(ONES.astype(np.int32) * (2**31 - 1), 32, 2),
        raw_tiff(ONES.astype(np.int16) * (2**15 - 1), 16, 2),
        raw_tiff(ONES.astype(np.int16), 16, 2),
        b"P5 3 2 1 " + ONES.astype(np.uint8).tobytes(),
        b"P5 3 2 65535 " + (ONES * 65535).astype(">u2").tobytes(),
    ],
)
def test_zeros_and_ones_of_every_depth_are_black_and_white(content):
    assert np.array_equal(np.asarray(mask_image(content)), ONES * 255)


@pytest.mark.parametrize(("bits", "top"), [(1, 1), (2, 3), (4, 15)])
@pytest.mark.parametrize("full", [False, True])
def test_low_depths_of_gray(bits, top, full):
    """PNG of 1, 2 and 4 bits, which Pillow spreads over 0…255: the 1 in them is a one all the same."""
    import struct
    import zlib

    levels = [[0, 1], [1, 0]] if not full else [[0, top], [top, 0]]
    rows = b"".join(b"\0" + bytes([row[0] << (8 - bits) | row[1] << (8 - 2 * bits)]) for row in levels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 2, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(mask_image(content)).tolist() == [[0, 255], [255, 0]]
    assert np.asarray(label_image(content)).tolist() == levels


@given(arrays(np.uint8, (3, 5)))
def test_any_mask_of_8_bits(levels):
    expected = levels * 255 if levels.max() == 1 else levels
    assert np.array_equal(mask_of(levels), expected)
    assert np.array_equal(mask_of(np.repeat(levels[..., None], 3, axis=-1)), expected)
    assert np.array_equal(mask_of(palette(levels, np.repeat(np.arange(256), 3).tolist())), expected)


@given(arrays(np.uint16, (3, 5)), st.sampled_from(["png", "tif"]))
def test_any_mask_of_16_bits(levels, kind):
    top = levels.max()
    assume(top not in (1023, 4095, 16383))
    if 1 < top < 386:
        with pytest.raises(
            SampleError, match=rf"a mask: its highest level, {top} of 65535, would be black: save a mask"
        ):
            mask_of(levels, kind)
    else:
        assert np.array_equal(mask_of(levels, kind), np.round(levels / 257) if top > 1 else levels * 255)


@given(arrays(np.float32, (3, 5), elements=st.floats(0, 1, width=32)))
def test_any_mask_of_floats(levels):
    assert np.array_equal(mask_of(levels, "tif"), np.round(levels * np.float32(255)))


@pytest.mark.parametrize("wrong", [np.nan, -0.5, 1.5, 255, np.inf])
def test_floats_that_are_no_mask_are_named(wrong):
    levels = np.zeros((2, 3), np.float32)
    levels[1, 1] = wrong
    with pytest.raises(SampleError, match=r"^cannot read its mask: as a mask of floats it must be in 0…1, and spans "):
        mask_image(file_of(levels, "tif"), "its mask")


@given(arrays(np.uint8, (3, 5)), st.binary(min_size=768, max_size=768).map(list))
def test_any_palette_is_told_apart_or_refused_by_name(numbers, colours):
    used = np.array(colours).reshape(-1, 3)[np.unique(numbers)]
    gray = bool((np.ptp(used, axis=1) <= 16).all())
    content = file_of(palette(numbers, colours))
    if gray:
        luminance = np.round(np.array(colours).reshape(-1, 3) @ [0.299, 0.587, 0.114])[numbers]
        assert np.array_equal(np.asarray(mask_image(content)), luminance * 255 if luminance.max() == 1 else luminance)
    elif numbers.max() <= 1:
        assert np.array_equal(np.asarray(mask_image(content)), numbers * 255)
    else:
        with pytest.raises(SampleError, match=r"its palette has colours, and its numbers are .*masks=segmentation"):
            mask_image(content)
    assert np.array_equal(np.asarray(label_image(content)), numbers)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (file_of(np.full((2, 2, 3), (200, 10, 10), np.uint8)), "it has colours, and a mask is black and white"),
        (file_of(palette([[0, 15]], [(i * 77) % 256 for i in range(768)])), "its palette has colours.* are 0, 15: "),
        (file_of(np.array([[0, 20]], np.uint16)), "its highest level, 20 of 65535, would be black"),
        (file_of(np.array([[0, 4095]], np.uint16)), "its highest level, 4095, is white in 12 bits and black in 16"),
        (file_of(np.array([[0, -3]], np.int32), "tif"), "a mask has no levels below 0, and it has -3"),
        (file_of(np.array([[0, 70000]], np.int32), "tif"), "its highest level, 70000 of 2147483647, would be black"),
        (
            file_of(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)),
            "nothing but its transparency varies; save it as gray levels",
        ),
    ],
)
def test_what_is_no_mask_is_refused_by_name(content, why):
    with pytest.raises(SampleError, match=rf"^cannot read the mask of 7: .*{why}"):
        mask_image(content, "the mask of 7")


def test_a_sample_s_labels_are_those_of_its_map(tmp_path):
    """Between 0 and 10 nothing lies, however its image is resized."""
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    labels = np.where(np.arange(40) < 17, 0, 10)[None].repeat(40, 0).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "1-segmentation.png")
    data = ImageFolderData(tmp_path, size=15, val_share=0)
    data.setup()
    assert set(data.train_set[0]["segmentation"].flatten().tolist()) == {0, 10}


def test_a_label_map_in_a_jpeg_is_refused():
    """Its numbers would be those that the JPEG has made of them: 0 and 7 became 0, 1, 7 and 8."""
    file = io.BytesIO()
    Image.fromarray(np.repeat([[0, 7]], 4, axis=1).astype(np.uint8)).save(file, "JPEG")
    with pytest.raises(SampleError, match="the labels: it is a JPEG, which changes the numbers of a label map; sa"):
        label_image(file.getvalue(), "the labels")


def test_a_gray_jpeg_in_colours_is_a_mask(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(gray).convert("RGB").save(tmp_path / "mask.jpg")
    assert read_mask(tmp_path / "mask.jpg").shape == (1, 32, 32)


@given(arrays(np.int32, (3, 5)))
def test_labels_of_32_bits_are_what_they_are(levels):
    assert np.array_equal(np.asarray(label_image(file_of(levels, "tif"))), levels)


@given(arrays(st.sampled_from([np.uint8, np.uint16]), (3, 5)))
def test_labels_of_8_and_16_bits_are_what_they_are(levels):
    assert np.array_equal(np.asarray(label_image(file_of(levels))), levels)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (file_of(np.full((2, 2, 3), (200, 10, 10), np.uint8)), "it has colours"),
        (file_of(np.zeros((2, 2), np.float32), "tif"), "its levels are floats, and a label map holds integers"),
    ],
)
def test_what_is_no_label_map_is_refused_by_name(content, why):
    with pytest.raises(SampleError, match=rf"^cannot read the labels of 7: {why}"):
        label_image(content, "the labels of 7")


# Resizing


def by_torch(levels, height, width):
    """What `resized` replaces: all of the resized mask, by torch's own, not rounded."""
    whole = torch.from_numpy(levels)[None, None].double()
    return F.interpolate(whole, size=(height, width), mode="bilinear")[0, 0].numpy()


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.integers(1, 90),
    st.integers(1, 90),
    st.data(),
)
def test_a_part_of_a_resized_mask_is_the_part_of_torch_s(levels, height, width, data):
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    pick = resized(of_image(Image.fromarray(levels)), levels.shape[::-1], (width, height))
    part = pick(np.arange(top, bottom), np.arange(left, right))
    whole = by_torch(levels, height, width)[top:bottom, left:right]
    assert np.abs(part - whole).max() <= 0.5 + 1e-6  # a half may come out above, and goes down here: see below


def test_a_half_goes_down_whatever_the_processor_makes_of_it():
    """Exactly: in float32 a third of the halves of such masks come out above, and would be repainted."""
    random = np.random.default_rng(0)
    for _ in range(300):
        levels = (random.random(random.integers(1, 40, 2)) > 0.5) * np.uint8(255)
        (height, width), (new_height, new_width) = levels.shape, map(int, random.integers(1, 60, 2))
        kept = resize_mask(torch.from_numpy(levels)[None], new_height, new_width)[0].numpy()
        row, column = int(random.integers(new_height)), int(random.integers(new_width))
        y, x = (
            max(Fraction((2 * place + 1) * side, 2 * new) - Fraction(1, 2), Fraction(0))
            for place, side, new in ((row, height, new_height), (column, width, new_width))
        )
        (top, left), (below, beside) = (int(y), int(x)), (min(int(y) + 1, height - 1), min(int(x) + 1, width - 1))
        corners = {(top, left): (1 - y % 1) * (1 - x % 1), (top, beside): (1 - y % 1) * (x % 1)}
        total = sum(int(levels[place]) * weight for place, weight in corners.items())
        total += int(levels[below, left]) * (y % 1) * (1 - x % 1) + int(levels[below, beside]) * (y % 1) * (x % 1)
        if (top, left) == (top, beside):  # the last column: one corner, with the weights of both
            total += int(levels[top, left]) * (1 - y % 1) * (1 - x % 1)
        assert kept[row, column] == max(math.ceil(total - Fraction(1, 2)), 0)


@given(arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30))), st.integers(1, 70), st.integers(1, 70))
def test_labels_are_resized_as_pillow_does_it_by_nearest(labels, height, width):
    image = Image.fromarray(labels)
    pick = nearest(of_image(image), image.size, (width, height))
    kept = pick(np.arange(height), np.arange(width))
    assert set(np.unique(kept)) <= set(np.unique(labels))
    if height % 2 == labels.shape[0] % 2 == width % 2 == labels.shape[1] % 2 == 1:  # no centre lies between two labels
        assert np.array_equal(kept, np.asarray(image.resize((width, height), Image.Resampling.NEAREST)))


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (40_000, 3)])
def test_of_a_thin_picture_only_what_is_kept_is_computed(size):
    mask = np.random.default_rng(0).integers(0, 2, size[::-1], dtype=np.uint8) * np.uint8(255)
    record = Record(
        "thin", 0, file_of(np.repeat(mask[..., None], 3, axis=-1)), file_of(mask), segmentation=file_of(mask)
    )
    sample = ResizeCrop(square(16))(record, 0)
    assert sample["pixels"].shape == (3, 16, 16)
    assert sample["mask"].shape == sample["segmentation"].shape == (1, 16, 16)


# In a folder


@pytest.fixture
def labelled(tmp_path):
    """An image with a label map of two classes, in a palette, and a mask."""
    labels = np.zeros((30, 50), np.uint8)
    labels[:, 20:] = 10
    Image.new("RGB", (50, 30), (9, 9, 9)).save(tmp_path / "1.png")
    palette(labels, list(range(256)) * 3).save(tmp_path / "1-segmentation.png")
    Image.fromarray((labels > 0) * np.uint8(255)).save(tmp_path / "1-mask.png")
    return tmp_path


def test_a_label_map_has_a_key_of_its_own_and_stays_what_it_is(labelled):
    data = ImageFolderData(labelled, size=12, val_share=0, batch_size=1, flip=True)
    data.setup()
    for epoch in range(5):
        sample = data.train_set[0, epoch]
        assert sample["segmentation"].dtype == torch.int32
        assert sample["segmentation"].unique().tolist() == [0, 10]
        soft = (sample["mask"].float() / 255 - (sample["segmentation"] == 10).float()).abs()
        assert (soft > 0.5).float().mean() < 0.1  # the same geometry
    (batch,) = data.train_dataloader()
    assert batch["segmentation"].shape == (1, 1, 12, 12)


def test_label_maps_may_be_left_out_or_required(labelled):
    data = ImageFolderData(labelled, size=12, val_share=0, segmentations="ignore")
    data.setup()
    assert "segmentation" not in data.train_set[0]
    (labelled / "1-segmentation.png").unlink()
    data = ImageFolderData(labelled, size=12, val_share=0, segmentations="require")
    with pytest.raises(ValueError, match=r"^ImageFolderData: an image without a segmentation: .*segmentations=ignore"):
        data.setup()
