"""Image files of every mode, written with Pillow and read back; and how masks are resized."""

import numpy as np
import pytest
import torch
from pictures import read_image, read_mask, resize_mask
from PIL import Image

from latentdm.data.decode import decode, image_to_tensor, read_size

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def read(path):
    return np.asarray(read_image(path)[0])


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff", "PNG"])
def test_rgb(tmp_path, ending):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(RGB), f"image.{ending}")), RGB)


def test_webp_and_jpeg(tmp_path):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(RGB), "image.webp", lossless=True)), RGB)
    flat = np.full((16, 16, 3), (200, 90, 30), dtype=np.uint8)
    assert np.abs(read(saved(tmp_path, Image.fromarray(flat), "image.jpg", quality=95)).astype(int) - flat).max() <= 3


def test_gray_becomes_three_equal_channels(tmp_path):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(GRAY))), np.stack([GRAY] * 3, axis=-1))


def test_black_and_white(tmp_path):
    bits = read(saved(tmp_path, Image.fromarray(GRAY > 100)))
    assert np.array_equal(bits[..., 0], (GRAY > 100) * np.uint8(255))


def test_palette(tmp_path):
    few = (RGB // 128) * 127
    palette = Image.fromarray(few).quantize(16)
    assert np.array_equal(read(saved(tmp_path, palette)), few)


def test_palette_with_transparency_keeps_it_and_warns_of_nothing(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    path = saved(tmp_path, image, transparency=bytes([0, 99]))
    assert read(path).tolist() == [[[255, 0, 0, 0], [0, 255, 0, 99]]]


def test_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert read(saved(tmp_path, image, transparency=(4, 5, 6))).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 0]]]


def test_alpha_and_gray_with_alpha(tmp_path):
    rgba = np.concatenate([RGB, GRAY[..., None]], axis=-1)
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(rgba))), rgba)
    la = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)])
    back = read(saved(tmp_path, la))
    assert np.array_equal(back[..., 0], GRAY)
    assert np.array_equal(back[..., 3], 255 - GRAY)


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (3, 2), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    assert read(saved(tmp_path, image, "image.tif"))[0, 0].tolist() == [255, 0, 0]
    assert np.abs(read(saved(tmp_path, image, "image.jpg", quality=100))[0, 0].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_rounded_to_eight_and_not_clipped(tmp_path, ending):
    levels = np.array([[0, 128, 129, 257, 32768, 40000, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.round(levels / 257)
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(levels), f"image.{ending}"))[..., 0], expected)
    mask = read_mask(saved(tmp_path, Image.fromarray(levels), f"mask.{ending}"))
    assert np.array_equal(mask[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1],
        5: RGB.swapaxes(0, 1), 6: np.rot90(RGB), 7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored[orientation])), exif=exif)
    assert np.array_equal(read(path), RGB)
    assert read_size(path) == RGB.shape[1::-1]  # by which its bucket is chosen


def test_odd_metadata_are_no_warning(tmp_path):
    """A person can do nothing about what Pillow warns of; here a warning is an error."""
    odd = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    assert read(saved(tmp_path, Image.new("RGB", (4, 4), (9, 9, 9)), "image.jpg", exif=odd)).max() == 9


def test_a_jpeg_is_decoded_no_larger_than_it_is_wanted(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (800, 600), (200, 90, 30)), "image.jpg")
    image, size = decode(path, resized=lambda width, height: (width // 5, height // 5))
    assert (image.size, size) == ((200, 150), (800, 600))  # a quarter: an eighth would be too small
    image, _ = decode(path)
    assert image.size == (800, 600)


def test_masks_keep_their_gray_levels(tmp_path):
    mask = read_mask(saved(tmp_path, Image.fromarray(GRAY)))
    assert mask.dtype == torch.uint8
    assert np.array_equal(mask, GRAY[None])
    rgba = np.stack([GRAY, GRAY, GRAY, 255 - GRAY], axis=-1)
    assert np.array_equal(read_mask(saved(tmp_path, Image.fromarray(rgba))), GRAY[None])
    bits = Image.fromarray(GRAY > 100)
    assert np.array_equal(read_mask(saved(tmp_path, bits))[0], (GRAY > 100) * np.uint8(255))


def test_a_mask_of_zeros_and_ones_is_black_and_white(tmp_path):
    ones = (GRAY > 100).astype(np.uint8)
    assert np.array_equal(read_mask(saved(tmp_path, Image.fromarray(ones)))[0], ones * 255)


def test_a_palette_mask_with_transparency_warns_of_nothing(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putdata([0, 1])
    assert read_mask(saved(tmp_path, image, transparency=bytes([0, 255]))).tolist() == [[[0, 255]]]


def test_float_levels_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(GRAY.astype(np.float32)), "image.tif")
    with pytest.raises(ValueError, match=r"^cannot read .*image.tif: its levels are floats, .*8 or 16 bits\); repair"):
        read_image(path)


def test_32_bit_levels_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "image.tif")
    with pytest.raises(ValueError, match=r"its levels span 0…70000 \(save it with 8 or 16 bits\)"):
        read_image(path)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_truncated_files_are_named(tmp_path, ending, share):
    path = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), f"image.{ending}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"^cannot read .*image.{ending}: .+; repair or remove the file$"):
        read_image(path)


def test_a_broken_chunk_is_named(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
    data = bytearray(path.read_bytes())
    data[33:37] = (1000).to_bytes(4, "big")  # the first chunk of pixels ends too early: a SyntaxError of Pillow's
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^cannot read .*image.png: .*broken PNG.*; repair or remove the file$"):
        read_image(path)


def test_an_absurd_size_is_named(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB))
    with pytest.raises(ValueError, match=r"^cannot read .*image.png: its 7 × 5 pixels exceed max_pixels=34; rep"):
        read_image(path, max_pixels=34)


def test_another_content_is_said(tmp_path):
    (tmp_path / "image.png").write_text("not an image")
    with pytest.raises(
        ValueError, match=r"image.png: its content is no image that Pillow knows; repair or remove the file$"
    ):
        read_image(tmp_path / "image.png")


def test_image_to_tensor():
    assert np.array_equal(image_to_tensor(Image.fromarray(RGB)), RGB.transpose(2, 0, 1))
    assert image_to_tensor(Image.fromarray(GRAY)).shape == (1, 5, 7)


def test_masks_are_resized_bilinearly_without_antialias():
    # One pixel in eight is white; an antialiased (averaging) shrink by 4 would see it everywhere.
    line = torch.zeros(1, 1, 16, dtype=torch.uint8)
    line[..., 0] = 255
    assert resize_mask(line, 1, 4).tolist() == [[[0, 0, 0, 0]]]
    assert resize_mask(torch.tensor([[[0, 200]]], dtype=torch.uint8), 1, 4).tolist() == [[[0, 50, 150, 200]]]


def test_half_stays_half_and_so_rounds_down_later():
    pair = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert resize_mask(pair, 1, 1).item() == 127
    assert (resize_mask(pair, 1, 1) / 255).round().item() == 0
