"""In which order samples are read: shuffled from (seed, epoch), split over the ranks, and in buckets if need be.

A batch sampler of buckets plans its batches for all ranks at once. A step belongs to one bucket on all ranks, and each
rank gets equally many of its images: so no rank waits for another, and all have the same number of batches.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch.utils.data import Dataset, DistributedSampler

from latentdm.draws import sample_generator

T = TypeVar("T", covariant=True)


class EpochOrder(DistributedSampler[T]):
    """An order that is shuffled from (seed, epoch) in training, and split over the ranks.

    It derives from ``DistributedSampler`` so that Lightning never replaces it, whatever ``use_distributed_sampler``
    says, and calls `set_epoch` each epoch, on one device too.

    Args:
        dataset: anything with a length.
        training: shuffle and count epochs; otherwise the order is the dataset's and the epoch stays 0, so that the
            figures of two validations compare.
        num_replicas: the number of ranks that share the dataset.
        rank: this process's number among them.
        seed: the run's seed.
        drop_last: leave out what does not divide by the ranks.

    Attributes:
        start: how much of what this rank yields the next iteration leaves out at the beginning.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        training: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=training, seed=seed, drop_last=drop_last)
        self.training = training
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that shuffles and is sent along; without effect outside training."""
        if self.training:
            super().set_epoch(epoch)


class EpochSampler(EpochOrder[tuple[int, int]]):
    """Yields ``(position, epoch)``.

    Where the samples do not divide by the ranks, the first ones are repeated (or, with ``drop_last``, the last ones
    left out), so that every rank has equally many.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """This rank's ``(position, epoch)`` pairs."""
        count, epoch = len(self.dataset), self.epoch  # type: ignore[arg-type]  # Dataset declares no length
        order = torch.arange(count)
        if self.training and not getattr(self.dataset, "ordered", False):
            order = torch.randperm(count, generator=sample_generator(self.seed, epoch, "dataset", "order"))
        mine = order[torch.arange(self.rank, self.total_size, self.num_replicas) % count]
        for some in torch.split(mine[self.start :], 4096):  # a list of them all would take five times the memory
            for position in some.tolist():
                yield position, epoch


class BucketBatches(EpochOrder[list[tuple[int, int]]]):
    """A batch sampler that yields lists of ``(position, epoch)``; in training its order is new each epoch.

    The images of a bucket that do not fill a step of all ranks make a smaller one, in which the first ranks' images are
    repeated where they do not divide by the ranks: fewer repeats a bucket and epoch than there are ranks. With
    ``drop_last`` they are left out, others each epoch; it is ignored where nothing would be left. Outside training the
    order is that of the buckets and positions. `latentdm.data.loader.PixelLoader` shows it to Lightning.

    Args:
        dataset: what the positions refer to.
        bucket_of: the bucket of each sample, ``n`` integers.
        batch_size: samples a batch, on each rank.
        training: as of `EpochOrder`.
        settings: of `EpochOrder`.

    Attributes:
        repeated: samples that an epoch repeats, on all ranks together.
        dropped: samples that an epoch leaves out.
    """

    def __init__(
        self, dataset: Dataset[Any], bucket_of: npt.ArrayLike, batch_size: int, training: bool, **settings: Any
    ) -> None:
        super().__init__(dataset, training, **settings)
        self.bucket_of = torch.as_tensor(bucket_of)
        counts = torch.bincount(self.bucket_of)
        of_all = batch_size * self.num_replicas
        firsts = counts.cumsum(0) - counts  # where a bucket begins among the positions sorted by bucket
        self._steps = torch.tensor(
            [
                (first + start, min(of_all, count - start))
                for first, count in _pairs(firsts, counts)
                for start in range(0, count, of_all)
            ]
        )
        whole = self._steps[:, 1] == of_all
        if self.drop_last and bool(whole.any()):
            self._steps = self._steps[whole]
        used = self._steps[:, 1]
        self.dropped = int(counts.sum() - used.sum())
        self.repeated = int((-used % self.num_replicas).sum())

    def __len__(self) -> int:
        """The number of batches of an epoch, the same on every rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches of the epoch, from ``start`` on."""
        return self.batches(self.epoch, self.start)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches of any epoch, from any step on."""
        count = len(self.bucket_of)
        positions, steps = torch.arange(count), self._steps
        if self.training:
            generator = sample_generator(self.seed, epoch, "dataset", "order")
            positions = torch.randperm(count, generator=generator)
            steps = steps[torch.randperm(len(steps), generator=generator)]
        positions = positions[self.bucket_of[positions].argsort(stable=True)]
        for first, size in _pairs(*steps[start:].unbind(1)):
            mine = torch.arange(self.rank, size + -size % self.num_replicas, self.num_replicas) % size
            yield [(position, epoch) for position in positions[first + mine].tolist()]


def _pairs(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[int, int]]:
    return zip(first.tolist(), second.tolist(), strict=True)
