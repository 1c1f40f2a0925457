"""What the pixel data modules share: their settings, their loaders, and a sampler that tells a dataset the epoch.

A crop is drawn from (seed, epoch, index). A dataset inside a worker cannot know the epoch (a persistent worker holds
the copy it was started with), so the sampler sends it along with every index.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from latentdm.randomness import sample_generator, sample_seed

Sample = dict[str, Any]


class PixelDataset(Dataset[Sample], ABC):
    """Images that are drawn anew each epoch: ``dataset[place, epoch]``; ``dataset[place]`` means epoch 0."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples of an epoch."""

    @abstractmethod
    def sample(self, place: int, epoch: int) -> Sample:
        """One sample; a function of its arguments and of nothing else.

        Args:
            place: 0…len − 1.
            epoch: the training epoch; 0 in validation.

        Returns:
            ``pixels`` uint8 ``c h w``, ``index`` int, ``name`` str and, where there is one, ``mask`` uint8 ``1 h w``.
        """

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at ``(place, epoch)``, or at ``place`` in epoch 0; IndexError past the end."""
        place, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= place < len(self):
            raise IndexError(f"{type(self).__name__}: there is no sample {place}; it holds {len(self)}")
        return self.sample(place, epoch)


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields ``(place, epoch)``, shuffled from (seed, epoch) in training and in order outside it.

    It derives from ``DistributedSampler`` so that Lightning never replaces it, whatever ``use_distributed_sampler``
    says, and calls `set_epoch` each epoch, on one device too. Where the samples do not divide by the ranks, the first
    ones are repeated (or, with ``drop_last``, the last ones left out), so that every rank has equally many.

    Args:
        dataset: anything with a length.
        training: shuffle and count epochs; otherwise the order is the dataset's and the epoch stays 0, so that the
            figures of two validations compare.
        num_replicas: the number of ranks that share the dataset.
        rank: the place among them.
        seed: the run's seed.
        drop_last: leave the surplus out instead of repeating samples.
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

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that shuffles and is sent along; without effect outside training."""
        if self.training:
            super().set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """This rank's ``(place, epoch)`` pairs."""
        count, epoch = len(self.dataset), self.epoch  # type: ignore[arg-type]  # Dataset declares no length
        order = torch.arange(count)
        if self.training:
            order = torch.randperm(count, generator=sample_generator(self.seed, epoch, "dataset", "order"))
        mine = torch.arange(self.rank, self.total_size, self.num_replicas) % count
        for place in order[mine].tolist():
            yield place, epoch


class PixelDataModule(LightningDataModule):
    """The base of the pixel data modules: a subclass sets its datasets in ``setup``, the loaders are made here.

    A batch holds ``pixels`` uint8 ``b c h w`` (a quarter of the bytes of float32, and Lightning does not cast it),
    ``index`` int64 ``b``, ``name`` (a list of strings) and, where there are masks, ``mask`` uint8 ``b 1 h w``.

    Training drops its last batch where that is incomplete and another is left; every rank has equally many batches.
    Validation keeps every sample, in order. On several ranks the first few are repeated until the number divides by
    the ranks, so a mean over them differs by those few from the mean on one device.

    Args:
        batch_size: samples a batch, on each device.
        num_workers: processes that read images; 0 reads in the training process. The samples are the same.
        seed: the order and the crops follow from it.

    Attributes:
        train_set: the dataset of ``fit``.
        val_set: the dataset of ``validate``; None: no validation.
        test_set: the dataset of ``test``.
        predict_set: the dataset of ``predict``.

    Raises:
        ValueError: a setting is out of range.
    """

    train_set: PixelDataset | None = None
    val_set: PixelDataset | None = None
    test_set: PixelDataset | None = None
    predict_set: PixelDataset | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        owner = type(self).__name__
        check_at_least(owner, "batch_size", batch_size, 1)
        check_at_least(owner, "num_workers", num_workers, 0)
        check_at_least(owner, "seed", seed, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches; ValueError where there is nothing to train on."""
        return self._loader(self._needed("train_set"), training=True)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Batches in order; without a validation set no loader, of which Lightning makes sure with a warning."""
        return [] if self.val_set is None else self._loader(self.val_set, training=False)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches in order; ValueError where there is nothing to test on."""
        return self._loader(self._needed("test_set"), training=False)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches in order; ValueError where there is nothing to predict."""
        return self._loader(self._needed("predict_set"), training=False)

    def _needed(self, name: str) -> PixelDataset:
        dataset: PixelDataset | None = getattr(self, name)
        if dataset is None:
            raise ValueError(f"{type(self).__name__}: {name} is None; call setup() first, and let it set {name}")
        return dataset

    def _loader(self, dataset: PixelDataset, training: bool) -> DataLoader[Sample]:
        # The strategy knows which ranks share the data: under tensor parallelism that is not every rank.
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        drop_last = training and len(dataset) // ranks["num_replicas"] >= self.batch_size
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, training, seed=self.seed, drop_last=drop_last, **ranks),
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Without one, each new iterator draws from the global generator, and validating changes the training.
            generator=torch.Generator().manual_seed(sample_seed(self.seed, 0, "dataset", "workers")),
        )


def check_at_least(owner: str, setting: str, value: object, least: int) -> None:
    """Raise ValueError, naming the class and the setting, unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{owner}: {setting} must be an integer, got {value!r}; set it to {least} or more")
    if value < least:
        raise ValueError(f"{owner}: {setting} must be at least {least}, got {value}")
