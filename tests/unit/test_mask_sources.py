"""The mask sources: what they read, what they say when it is missing, and that chance follows the sample alone."""

import pytest
import torch
from hydra import compose, initialize_config_module

from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.masks import AlphaMask, BatchMask, FeatheredMask, MaskSource, MixedMask, RandomMask, SegmentationMask
from latentdm.stages import Stage

SIZES = [(32, 56), (150, 67), (8, 8), (257, 400)]  # the last is painted from a coarse field
ALL = ("boxes", "strokes", "polygons", "blobs", "borders")
KINDS = [*((kind,) for kind in ALL), ("boxes", "strokes"), ALL]


def draws(ids, seed=0, epoch=0):
    return Draws(seed, epoch, list(ids))


def images(count, height=64, width=64, channels=3):
    return {"pixels": torch.zeros(count, channels, height, width, dtype=torch.uint8)}


def test_the_base_class_cannot_be_used():
    with pytest.raises(TypeError, match="abstract"):
        MaskSource()


def test_every_source_is_a_stage_that_writes_the_mask_alone():
    batch = mixed_batch(3) | {"segmentation": torch.zeros(3, 16, 24, dtype=torch.long)}
    own = {"batch": BatchMask(), "alpha": AlphaMask(), "random": RandomMask(), "labels": SegmentationMask([0])}
    for source in (*own.values(), MixedMask(own), FeatheredMask(RandomMask())):
        assert isinstance(source, Stage)
        assert source.writes == ("mask",)
        assert list(source(batch, draws(range(3)))) == ["mask"]
    assert set(MixedMask(own).reads) == {"pixels", "mask", "segmentation"}
    assert set(FeatheredMask(BatchMask()).reads) == {"pixels", "mask"}


def test_a_source_of_ones_own_gives_masks_and_names_what_it_reads():
    class Depth(MaskSource):
        reads = ("pixels", "depth")

        def setup(self, device):
            self.device = device

        def masks(self, batch, draws):
            return batch["depth"] > 0.5

    depth, source = torch.rand(2, 1, 64, 64), Depth()
    assert torch.equal(source({**images(2), "depth": depth}, draws(range(2)))["mask"], depth > 0.5)
    with pytest.raises(UserError, match=r"^Depth: the batch has no 'depth'; .*keys=\{depth: …\}"):
        source(images(2), draws(range(2)))
    FeatheredMask(MixedMask({"depth": source})).setup("meta")  # what holds a source sets it up
    assert source.device == "meta"


def test_batch_mask_is_the_batch_s_own():
    mask = torch.rand(2, 1, 5, 7)
    assert BatchMask()({**images(2), "mask": mask}, draws(range(2)))["mask"] is mask


def test_batch_mask_says_how_to_name_it():
    with pytest.raises(ValueError, match=r"^BatchMask: the batch has no 'mask'; .*keys=\{mask: …\}, or choose another"):
        BatchMask()(images(2), draws(range(2)))


def test_alpha_mask_is_transparency():
    levels = torch.tensor([0, 1, 100, 128, 254, 255], dtype=torch.uint8)
    pixels = torch.full((1, 4, 1, 6), 9, dtype=torch.uint8)
    pixels[0, 3, 0] = levels
    mask = AlphaMask()({"pixels": pixels}, draws([0]))["mask"]
    assert mask.shape == (1, 1, 1, 6)
    assert mask.dtype == torch.float32
    assert torch.equal(mask.flatten(), 1 - levels.float() / 255)
    assert torch.equal(AlphaMask(invert=True)({"pixels": pixels}, draws([0]))["mask"].flatten(), levels.float() / 255)


def test_alpha_mask_takes_floats():
    pixels = torch.rand(2, 4, 3, 5)
    assert torch.equal(AlphaMask()({"pixels": pixels}, draws(range(2)))["mask"], 1 - pixels[:, 3:])


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_mask_needs_alpha(channels):
    with pytest.raises(
        ValueError, match=rf"^AlphaMask: expected pixels of shape b 4 H W, got \(2, {channels}, 64, 64\) uint8; "
    ):
        AlphaMask()(images(2, channels=channels), draws(range(2)))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_masks_cover_the_share_and_are_never_empty_nor_full(kinds, height, width):
    mask = RandomMask(kinds, share=(0.2, 0.4))(images(80, height, width), draws(range(80)))["mask"]
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
    mask = RandomMask(kinds, share=share)(images(40, height, width), draws(range(40)))["mask"].flatten(1)
    assert mask.any(dim=1).all()
    assert not mask.all(dim=1).any()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_random_mask_depends_on_its_own_draws_alone(kinds, height, width):
    source = RandomMask(kinds)
    together = source(images(7, height, width), draws(range(7)))["mask"]
    for index in range(7):
        assert torch.equal(source(images(1, height, width), draws([index]))["mask"], together[index : index + 1])
    turned = source(images(3, height, width, channels=4), draws([6, 2, 4]))["mask"]
    assert torch.equal(turned, together[[6, 2, 4]])


