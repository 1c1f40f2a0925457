"""Mask growth against a reference that looks at every window, for every setting and odd shapes."""

import numpy as np
import pytest
import torch
from helpers import complains

from latentdm.masks import grow_mask, offset_mask

SHAPES = [(1, 1), (1, 17), (13, 1), (8, 8), (11, 18)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def random_mask(shape, seed, density):
    """``2 1 h w`` float64: sparse values in 0…1, exact halves among them."""
    random = np.random.default_rng(seed)
    values = random.random((2, 1, *shape)) * 0.5 + 0.5 * (random.random((2, 1, *shape)) < density)
    values[random.random(values.shape) < 0.1] = 0.5
    return torch.from_numpy(values)


def windows(binary, back, forward):
    """Each pixel's window, cut at the image's border."""
    *_, height, width = binary.shape
    for y, x in np.ndindex(height, width):
        rows, columns = slice(max(y - back, 0), y + forward + 1), slice(max(x - back, 0), x + forward + 1)
        yield (..., y, x), binary[..., rows, columns]


def reference(mask, back, forward, judge):
    binary = np.where(mask.numpy() > 0.5, 1.0, 0.0)  # exactly 0.5 rounds to 0
    moved = np.empty_like(binary)
    for place, window in windows(binary, back, forward):
        moved[place] = judge(window, axis=(-2, -1))
    return moved


def reference_grow(mask, k):
    # Padded by ceil((k - 1) / 2) on both sides and cut at the end: an even window reaches further back than forward.
    back = int(np.ceil((k - 1) / 2)) if k else 0
    return reference(mask, back, max(k - 1, 0) - back, np.max)


def reference_offset(mask, d):
    # Shrinking takes the smallest value of the window inside the image: outside counts as masked.
    return reference(mask, abs(d), abs(d), np.max if d > 0 else np.min)


@shapes
def test_grow_mask_equals_the_window_reference_for_every_k(shape):
    for k in range(65):
        mask = random_mask(shape, seed=k, density=0.02 + 0.3 / (k + 1))
        np.testing.assert_array_equal(grow_mask(mask, k).numpy(), reference_grow(mask, k), err_msg=f"k={k}")


@shapes
def test_offset_mask_equals_the_window_reference_for_every_offset(shape):
    for d in range(-128, 129):
        step = 0.05 + 0.3 / (abs(d) + 1)
        mask = random_mask(shape, seed=d + 128, density=1 - step if d < 0 else step)
        np.testing.assert_array_equal(offset_mask(mask, d).numpy(), reference_offset(mask, d), err_msg=f"d={d}")


def test_an_even_window_reaches_further_up_and_left():
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 3, 3] = 1
    grown = grow_mask(mask, 4)[0, 0]
    # A pixel is masked if (3, 3) lies at most 2 forward... of its window's back: rows 2..5.
    assert grown.nonzero().unique().tolist() == [2, 3, 4, 5]


def test_shrinking_leaves_a_mask_at_the_border_of_the_image():
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :, :3] = 1
    assert torch.equal(offset_mask(mask, -1)[0, 0, 0], torch.tensor([1.0, 1, 0, 0, 0, 0]))


@pytest.mark.parametrize("move", [lambda m: grow_mask(m, 5), lambda m: offset_mask(m, -2)], ids=["grow", "offset"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_mask_of_any_dtype_moves_alike(move, dtype):
    binary = random_mask((9, 12), seed=1, density=0.4).round()
    moved = move(binary.to(dtype))
    assert moved.dtype == (torch.float32 if dtype == torch.bool else dtype)
    assert torch.equal(moved.double(), move(binary))


def test_large_windows_leave_few_masks_apart():
    """A long thin image: far from any pixel of the mask nothing is masked, however the sums run."""
    mask = torch.zeros(1, 1, 2, 3000)
    mask[..., 1000] = 1
    assert grow_mask(mask, 64).sum() == 2 * 64
    assert offset_mask(mask, 128).sum() == 2 * 257


@pytest.mark.parametrize("value", [65, -3, 1.5, True, None, "6"], ids=repr)
def test_grow_mask_names_a_wrong_size(value):
    with complains("grow_mask: grow_mask_by must be an integer in 0…64", f"got {value!r}", "mask_offset"):
        grow_mask(torch.zeros(1, 1, 4, 4), value)


@pytest.mark.parametrize("value", [129, -129, 0.5, False], ids=repr)
def test_offset_mask_names_a_wrong_size(value):
    with complains("offset_mask: mask_offset must be an integer in −128…128", f"got {value!r}", "positive grows"):
        offset_mask(torch.zeros(1, 1, 4, 4), value)
