"""The one order of an epoch: a function of (seed, epoch) and of the global batch, of which ranks take their slices.

A *step* is what all ranks train on at once, a *global batch* its samples: those of one rank in turns with those of the
others, so that 1 × 8, 2 × 4 and 4 × 2 samples are the same steps. Nothing of the order is stored: any step of any epoch
is computed when it is asked for. A step belongs to one bucket on all ranks, and each rank gets equally many of its
samples: no rank waits for another, and all have the same number of batches.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, SequentialSampler

from latentdm.data.layout import Alike, Bucketed, Dealt, Layout
from latentdm.data.permutation import Numbers, Permutation
from latentdm.errors import UserError

Key = int | tuple[int, int]
"""What a dataset is asked for: ``(position, epoch)`` in training, else the position."""

Taken = Sequence[Sequence[int]]
"""What was seen of an epoch: ``(global batch, steps)`` in turn, one pair unless the global batch has changed."""


class Steps:
    """What is left of an epoch, in global batches.

    Args:
        left: for each bucket the ordinals that are left: ``k 2`` int64, the first of a run and the one past its last.
        global_batch: samples a step.
        drop_last: leave out what does not fill a step.

    Attributes:
        order: moves the numbers of the steps; None: buckets come one after another.
    """

    def __init__(self, left: Sequence[Numbers], global_batch: int, drop_last: bool) -> None:
        self.left = left
        self.global_batch = global_batch
        sizes = [runs[:, 1] - runs[:, 0] for runs in left]
        self.counts = np.array([int(of_bucket.sum()) for of_bucket in sizes])
        self.order: Permutation | None = None
        steps = self.counts // global_batch if drop_last else -(-self.counts // global_batch)
        self._first = np.concatenate([[0], steps.cumsum()])  # of each bucket, and past the last
        self._before = [np.concatenate([[0], of_bucket.cumsum()[:-1]]) for of_bucket in sizes]  # each run of a bucket

    def __len__(self) -> int:
        """The number of steps."""
        return int(self._first[-1])

    def step(self, number: int, start: int, stride: int) -> tuple[int, Numbers]:
        """The bucket of a step, and the ordinals of one rank: every ``stride``-th from ``start`` on.

        Where the step does not divide by the ranks, its first samples are repeated.
        """
        buckets, steps = self._find(np.array([number]))
        bucket, first = int(buckets[0]), int(steps[0]) * self.global_batch
        size = min(self.global_batch, int(self.counts[bucket]) - first)
        mine = np.arange(start, size + -size % stride, stride) % size
        return bucket, self._ordinals(bucket, first + mine)

    def after(self, count: int) -> list[Numbers]:
        """What is left when so many steps were taken."""
        buckets, steps = self._find(np.arange(min(count, len(self))))
        left = []
        for bucket, total in enumerate(self.counts.tolist()):
            taken = np.zeros(int(np.diff(self._first)[bucket]) + 1, dtype=bool)  # the last: what no step takes
            taken[steps[buckets == bucket]] = True
            edges = np.flatnonzero(np.diff(taken, prepend=True, append=True)).reshape(-1, 2)
            spans = np.minimum(edges * self.global_batch, total)
            left.append(self._runs(bucket, spans[spans[:, 0] < spans[:, 1]]))
        return left

    def _find(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The bucket of each step, and its number among those of the bucket."""
        moved = self.order(numbers) if self.order else numbers
        buckets = np.searchsorted(self._first, moved, side="right") - 1
        return buckets, moved - self._first[buckets]

    def _ordinals(self, bucket: int, numbers: Numbers) -> Numbers:
        """What is left of a bucket, counted through → its ordinals."""
        before = self._before[bucket]
        run = np.searchsorted(before, numbers, side="right") - 1
        ordinals: Numbers = self.left[bucket][run, 0] + numbers - before[run]
        return ordinals

    def _runs(self, bucket: int, spans: Numbers) -> Numbers:
        """Spans of the same numbers, in order and apart → runs, as of ``left``."""
        cuts = np.union1d(spans, self._before[bucket])  # where a span or a run begins, or a span ends
        lengths, within = np.diff(cuts), np.searchsorted(spans.ravel(), cuts[:-1], side="right") % 2 == 1
        firsts = self._ordinals(bucket, cuts[:-1][within])
        return np.stack([firsts, firsts + lengths[within]], axis=1)


