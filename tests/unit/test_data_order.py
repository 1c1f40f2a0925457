"""The one order: computed and not stored, the same global batches for any ranks, and what is left of an epoch."""

import pickle
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from latentdm.data.layout import BLOCK, Bucketed, Dealt
from latentdm.data.order import GlobalOrder, InOrder
from latentdm.data.permutation import Permutation

BUCKETS = np.random.default_rng(0).choice(5, 203, p=[0.5, 0.3, 0.15, 0.04, 0.01]).astype(np.uint8)


class Samples:
    """Anything with a length, and perhaps buckets or parts."""

    def __init__(self, count, bucket_of=None, parts=None):
        self.count, self.bucket_of, self.parts = count, bucket_of, parts

    def __len__(self):
        return self.count


SQUARES, BUCKETED, STREAM = Samples(203), Samples(203, BUCKETS), Samples(203, parts=8)
every_source = pytest.mark.parametrize("source", [SQUARES, BUCKETED, STREAM], ids=["squares", "buckets", "stream"])


# -------------------------------------------------------------------- the permutation


@pytest.mark.parametrize("count", [*range(1, 40), 1000, 65537])
def test_a_permutation_holds_each_number_once_and_any_part_of_it_alone(count):
    permutation = Permutation(count, 3, 1, "order")
    whole = permutation(np.arange(count))
    assert sorted(whole.tolist()) == list(range(count))
    for part in (np.array([count - 1]), np.arange(count // 3, count // 2), np.arange(0, count, 7)):
        assert permutation(part).tolist() == whole[part].tolist()


def test_permutations_differ_by_seed_epoch_and_purpose():
    keys = [(0, 0, "order"), (1, 0, "order"), (0, 1, "order"), (0, 0, "buckets"), (0, 10, "order")]
    orders = [tuple(Permutation(50, *key)(np.arange(50)).tolist()) for key in keys]
    assert len(set(orders)) == len(keys)
    assert orders[0] == tuple(Permutation(50, *keys[0])(np.arange(50)).tolist())


@pytest.mark.parametrize("count", [3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_frequent(count):
    epochs = 4000
    seen = Counter(tuple(Permutation(count, 0, epoch, "order")(np.arange(count)).tolist()) for epoch in range(epochs))
    orders = list(permutations(range(count)))
    expected = epochs / len(orders)
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_do_not_stay_together_and_each_place_sees_each_number():
    orders = np.stack([Permutation(1000, 0, epoch, "order")(np.arange(1000)) for epoch in range(200)])
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(orders.mean(axis=0) / 499.5 - 1).max() < 0.2
    same = (orders == np.arange(1000)).sum(axis=1)
    assert abs(same.mean() - 1) < 0.3  # fixed points of a random permutation: one on average


# -------------------------------------------------------------------- ranks


def steps(source, ranks, batch_size, kind=GlobalOrder, epoch=0, taken=(), **settings):
    """The global batches: those of all ranks in turns."""
    orders = [
        kind(source, batch_size, num_replicas=ranks, rank=rank, seed=3, **{"drop_last": True, **settings})
        for rank in range(ranks)
    ]
    of_ranks = [list(order.batches(epoch, taken)) for order in orders]
    assert {len(batches) for batches in of_ranks} == {len(of_ranks[0])}
    merged = []
    for step in zip(*of_ranks, strict=True):
        assert len({len(batch) for batch in step}) == 1
        merged.append([key for row in zip(*step, strict=True) for key in row])
    return merged


@every_source
@pytest.mark.parametrize("kind", [GlobalOrder, InOrder])
def test_the_same_global_batches_for_any_number_of_ranks(source, kind):
    for epoch in range(2):
        alone = steps(source, 1, 8, kind, epoch)
        assert alone == steps(source, 2, 4, kind, epoch) == steps(source, 4, 2, kind, epoch)
        assert alone == steps(source, 8, 1, kind, epoch)
    seen = [position for step in alone for position, _ in step]
    assert len(set(seen)) == len(seen)
    assert {len(step) for step in alone} == {8}


@every_source
def test_what_does_not_divide_by_the_ranks_is_repeated_in_its_own_step_and_nothing_is_left_out(source):
    for kind in (GlobalOrder, InOrder):
        alone, shared = (steps(source, ranks, 12 // ranks, kind, drop_last=False) for ranks in (1, 4))
        assert [set(step) for step in alone] == [set(step) for step in shared]
        assert sum(map(len, alone)) == 203


@every_source
def test_epochs_differ_and_the_dataset_s_own_order_stays(source):
    first, second = (steps(source, 1, 8, epoch=epoch, training=False) for epoch in (0, 1))
    assert (first == second) == (source is STREAM)  # which shuffles by itself
    order = InOrder(source, 8, training=False)
    order.set_epoch(1)
    assert list(order) == list(order.batches(0))
    if source is SQUARES:
        assert [position for step in order for position in step] == list(range(203))


@every_source
def test_any_step_is_reached_at_once(source):
    order = GlobalOrder(source, 8, drop_last=True)
    whole = list(order.batches(5))
    assert len(whole) == len(order)
    for start in (0, 1, 11, len(order)):
        assert list(order.batches(5, [(8, start)])) == whole[start:]


def test_a_set_smaller_than_a_step_is_one_and_an_incomplete_step_is_left_out_otherwise():
    assert [len(step) for step in steps(Samples(5), 1, 8)] == [5]
    assert [len(step) for step in steps(Samples(5), 4, 2)] == [8]
    assert [len(step) for step in steps(Samples(17), 1, 8)] == [8, 8]


@pytest.mark.parametrize("kind", [GlobalOrder, InOrder])
def test_the_order_is_computed_and_not_stored(kind):
    order = kind(range(10**12), 8, num_replicas=2, rank=1)
    last = next(order.batches(3, [(16, 10**12 // 16 - 1)]))
    assert len(last) == 8
    assert len(pickle.dumps(order)) < 10_000


# -------------------------------------------------------------------- another global batch within an epoch


@pytest.mark.parametrize("source", [SQUARES, BUCKETED], ids=["squares", "buckets"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_with_another_global_batch_what_was_not_seen_follows(source, drop_last):
    taken, seen = [], []
    for global_batch, count in ((8, 7), (12, 3), (6, 2), (6, 1), (10, None)):
        batches = steps(source, 2, global_batch // 2, taken=taken, drop_last=drop_last)[:count]
        if source.bucket_of is not None:
            assert all(len({source.bucket_of[position] for position, _ in step}) == 1 for step in batches)
        seen += [position for step in batches for position in dict.fromkeys(position for position, _ in step)]
        if count:
            taken = [*taken[:-1], (6, 3)] if taken and taken[-1][0] == global_batch else [*taken, (global_batch, count)]
            order = GlobalOrder(source, 1, drop_last=drop_last, seed=3)
            assert order.seen(0, taken) == len(set(seen))
    assert len(set(seen)) == len(seen)
    if not drop_last:
        assert sorted(seen) == list(range(203))


def test_a_stream_keeps_what_was_not_seen_as_well():
    first = steps(STREAM, 1, 8)[:5]
    rest = steps(STREAM, 2, 6, taken=[(8, 5)])
    flat = [key for step in steps(STREAM, 1, 8) for key in step]
    assert [key for step in first + rest for key in step][: len(flat) - 11] == flat[: len(flat) - 11]


# -------------------------------------------------------------------- layouts


def test_the_samples_of_a_bucket_are_found_in_any_block():
    buckets = np.random.default_rng(1).integers(0, 3, 3 * BLOCK + 5).astype(np.uint8)
    buckets[BLOCK : 2 * BLOCK] = 1  # a block without any of the others
    layout = Bucketed(buckets, seed=0)
    for bucket in range(3):
        members = np.flatnonzero(buckets == bucket)
        assert layout.counts[bucket] == len(members)
        found = layout.positions(bucket, np.arange(len(members)), None, 8)
        assert found.tolist() == members.tolist()


@pytest.mark.parametrize("parts", [1, 2, 6, 8, 64])
@pytest.mark.parametrize("global_batch", [1, 3, 8, 24, 256])
def test_a_stream_is_dealt_so_that_each_part_is_read_forward_and_without_gaps(parts, global_batch):
    count = 40 * global_batch
    positions = Dealt(count, parts).positions(0, np.arange(count), None, global_batch)
    for part in range(parts):
        numbers = positions[positions % parts == part] // parts
        assert numbers.tolist() == list(range(len(numbers)))
    assert len(set(positions.tolist())) == count


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (2, 4), (8, 8), (4, 2)])
@pytest.mark.parametrize("global_batch", [8, 16, 64, 256])
def test_processes_read_parts_of_their_own_where_their_numbers_divide(ranks, workers, global_batch):
    source = Samples(40 * global_batch, parts=64)
    readers = {}
    for rank in range(ranks):
        order = GlobalOrder(source, global_batch // ranks, num_replicas=ranks, rank=rank)
        for number, batch in enumerate(order.batches(0)):
            for position, _ in batch:
                readers.setdefault(position % 64, set()).add((rank, number % workers))
    assert {len(of_part) for of_part in readers.values()} == {1}