def test_masks_of_samples_epochs_and_seeds_differ():
    source, batch = RandomMask(), images(8)
    first = source(batch, draws(range(8)))["mask"]
    assert len(first.flatten(1).unique(dim=0)) == 8
    assert (first != source(batch, draws(range(8), epoch=1))["mask"]).flatten(1).any(dim=1).all()
    assert (first != source(batch, draws(range(8), seed=1))["mask"]).flatten(1).any(dim=1).all()
    assert torch.equal(first, source(batch, draws(range(8)))["mask"])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    RandomMask()(images(2), draws(range(2)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_single_box_is_a_rectangle_and_strokes_are_not():
    def is_rectangle(mask):
        return torch.equal(mask, mask.any(1, keepdim=True) & mask.any(0, keepdim=True))

    boxes = RandomMask(["boxes"], boxes=[1, 1])(images(30), draws(range(30)))["mask"]
    strokes = RandomMask(["strokes"])(images(30), draws(range(30)))["mask"]
    assert all(is_rectangle(mask[0]) for mask in boxes)
    assert not any(is_rectangle(mask[0]) for mask in strokes)
    both = [is_rectangle(mask[0]) for mask in RandomMask(boxes=[1, 1])(images(60), draws(range(60)))["mask"]]
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
    masks = source(images(25, height, width), ids)["mask"][:, 0]
    for mask, placed in zip(masks, shapes, strict=True):
        distance = reference_distance(kind, placed, height, width)
        assert distance[mask].max() < distance[~mask].min() + 1e-3
    reached = masks.any(0)
    assert reached.any(0).all()  # every column and every row is within reach
    assert reached.any(1).all()


def test_the_number_of_boxes_stays_in_its_range():
    def corners(settings):  # the outline of rectangles has 4 corners each; overlaps change that, so count islands
        masks = RandomMask(["boxes"], share=(0.02, 0.02), **settings)(images(40, 96, 96), draws(range(40)))["mask"]
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
        ({"kinds": []}, rf"kinds must be a list of some of {', '.join(ALL)}, each once, got \[\]"),
        ({"kinds": ["circles"]}, rf"kinds must be a list of some of {', '.join(ALL)}, each once, got \['circles'\]"),
        ({"kinds": "boxes"}, f"kinds must be a list of some of {', '.join(ALL)}, each once, got 'boxes'"),
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
        ({"polygons": [0, 1]}, r"polygons must be two integers in 1…32, in order, got \[0, 1\]"),
        ({"sides": [1, 5]}, r"sides must be two integers in 1…4, in order, got \[1, 5\]"),
        ({"complement": 1.5}, "complement must be a probability in 0…1, got 1.5"),
        ({"whole": True}, "whole must be a probability in 0…1, got True"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^RandomMask: {message}"):
        RandomMask(**settings)


def test_the_varied_masks_are_of_every_kind():
    with initialize_config_module("latentdm.conf", version_base="1.3"):
        assert set(compose("train", overrides=["masks=varied"]).masks.kinds) == set(ALL)


def test_a_coarse_field_paints_what_a_fine_one_paints(monkeypatch):
    for kind in ("strokes", "polygons", "blobs"):
        coarse = RandomMask([kind])(images(12, 384, 512), draws(range(12)))["mask"]
        with monkeypatch.context() as patch:
            patch.setattr("latentdm.masks.shapes.FIELD_SIDE", 384)
            fine = RandomMask([kind])(images(12, 384, 512), draws(range(12)))["mask"]
        assert (coarse != fine).float().mean() < 0.01, kind


def test_polygons_have_straight_edges_and_as_many_corners_as_asked_for():
    masks = RandomMask(["polygons"], polygons=[1, 1], share=(0.05, 0.1))(images(30, 96, 96), draws(range(30)))["mask"]
    assert all(count_islands(mask[0]) == 1 for mask in masks)
    two = RandomMask(["polygons"], polygons=[2, 2], share=(0.02, 0.02))(images(30, 96, 96), draws(range(30)))["mask"]
    assert sum(count_islands(mask[0]) == 2 for mask in two) > 15


def test_borders_leave_a_rectangle_at_as_many_sides_as_asked_for():
    def sides(mask):
        kept = ~mask
        assert torch.equal(kept, kept.any(1, keepdim=True) & kept.any(0, keepdim=True))
        return sum(bool(side.all()) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))

    masks = RandomMask(["borders"], share=(0.2, 0.4))(images(60, 64, 96), draws(range(60)))["mask"]
    assert {sides(mask[0]) for mask in masks} == {1, 2, 3, 4}
    masks = RandomMask(["borders"], share=(0.2, 0.4), sides=[2, 2])(images(30, 64, 96), draws(range(30)))["mask"]
    assert {sides(mask[0]) for mask in masks} == {2}


def test_the_complement_turns_shapes_over_and_keeps_the_share():
    plain = RandomMask(["boxes"], share=(0.3, 0.3), boxes=[1, 1])(images(20), draws(range(20)))["mask"]
    turned = RandomMask(["boxes"], share=(0.7, 0.7), boxes=[1, 1], complement=1.0)(images(20), draws(range(20)))["mask"]
    assert torch.equal(plain, ~turned)
    half = RandomMask(["boxes"], share=(0.5, 0.5))(images(60), draws(range(60)))["mask"]
    some = RandomMask(["boxes"], share=(0.5, 0.5), complement=0.5)(images(60), draws(range(60)))["mask"]
    assert 15 < (some == ~half).flatten(1).all(dim=1).sum() < 45
    assert ((some == half) | (some == ~half)).all()


def test_a_set_share_of_the_images_is_masked_as_a_whole():
    masks = RandomMask(ALL, whole=0.25)(images(200, 16, 16), draws(range(200)))["mask"]
    whole = masks.flatten(1).all(dim=1)
    assert 30 < whole.sum() < 70
    assert torch.equal(masks[~whole], RandomMask(ALL)(images(200, 16, 16), draws(range(200)))["mask"][~whole])


def test_segmentation_takes_the_chosen_classes():
    labels = torch.randint(0, 5, (3, 6, 7), generator=torch.Generator().manual_seed(0))
    batch = {**images(3, 6, 7), "segmentation": labels}
    mask = SegmentationMask([1, 4])(batch, draws(range(3)))["mask"]
    assert mask.shape == (3, 1, 6, 7)
    assert torch.equal(mask[:, 0], torch.isin(labels, torch.tensor([1, 4])))
    batch["segmentation"] = labels[:, None].to(torch.uint8)
    assert torch.equal(SegmentationMask([1, 4], invert=True)(batch, draws(range(3)))["mask"], ~mask)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"the batch has no 'segmentation'; .*keys=\{segmentation: …\}"),
        (
            torch.zeros(2, 8, 8),
            r"expected integer labels of shape b H W or b 1 H W for 2 images, got \(2, 8, 8\) float32",
        ),
        (torch.zeros(2, 3, 8, 8, dtype=torch.long), r"expected integer labels .* got \(2, 3, 8, 8\) int64"),
        (torch.zeros(3, 8, 8, dtype=torch.long), r"for 2 images, got \(3, 8, 8\) int64"),
    ],
)
def test_segmentation_says_what_is_wrong(labels, message):
    batch = images(2, 8, 8) if labels is None else {**images(2, 8, 8), "segmentation": labels}
    with pytest.raises(ValueError, match=f"^SegmentationMask: .*{message}"):
        SegmentationMask([1])(batch, draws(range(2)))
    with pytest.raises(ValueError, match=f"^MixedMask: sources.labels: SegmentationMask: .*{message}"):
        # Even where no sample draws it: a run must not fail at its thousandth step.
        MixedMask({"labels": SegmentationMask([1]), "random": RandomMask()}, {"labels": 0, "random": 1})(
            batch, draws(range(2))
        )