class GlobalOrder(DistributedSampler[list[Key]]):
    """Yields this rank's batches of an epoch: lists of what the dataset is asked for.

    It derives from ``DistributedSampler`` so that Lightning never replaces it, whatever ``use_distributed_sampler``
    says, and calls `set_epoch` each epoch, on one device too.

    Where a step does not divide by the ranks, its first samples are repeated. With ``drop_last`` the samples of a
    bucket that do not fill a step are left out, others each epoch, unless nothing would be left.

    Args:
        dataset: a `latentdm.data.PixelDataset`, or anything with a length.
        batch_size: samples a batch, on each rank.
        training: batches hold ``(position, epoch)``; otherwise positions alone.
        drop_last: leave out what does not fill a step.
        num_replicas: the number of ranks that share the dataset.
        rank: this process's number among them.
        seed: the run's seed.

    Attributes:
        taken: what iterations leave out.
    """

    shuffled = True

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        training: bool = True,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=self.shuffled, seed=seed, drop_last=drop_last)
        self.batch_size = batch_size
        self.training = training
        self.taken: Taken = ()

    @property
    def global_batch(self) -> int:
        """Samples of a step on all ranks."""
        return self.batch_size * self.num_replicas

    @cached_property
    def layout(self) -> Layout:
        """Which positions the samples have."""
        count: int = len(self.dataset)  # type: ignore[arg-type]  # Dataset declares no length
        if (parts := getattr(self.dataset, "parts", None)) is not None:
            return Dealt(count, parts)
        buckets = getattr(self.dataset, "bucket_of", None)
        return Alike(count, self.seed) if buckets is None else Bucketed(buckets, self.seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that shuffles and is sent along; without effect where the order is the dataset's."""
        if self.shuffled:
            super().set_epoch(epoch)

    def __len__(self) -> int:
        """The number of batches of an epoch, the same on every rank."""
        return len(self.rest(self.epoch, ())[0])

    def __iter__(self) -> Iterator[list[Key]]:
        """This rank's batches of the epoch, without those that were ``taken``."""
        return self.batches(self.epoch, self.taken)

    def batches(self, epoch: int, taken: Taken = ()) -> Iterator[list[Key]]:
        """This rank's batches of any epoch, of what is left of it."""
        steps, start = self.rest(epoch, taken)
        first_batch = taken[0][0] if taken else self.global_batch
        for number in range(start, len(steps)):
            bucket, ordinals = steps.step(number, self.rank, self.num_replicas)
            shuffle = epoch if self.shuffled else None
            positions = self.layout.positions(bucket, ordinals, shuffle, first_batch).tolist()
            yield [(position, epoch) for position in positions] if self.training else positions

    def rest(self, epoch: int, taken: Taken) -> tuple[Steps, int]:
        """The steps of the present global batch in what is left of an epoch, and how many of them were taken."""
        done = list(taken)
        if not done or done[-1][0] != self.global_batch:
            done.append((self.global_batch, 0))
        left = [np.array([[0, count]]) for count in self.layout.counts.tolist()]
        for phase, (global_batch, count) in enumerate(done):
            steps = Steps(left, global_batch, self.drop_last)
            if not len(steps) and phase == 0:
                steps = Steps(left, global_batch, drop_last=False)
            if self.shuffled and len(left) > 1:
                steps.order = Permutation(len(steps), self.seed, epoch, f"buckets/{phase}")
            if phase + 1 < len(done):
                left = steps.after(count)
        return steps, min(count, len(steps))

    def seen(self, epoch: int, taken: Taken) -> int:
        """How many samples of an epoch were seen on all ranks together."""
        steps, count = self.rest(epoch, taken)
        left = sum(int((runs[:, 1] - runs[:, 0]).sum()) for runs in steps.after(count))
        return int(self.layout.counts.sum()) - left


class InOrder(GlobalOrder, SequentialSampler):  # type: ignore[misc]  # which yields numbers
    """A `GlobalOrder` that is the dataset's own, in every epoch: of validation, and of ``overfit_batches``.

    It derives from ``SequentialSampler``, by which Lightning knows that there is no shuffling to turn off.
    """

    shuffled = False


class RankBatches(BatchSampler):
    """The batches of a `GlobalOrder`, as a batch sampler that Lightning can take apart to note what is predicted.

    Attributes:
        locked: whether nobody but its own loader may ask for them, as whoever does would share them out once more.
    """

    sampler: GlobalOrder  # type: ignore[assignment]  # which yields batches itself
    locked = False

    def __init__(self, sampler: GlobalOrder, batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """The number of batches of an epoch, the same on every rank."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Key]]:  # type: ignore[override]  # tuples and all
        """This rank's batches.

        Raises:
            UserError: they are `locked`.
        """
        if self.locked:
            raise UserError(
                f"{getattr(self.sampler.dataset, 'owner', 'RankBatches')}: the loader yields the share of its rank "
                "already, and would be shared out once more; iterate over it without accelerator.prepare"
            )
        return iter(self.sampler)
