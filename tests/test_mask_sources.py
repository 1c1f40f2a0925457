"""The mask sources: what they read, what they say when it is missing, and that chance follows the sample alone."""

import pytest
import torch

from latentdm.masks.sources import AlphaMask, BatchMask, MaskSource, RandomMask
from latentdm.randomness import Draws

SIZES = [(32, 56), (150, 67), (8, 8)]
KINDS = [("boxes",), ("strokes",), ("boxes", "strokes")]


def draws(ids, seed=0, epoch=0):
    return Draws(seed, epoch, list(ids))


def images(count, height=64, width=64, channels=3):
    return {"pixels": torch.zeros(count, channels, height, width, dtype=torch.uint8)}


def test_the_base_class_cannot_be_used():
    with pytest.raises(TypeError, match="abstract"):
        MaskSource()


def test_batch_mask_is_the_batch_s_own():
    mask = torch.rand(2, 1, 5, 7)
    assert BatchMask()({**images(2), "mask": mask}, draws(range(2))) is mask


def test_batch_mask_says_how_to_name_it():
    with pytest.raises(ValueError, match=r"^BatchMask: the batch has no 'mask'; .*keys=\{mask: …\}, or choose another"):
        BatchMask()(images(2), draws(range(2)))


def test_alpha_mask_is_transparency():
    levels = torch.tensor([0, 1, 100, 128, 254, 255], dtype=torch.uint8)
    pixels = torch.full((1, 4, 1, 6), 9, dtype=torch.uint8)
    pixels[0, 3, 0] = levels
    mask = AlphaMask()({"pixels": pixels}, draws([0]))
    assert mask.shape == (1, 1, 1, 6)
    assert mask.dtype == torch.float32
    assert torch.equal(mask.flatten(), 1 - levels.float() / 255)
    assert torch.equal(AlphaMask(invert=True)({"pixels": pixels}, draws([0])).flatten(), levels.float() / 255)


def test_alpha_mask_takes_floats():
    pixels = torch.rand(2, 4, 3, 5)
    assert torch.equal(AlphaMask()({"pixels": pixels}, draws(range(2))), 1 - pixels[:, 3:])


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_mask_needs_alpha(channels):
    with pytest.raises(
        ValueError, match=rf"^AlphaMask: expected pixels of shape b 4 H W, got \(2, {channels}, 64, 64\) uint8; "
    ):
        AlphaMask()(images(2, channels=channels), draws(range(2)))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_masks_cover_the_share_and_are_never_empty_nor_full(kinds, height, width):
    mask = RandomMask(kinds, share=(0.2, 0.4))(images(80, height, width), draws(range(80)))
    assert mask.shape == (80, 1, height, width)
    assert mask.dtype == torch.bool
    shares = mask.float().mean(dim=(1, 2, 3))
    slack = 0.15 if height == 8 else 0.03  # a coarse grid and, at 8×8, whole rows at once
    assert shares.min() > 0.2 - slack
    assert shares.max() < 0.4 + slack
    assert shares.min() < 0.24  # spread over the range, not at one end of it
    assert shares.max() > 0.36


@pytest.mark.parametrize("share", [(1e-6, 1e-6), (0.999999, 0.999999)])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (3, 2)])
def test_extreme_shares_are_neither_empty_nor_full(share, kinds, height, width):
    mask = RandomMask(kinds, share=share)(images(40, height, width), draws(range(40))).flatten(1)
    assert mask.any(dim=1).all()
    assert not mask.all(dim=1).any()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_random_mask_depends_on_its_own_draws_alone(kinds, height, width):
    source = RandomMask(kinds)
    together = source(images(7, height, width), draws(range(7)))
    for index in range(7):
        assert torch.equal(source(images(1, height, width), draws([index])), together[index : index + 1])
    turned = source(images(3, height, width, channels=4), draws([6, 2, 4]))
    assert torch.equal(turned, together[[6, 2, 4]])