@pytest.mark.parametrize("classes", [[], 3, "3", [1.5], [True]])
def test_segmentation_wants_classes(classes):
    with pytest.raises(ValueError, match=r"^SegmentationMask: classes must be a list of the integer labels"):
        SegmentationMask(classes)


def mixture(**probabilities):
    sources = {"own": BatchMask(), "random": RandomMask(), "alpha": AlphaMask()}
    return MixedMask(sources, probabilities or None)


def mixed_batch(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 4, 16, 24), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "mask": torch.rand(count, 1, 8, 12, generator=generator)}


def test_each_sample_of_a_mixture_has_the_mask_of_one_source():
    batch, ids = mixed_batch(200), draws(range(200))
    mixed = mixture(own=2, random=1, alpha=1)(batch, ids)["mask"]
    assert mixed.dtype == torch.float32
    own = torch.nn.functional.interpolate(batch["mask"], size=(16, 24), mode="bilinear")
    counts = []
    for made in (own, RandomMask()(batch, ids)["mask"].float(), AlphaMask()(batch, ids)["mask"]):
        counts.append(int((mixed == made).flatten(1).all(dim=1).sum()))
    assert sum(counts) == 200
    assert 80 < counts[0] < 120
    assert 30 < counts[1] < 70


def test_a_mixture_depends_on_its_own_draws_alone():
    batch = mixed_batch(9)
    together = mixture()(batch, draws(range(9)))["mask"]
    for index in range(9):
        alone = {name: value[index : index + 1] for name, value in batch.items()}
        assert torch.equal(mixture()(alone, draws([index]))["mask"], together[index : index + 1])


