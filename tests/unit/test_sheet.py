"""Sheets: every tile where `Sheet.box` says, images pixel for pixel, texts that fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentdm.preview.sheet import INK, PAPER, Sheet, three_components, tinted, to_image


def image(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def pixels(picture):
    return np.asarray(picture).astype(int)


def ink(picture, box):
    """How many pixels of a part are dark."""
    return int((pixels(picture.crop(box)).sum(-1) < 300).sum())


def test_tiles_lie_in_their_boxes_pixel_for_pixel():
    sheet = Sheet(["one", "two\nlines", "three"], (120, 96))
    rows = [[image(96, 120, seed=3 * row + column) for column in range(3)] for row in range(2)]
    picture = sheet.draw(rows, ["first", "second"])
    for row in range(2):
        for column in range(3):
            assert picture.crop(sheet.box(row, column)).tobytes() == to_image(rows[row][column]).tobytes()
    assert sheet.box(1, 2)[2:] < picture.size


def test_boxes_leave_room_between_each_other_and_for_titles():
    sheet = Sheet(["one", "two"], (128, 128))
    _, upper, right, lower = sheet.box(0, 0)
    assert sheet.box(0, 1)[0] > right
    assert sheet.box(1, 0)[1] >= lower + 17  # a line of text
    assert upper > 2 * 17  # the header, and the first title


@pytest.mark.parametrize(
    ("size", "tile"), [((128, 128), (128, 128)), ((32, 32), (96, 96)), ((512, 256), (256, 128)), ((8, 64), (16, 128))]
)
def test_small_images_grow_by_a_whole_factor_and_large_ones_shrink(size, tile):
    assert Sheet(["one"], size).tile == tile


def test_an_image_at_latent_resolution_is_stretched_and_stays_sharp():
    sheet = Sheet(["image", "latents"], (96, 96))
    latents = image(12, 12)
    tile = sheet.draw([[image(96, 96), latents]], ["row"]).crop(sheet.box(0, 1))
    assert np.array_equal(pixels(tile)[4::8, 4::8], pixels(to_image(latents)))
    assert len(np.unique(pixels(tile).reshape(-1, 3), axis=0)) <= 144


def test_one_channel_is_drawn_gray():
    assert to_image(torch.tensor([[[0.0, 0.5, 1.0]]])).tobytes() == bytes([0, 0, 0, 128, 128, 128, 255, 255, 255])


def test_headers_titles_and_notes_are_written_where_they_belong():
    sheet = Sheet(["one", "two"], (128, 128))
    black = [torch.zeros(3, 128, 128)] * 2
    with_texts = sheet.draw([black], ["a title"], ["a note below"])
    without = Sheet([" ", " "], (128, 128)).draw([black], [" "])
    left, upper, _, lower = sheet.box(0, 0)
    for column in range(2):
        header = (sheet.box(0, column)[0], 0, sheet.box(0, column)[2], upper - 18)
        assert ink(with_texts, header) > 10
        assert ink(without, header) == 0
    assert (pixels(with_texts.crop((left, upper - 18, left + 100, upper))).sum(-1) < 600).any()
    assert with_texts.height > without.height
    assert ink(with_texts, (left, lower + 1, with_texts.width, with_texts.height)) > 10


def test_long_titles_are_cut_and_long_notes_wrapped_inside_the_sheet():
    sheet = Sheet(["one"], (128, 128))
    words = "a very long caption\nof several lines " * 9
    picture = sheet.draw([[torch.zeros(3, 128, 128)]], [words], [words])
    margin = pixels(picture)[:, -13:]
    assert (margin == PAPER[0]).all()
    short = sheet.draw([[torch.zeros(3, 128, 128)]], ["a"], ["a"])
    assert picture.height > short.height + 100
    assert INK != PAPER


def test_tinting_colours_the_mask_and_nothing_else():
    images = torch.full((2, 3, 4, 4), 0.5)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    out = tinted(images, mask, color=(1.0, 0.0, 0.0), strength=0.5)
    assert torch.equal(out[..., 2:], images[..., 2:])
    assert torch.equal(out[1, :, 0, 0], torch.tensor([0.75, 0.25, 0.25]))


@pytest.mark.parametrize("seed", range(8))
def test_components_show_what_varies_most(seed):
    generator = torch.Generator().manual_seed(seed)
    strong, weak = torch.randn(2, 3, 8, 8, generator=generator)
    latents = torch.stack([0.1 * weak, 5 * strong, torch.zeros_like(weak), 0.01 * weak], dim=1)  # 3 4 8 8
    colours = three_components(latents)
    assert colours.shape == (3, 3, 8, 8)
    assert 0 <= colours.min() < colours.max() <= 1
    red = torch.corrcoef(torch.stack([colours[:, 0].flatten(), strong.flatten()]))[0, 1]
    assert red > 0.95  # the sign as well: pictures of two steps compare
    assert torch.equal(colours, three_components(latents))


def test_components_of_few_or_constant_channels():
    two = three_components(torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert (two[:, 2] == 0.5).all()
    assert two[:, 0].std() > 0
    assert three_components(torch.ones(1, 4, 4, 4)).isfinite().all()


def test_pictures_are_rgb():
    assert isinstance(to_image(image(4, 4)), Image.Image)
    assert to_image(image(4, 6)).size == (6, 4)


def test_a_long_name_leaves_room_for_its_figures():
    sheet, black = Sheet(["one", "two"], (128, 128)), [torch.zeros(3, 128, 128)] * 2
    name = "a/long/way/to/a/picture" * 20
    box = (0, 0, 300, 60)
    drawn = [sheet.draw([black], [title]).crop(box) for title in (f"{name} · 42%", f"{name} · 17%", name)]
    assert drawn[0].tobytes() != drawn[1].tobytes() != drawn[2].tobytes()
    assert sheet.draw([black], ["two\nlines · of\na caption"]).size == sheet.draw([black], ["one"]).size
    assert sheet.draw([black], [name * 10_000]).crop(box).tobytes() == drawn[2].tobytes()
    assert sheet.draw([black], [f"{name} · {name}"]).crop(box).tobytes() == drawn[2].tobytes()
