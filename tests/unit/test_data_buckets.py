"""Buckets: each image in the nearest one, each batch of one, and all ranks in step, whatever Lightning is told."""

from collections import Counter

import numpy as np
import pytest
from bucket_ranks import BATCH, COUNT, PLAN, Sizes

from latentdm.data import Buckets
from latentdm.data.order import GlobalOrder, InOrder


def test_the_sizes_of_the_published_trainers():
    shapes = Buckets().shapes
    assert len(shapes) == 33
    assert {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (640, 1536), (512, 2048)} <= set(shapes)
    assert all(width % 64 == height % 64 == 0 and width * height <= 1024 * 1024 for width, height in shapes)
    assert min(min(shape) for shape in shapes) == 512
    assert max(max(shape) for shape in shapes) == 2048


def test_limits_and_step():
    shapes = Buckets(area=512 * 512, step=32, min_side=384, max_side=640).shapes
    assert {side for shape in shapes for side in shape} <= set(range(384, 641, 32))
    assert (480, 544) in shapes


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect_ratio():
    buckets = Buckets(area=256 * 256, step=64)
    sizes = np.random.default_rng(0).integers(50, 900, (500, 2))
    plan = buckets.plan(sizes)
    aspects = np.log([width / height for width, height in plan.shapes])
    away = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - aspects)
    assert np.allclose(away[np.arange(500), plan.bucket_of], away.min(axis=1))
    for size, bucket in zip(sizes.tolist(), plan.bucket_of, strict=True):
        assert plan.shape(*size) == plan.shapes[bucket]
    assert plan.counts.sum() == 500


def test_small_buckets_are_kept_or_merged_and_the_table_tells():
    sizes = [(100, 100)] * 9 + [(100, 160)] * 2 + [(100, 290)] * 5 + [(300, 100)]
    kept = Buckets(area=256 * 256, step=64).plan(sizes)
    assert kept.counts[kept.counts > 0].tolist() == [5, 2, 9, 1]
    assert kept.table().splitlines()[0] == "17 images in 4 buckets"
    merged = Buckets(area=256 * 256, step=64, min_images=3).plan(sizes)
    assert merged.shape(300, 100) == merged.shape(100, 160) == (256, 256)
    assert [" ".join(line.split()) for line in merged.table().splitlines()] == [
        "17 images in 2 buckets",
        "width × height images",
        "128 × 384 5",
        "256 × 256 12",
        "384 × 128 1 too few: merged into the nearest bucket",
        "192 × 320 2 too few: merged into the nearest bucket",
    ]
    one = Buckets(area=256 * 256, step=64, min_images=100).plan(sizes)
    assert one.counts[one.counts > 0].tolist() == [17]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"area": 0}, "area must be an integer of at least 1, got 0"),
        ({"step": 1.5}, "step must be an integer of at least 1, got 1.5"),
        ({"min_images": 0}, "min_images must be an integer of at least 1"),
        ({"min_side": 0}, "min_side must be an integer of at least 1"),
        ({"area": 4096, "min_side": 128}, "no multiple of step=64 lies in min_side=128…max_side=128 with an area of"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^Buckets: {message}"):
        Buckets(**settings)


@pytest.mark.parametrize("sizes", [[], [[3, 0]], [4, 5], [[1, 2, 3]]])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match=r"^Buckets: expected a width and a height above 0 for each image"):
        Buckets().plan(sizes)


def planned(ranks, epoch=0, training=True, **settings):
    """What each rank is to see: rank → batches of positions."""
    kind = GlobalOrder if training else InOrder
    samplers = [kind(Sizes(), BATCH, num_replicas=ranks, rank=rank, seed=3, **settings) for rank in range(ranks)]
    return samplers[0], [
        [[position for position, _ in batch] for batch in sampler.batches(epoch)] for sampler in samplers
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_all_ranks_are_in_step_and_every_image_comes_once(ranks, training):
    sampler, batches = planned(ranks, training=training)
    assert {len(of_rank) for of_rank in batches} == {len(sampler)}
    seen = Counter()
    for step in zip(*batches, strict=True):
        assert len({len(batch) for batch in step}) == 1
        assert len({PLAN.bucket_of[position] for batch in step for position in batch}) == 1
        assert len(step[0]) <= BATCH
        seen.update(position for batch in step for position in batch)
    assert set(seen) == set(range(COUNT))
    assert seen.total() - COUNT < ranks * (PLAN.counts > 0).sum()
    assert max(seen.values()) <= (1 if ranks == 1 else ranks)


def test_another_epoch_has_another_order_and_validation_keeps_its_own():
    first, second = planned(2)[1], planned(2, epoch=1)[1]
    assert first != second
    assert first == planned(2)[1]
    assert sorted(map(len, first[0])) == sorted(map(len, second[0]))
    buckets = [[PLAN.bucket_of[batch[0]] for batch in run[0]] for run in (first, second)]
    assert buckets[0] != sorted(buckets[0])
    assert buckets[0] != buckets[1]
    assert planned(2, training=False)[1] == planned(2, epoch=1, training=False)[1]


def test_drop_last_leaves_whole_steps_and_counts_the_rest():
    sampler, batches = planned(2, drop_last=True)
    assert {len(batch) for of_rank in batches for batch in of_rank} == {BATCH}
    assert sum(map(len, batches[0])) * 2 == sum(count // (2 * BATCH) * 2 * BATCH for count in PLAN.counts) < COUNT
    assert len(sampler) == len(batches[0])
    assert len(planned(53, drop_last=True)[1][0]) > 0  # nothing would be left: all are kept
