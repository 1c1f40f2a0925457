"""Which positions of a dataset the samples of an epoch have: all alike, in buckets, or dealt from a stream.

The samples of a bucket are numbered; a number within its bucket is an *ordinal*, and what a dataset is asked for is a
*position*. Without buckets there is one, which holds all.
"""

from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

from latentdm.data.permutation import Numbers, Permutation

BLOCK = 2048
"""Samples that are searched for one of a bucket: it takes microseconds, and the counts of a block little memory."""


class Layout(Protocol):
    """The positions of the samples of an epoch.

    Attributes:
        counts: the samples of each bucket.
    """

    counts: Numbers

    def positions(self, bucket: int, ordinals: Numbers, epoch: int | None, global_batch: int) -> Numbers:
        """The positions of some samples of a bucket.

        Args:
            bucket: which one.
            ordinals: ``n`` int64, 0…count − 1.
            epoch: shuffles them; None: they stay in order.
            global_batch: the samples of a step on all ranks.
        """


class Alike:
    """Samples that may share a batch with any other.

    Args:
        count: how many.
        seed: shuffles them.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.counts = np.array([count])
        self.seed = seed

    def positions(self, bucket: int, ordinals: Numbers, epoch: int | None, global_batch: int) -> Numbers:
        """See `Layout`."""
        if epoch is None:
            return ordinals
        return Permutation(int(self.counts[0]), self.seed, epoch, "order")(ordinals)


class Bucketed:
    """Samples that share a batch with those of their bucket.

    No list of each bucket's samples is held: counts of every `BLOCK` samples say where to look.

    Args:
        bucket_of: ``n`` integers, the bucket of each sample.
        seed: shuffles them within their buckets.
    """

    def __init__(self, bucket_of: npt.NDArray[np.integer], seed: int) -> None:
        self.bucket_of = bucket_of = np.asarray(bucket_of)
        self.seed = seed
        buckets = int(bucket_of.max()) + 1 if len(bucket_of) else 1
        blocks = (bucket_of[start : start + BLOCK] for start in range(0, len(bucket_of), BLOCK))
        counts = [np.bincount(block, minlength=buckets) for block in blocks]
        of_block = np.stack([np.zeros(buckets, np.int64), *counts]).cumsum(axis=0)
        self.counts = of_block[-1].copy()
        self._before = np.ascontiguousarray(of_block[:-1].T)  # bucket, block: its samples in the blocks before

    def positions(self, bucket: int, ordinals: Numbers, epoch: int | None, global_batch: int) -> Numbers:
        """See `Layout`."""
        if epoch is not None:
            ordinals = Permutation(int(self.counts[bucket]), self.seed, epoch, f"order/{bucket}")(ordinals)
        before = self._before[bucket]
        blocks = np.searchsorted(before, ordinals, side="right") - 1
        found = np.empty_like(ordinals)
        for row, (block, ordinal) in enumerate(zip(blocks.tolist(), ordinals.tolist(), strict=True)):
            members = np.flatnonzero(self.bucket_of[block * BLOCK : (block + 1) * BLOCK] == bucket)
            found[row] = block * BLOCK + members[ordinal - before[block]]
        return found


class Dealt:
    """Samples of a stream, dealt from its parts. The position ``number · parts + part`` is a part's n-th sample.

    Each step takes its samples from one group of the parts, and the groups take turns. So where the numbers of ranks
    and workers divide the size and the number of the groups, every process reads parts of its own; otherwise
    processes share some, and pass over what is not theirs.

    Args:
        count: samples an epoch.
        parts: of the stream.
    """

    def __init__(self, count: int, parts: int) -> None:
        self.counts = np.array([count])
        self.parts = parts
        self.groups = next(size for size in range(isqrt(parts), 0, -1) if parts % size == 0)

    def positions(self, bucket: int, ordinals: Numbers, epoch: int | None, global_batch: int) -> Numbers:
        """See `Layout`; a stream shuffles by itself."""
        size = self.parts // self.groups
        step, row = np.divmod(ordinals, global_batch)
        turn, group = np.divmod(step, self.groups)
        earlier, member = np.divmod(row, size)
        a_step = (global_batch - member + size - 1) // size  # what the part gives to each step of its group
        positions: Numbers = (turn * a_step + earlier) * self.parts + group * size + member
        return positions
