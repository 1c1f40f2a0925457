"""Batches of one bucket each, planned for all ranks at once.

A step belongs to one bucket on all ranks, and each rank gets equally many of its images: so no rank waits for another,
and all have the same number of batches. The order is a function of (seed, epoch), so that a run can go on at any step.
"""

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import torch
from torch.utils.data import Dataset, DistributedSampler

from latentdm.data.workers import WorkerLoader
from latentdm.draws import sample_generator


class BucketBatches(DistributedSampler[list[tuple[int, int]]]):
    """A batch sampler that yields lists of ``(place, epoch)``; in training its order is new each epoch.

    The images of a bucket that do not fill a step of all ranks make a smaller one, in which the first ranks' images are
    repeated where they do not divide by the ranks: fewer repeats a bucket and epoch than there are ranks. With
    ``drop_last`` they are left out, others each epoch.

    It derives from ``DistributedSampler`` for the same reason as `latentdm.data.EpochSampler`; `BucketLoader` shows it
    to Lightning.

    Args:
        dataset: what the places refer to.
        bucket_of: the bucket of each sample, ``n`` integers.
        batch_size: samples a batch, on each rank.
        training: shuffle and count epochs; otherwise the order stays that of the buckets and places.
        num_replicas: the number of ranks that share the dataset.
        rank: the place among them.
        seed: the run's seed.
        drop_last: leave out what does not fill a step. Ignored where nothing would be left.

    Attributes:
        repeated: samples that an epoch repeats, on all ranks together.
        dropped: samples that an epoch leaves out.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        bucket_of: npt.ArrayLike,
        batch_size: int,
        training: bool,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=training, seed=seed, drop_last=drop_last)
        self.training = training
        self.start = 0
        self.bucket_of = torch.as_tensor(bucket_of)
        counts = torch.bincount(self.bucket_of)
        of_all = batch_size * num_replicas
        firsts = counts.cumsum(0) - counts  # where a bucket begins among the places sorted by bucket
        self._steps = torch.tensor(
            [
                (first + start, min(of_all, count - start))
                for first, count in _pairs(firsts, counts)
                for start in range(0, count, of_all)
            ]
        )
        whole = self._steps[:, 1] == of_all
        if drop_last and bool(whole.any()):
            self._steps = self._steps[whole]
        used = self._steps[:, 1]
        self.dropped = int(counts.sum() - used.sum())
        self.repeated = int((-used % num_replicas).sum())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that shuffles and is sent along; without effect outside training."""
        if self.training:
            super().set_epoch(epoch)

    def __len__(self) -> int:
        """The number of batches of an epoch, the same on every rank."""
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches of the epoch, from ``start`` on."""
        return self.batches(self.epoch, self.start)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches of any epoch, from any step on."""
        count = len(self.bucket_of)
        places, steps = torch.arange(count), self._steps
        if self.training:
            generator = sample_generator(self.seed, epoch, "dataset", "order")
            places = torch.randperm(count, generator=generator)
            steps = steps[torch.randperm(len(steps), generator=generator)]
        places = places[self.bucket_of[places].argsort(stable=True)]
        for first, size in _pairs(*steps[start:].unbind(1)):
            mine = torch.arange(self.rank, size + -size % self.num_replicas, self.num_replicas) % size
            yield [(place, epoch) for place in places[first + mine].tolist()]


class BucketLoader(WorkerLoader):
    """A loader whose batch sampler is a `BucketBatches`; a checkpoint in the middle of an epoch holds its place."""

    _yielded = 0
    _resume: dict[str, int] | None = None

    @property
    def sampler(self) -> Any:
        """The batch sampler, where Lightning looks for what tells ranks and epochs apart."""
        return self.batch_sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        pass  # DataLoader makes one that nobody asks

    def __iter__(self) -> Any:
        """The batches of this epoch; those that a loaded state had seen are left out, once."""
        batches: Any = self.batch_sampler
        start, self._resume = self._resume, None
        batches.start = start["batches"] if start and start["epoch"] == batches.epoch else 0
        self._yielded = batches.start
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were yielded."""
        batches: Any = self.batch_sampler
        return {"epoch": batches.epoch, "batches": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that were yielded, in the iteration that comes next."""
        self._resume = dict(state_dict)


def _pairs(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[int, int]]:
    return zip(first.tolist(), second.tolist(), strict=True)