def test_masks_of_samples_epochs_and_seeds_differ():
    source, batch = RandomMask(), images(8)
    first = source(batch, draws(range(8)))
    assert len(first.flatten(1).unique(dim=0)) == 8
    assert (first != source(batch, draws(range(8), epoch=1))).flatten(1).any(dim=1).all()
    assert (first != source(batch, draws(range(8), seed=1))).flatten(1).any(dim=1).all()
    assert torch.equal(first, source(batch, draws(range(8))))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    RandomMask()(images(2), draws(range(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_single_box_is_a_rectangle_and_strokes_are_not():
    def is_rectangle(mask):
        return torch.equal(mask, mask.any(1, keepdim=True) & mask.any(0, keepdim=True))

    boxes = RandomMask(["boxes"], boxes=[1, 1])(images(30), draws(range(30)))
    strokes = RandomMask(["strokes"])(images(30), draws(range(30)))
    assert all(is_rectangle(mask[0]) for mask in boxes)
    assert not any(is_rectangle(mask[0]) for mask in strokes)
    both = [is_rectangle(mask[0]) for mask in RandomMask(boxes=[1, 1])(images(60), draws(range(60)))]
    assert 15 < sum(both) < 45  # each kind about half of the time


def reference_distance(kind, shapes, height, width):
    """``H W`` float64 by plain geometry: to the nearest box, in its own sizes, or stroke, in its own width."""
    short = min(height, width)
    y, x = torch.meshgrid(*(((torch.arange(side).double() + 0.5) / short) for side in (height, width)), indexing="ij")
    distances = []
    for shape in shapes.double():
        if kind == "boxes":
            centre_x, centre_y, per_x, per_y = shape
            distances.append(torch.maximum((x - centre_x).abs() * per_x, (y - centre_y).abs() * per_y))
        else:
            start, step, per_width = shape[:2], shape[2:4], shape[5]
            # The nearest of many points on the segment, both ends included.
            points = start + torch.linspace(0, 1, 400).double()[:, None] * step
            away = torch.cdist(torch.stack([x, y], dim=-1).view(-1, 2), points).amin(dim=1).view(height, width)
            distances.append(away**2 * per_width)
    return torch.stack(distances).amin(dim=0)


@pytest.mark.parametrize("kind", ["boxes", "strokes"])
@pytest.mark.parametrize(("height", "width"), [(32, 70), (60, 24)])
def test_a_mask_is_what_lies_nearest_to_its_shapes_whatever_the_aspect(kind, height, width):
    source, ids = RandomMask([kind]), draws(range(25))
    short = min(height, width)
    shapes = source.shapes[0].draw(ids, torch.tensor([width / short, height / short]))
    masks = source(images(25, height, width), ids)[:, 0]
    for mask, placed in zip(masks, shapes, strict=True):
        distance = reference_distance(kind, placed, height, width)
        assert distance[mask].max() < distance[~mask].min() + 1e-3
    reached = masks.any(0)
    assert reached.any(0).all()  # every column and every row is within reach
    assert reached.any(1).all()


def test_the_number_of_boxes_stays_in_its_range():
    def corners(settings):  # the outline of rectangles has 4 corners each; overlaps change that, so count islands
        masks = RandomMask(["boxes"], share=(0.02, 0.02), **settings)(images(40, 96, 96), draws(range(40)))
        return [count_islands(mask[0]) for mask in masks]

    assert set(corners({"boxes": [1, 1]})) == {1}
    several = corners({"boxes": [3, 3]})
    assert max(several) == 3
    assert sum(number == 3 for number in several) > 25
    assert {1, 2, 3, 4} == set(corners({}))


def count_islands(mask):
    left, islands = mask.clone(), 0
    while left.any():
        island = torch.zeros_like(left)
        island[tuple(left.nonzero()[0])] = True
        size = 0
        while island.sum() != size:
            size = island.sum()
            island = torch.nn.functional.max_pool2d(island[None].float(), 3, 1, 1)[0].bool() & left
        left &= ~island
        islands += 1
    return islands


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": []}, r"kinds must be a list of some of boxes, strokes, each once, got \[\]"),
        ({"kinds": ["circles"]}, r"kinds must be a list of some of boxes, strokes, each once, got \['circles'\]"),
        ({"kinds": "boxes"}, "kinds must be a list of some of boxes, strokes, each once, got boxes"),
        ({"kinds": ["boxes", "boxes"]}, "kinds must be a list"),
        ({"share": [0.0, 0.5]}, r"share must be two numbers above 0 and below 1, in order, got \[0.0, 0.5\]; "),
        ({"share": (0.5, 0.1)}, r"share must be two numbers above 0 and below 1, in order, got \[0.5, 0.1\]; "),
        ({"share": [0.1, 1.0]}, "share must be two numbers above 0 and below 1"),
        ({"share": 0.3}, r"share must be two numbers above 0 and below 1, in order, got 0.3; .*\[0.1, 0.5\]"),
        ({"boxes": [0, 4]}, r"boxes must be two integers in 1…32, in order, got \[0, 4\]; for always three: \[3, 3\]"),
        ({"boxes": 4}, "boxes must be two integers in 1…32, in order, got 4"),
        ({"segments": (5, 2)}, r"segments must be two integers in 1…32, in order, got \[5, 2\]"),
        ({"segments": [1, 33]}, r"segments must be two integers in 1…32, in order, got \[1, 33\]"),
        ({"segments": [1, 2.5]}, "segments must be two integers"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^RandomMask: {message}"):
        RandomMask(**settings)