def test_one_mask_for_all_serves_a_mixture():
    batch = mixed_batch(6) | {"mask": torch.ones(1, 16, 24)}
    assert mixture(own=1, random=0, alpha=0)(batch, draws(range(6)))["mask"].eq(1).all()


@pytest.mark.parametrize(
    ("sources", "probabilities", "message"),
    [
        ({}, None, "the sources are none"),
        ({"own": BatchMask()}, {"mine": 1}, "probabilities must name each source once; the sources are own, .* mine"),
        ({"own": BatchMask()}, {"own": 0}, "must be at least 0 and not all 0, got {'own': 0}"),
        (
            {"own": BatchMask(), "random": RandomMask()},
            {"own": 2, "random": -1},
            "probabilities.random must be a number of at",
        ),
        ({"own": "batch"}, None, "sources.own must be a mask source, got str"),
    ],
)
def test_wrong_mixtures(sources, probabilities, message):
    with pytest.raises(ValueError, match=f"^MixedMask: .*{message}"):
        MixedMask(sources, probabilities)


def test_feathering_softens_edges_and_leaves_them_in_place():
    hard = torch.zeros(1, 1, 32, 40)
    hard[..., 20:] = 1
    batch = {**images(1, 32, 40), "mask": hard}
    soft = FeatheredMask(BatchMask(), pixels=6)(batch, draws([0]))["mask"]
    assert torch.equal(soft.round(), hard)
    row = soft[0, 0, 0]
    assert torch.equal(soft[0, 0], row.expand(32, -1))  # nothing happens at the image's border
    assert (row.diff() >= 0).all()
    assert torch.equal((row > 0) & (row < 1), (torch.arange(40) >= 14) & (torch.arange(40) < 26))
    for pixels in (0, 129, 2.5):
        with pytest.raises(ValueError, match=r"^FeatheredMask: pixels must be an integer in 1…128"):
            FeatheredMask(BatchMask(), pixels)
    with pytest.raises(ValueError, match=r"^FeatheredMask: source must be a mask source, got str"):
        FeatheredMask("batch")
    with pytest.raises(ValueError, match=r"^MixedMask: sources.soft: BatchMask"):
        MixedMask({"soft": FeatheredMask(BatchMask())})(images(1), draws([0]))


def test_no_source_waits_for_the_device():
    # The meta device has no values: whatever looked at one would fail, as it would make an accelerator wait.
    batch = {
        "pixels": torch.zeros(20, 4, 256, 256, dtype=torch.uint8, device="meta"),
        "mask": torch.zeros(20, 1, 256, 256, dtype=torch.uint8, device="meta"),
        "segmentation": torch.zeros(20, 256, 256, dtype=torch.uint8, device="meta"),
    }
    random = RandomMask(ALL, complement=0.5, whole=0.2)
    sources = {"own": BatchMask(), "alpha": AlphaMask(), "labels": SegmentationMask([1, 2]), "random": random}
    mask = FeatheredMask(MixedMask(sources))(batch, draws(range(20)))["mask"]
    assert mask.device.type == "meta"
    assert mask.shape == (20, 1, 256, 256)


def test_a_mask_of_another_source_that_does_not_fit_is_named_with_its_source():
    class Flat(MaskSource):
        def masks(self, batch, draws):
            return torch.zeros(1)

    for source in (FeatheredMask(Flat()), MixedMask({"flat": Flat()})):
        with pytest.raises(UserError, match=r"^Flat: mask: expected a tensor of shape b 1 H W"):
            source(images(2), draws(range(2)))
