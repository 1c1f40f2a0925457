"""What the pixel data modules share: their settings, their loaders, and a sampler that tells a dataset the epoch.

A crop is drawn from (seed, epoch, index). A dataset inside a worker cannot know the epoch (a persistent worker holds
the copy it was started with), so the sampler sends it along with every index. A sample that cannot be read is replaced
inside the dataset, so that no batch and no rank ever comes up short.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from latentdm.data.bucket_batches import BucketBatches, BucketLoader
from latentdm.data.skips import SampleError, Skips
from latentdm.data.workers import Reading, WorkerLoader, explanation
from latentdm.draws import sample_generator, sample_seed
from latentdm.errors import RunError, UserError

Sample = dict[str, Any]

ON_ERROR = ("raise", "skip")

REPLACEMENTS = 100
"""How many other samples are tried in the place of a broken one: at a share of 0.5 all are broken once in 10³⁰."""


class PixelDataset(Dataset[Sample], ABC):
    """Images that are drawn anew each epoch: ``dataset[place, epoch]``; ``dataset[place]`` means epoch 0.

    Attributes:
        skips: where a sample that cannot be read is written down while another takes its place; None: it is an error.
        bucket_of: ``n``: the bucket of each sample, where samples differ in size; None: all are alike.
        reading: what each worker reads, for the error of one that dies; None: there are no workers.
        ordered: places are asked for in order, in training too: the dataset shuffles by itself.
    """

    skips: Skips | None = None
    reading: Reading | None = None
    ordered: bool = False
    bucket_of: npt.NDArray[np.int32] | None = None

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
            ``pixels`` uint8 ``c h w``, ``index`` int, ``name`` str, where there is one ``mask`` uint8 ``1 h w``, and
            any other column.

        Raises:
            SampleError: it cannot be read.
        """

    def name(self, place: int) -> str:
        """What the report calls a sample that cannot be read."""
        return f"sample {place}"

    def distribute(self, rank: int, ranks: int, workers: int) -> None:  # few need to know
        """Told before it is read where it is read: on this rank of so many, by so many workers (or none)."""

    def passes(self, epoch: int) -> int:
        """How often as many samples as it holds have been seen at the end of an epoch, counting new ones alone."""
        return 1

    def replacement(self, place: int, epoch: int, attempt: int) -> int:
        """The place of the sample that is read instead of a broken one: drawn, and the same on every worker."""
        drawn = sample_seed(0, epoch, place, f"replacement/{attempt}")
        if self.bucket_of is None:
            return drawn % len(self)
        alike = np.flatnonzero(self.bucket_of == self.bucket_of[place])  # the batch has their size
        return int(alike[drawn % len(alike)])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at ``(place, epoch)``, or at ``place`` in epoch 0; IndexError past the end."""
        place, epoch = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= place < len(self):
            raise IndexError(f"{type(self).__name__}: there is no sample {place}; it holds {len(self)}")
        other = place
        for attempt in range(REPLACEMENTS):
            try:
                with self.reading.at(other) if self.reading else nullcontext():
                    return self.sample(other, epoch)
            except SampleError as error:
                if self.skips is None:
                    raise
                self.skips.add(self.name(other), str(error), self.passes(epoch))
            other = self.replacement(place, epoch, attempt)
        raise RunError(
            f"{type(self).__name__}: {REPLACEMENTS} samples in a row cannot be read; the report lists what is wrong"
        )


class Joined(PixelDataset):
    """Datasets one after another."""

    def __init__(self, *parts: PixelDataset) -> None:
        self.parts = parts
        buckets = [part.bucket_of for part in parts if part.bucket_of is not None]
        self.bucket_of = np.concatenate(buckets) if len(buckets) == len(parts) else None

    def __len__(self) -> int:
        """All samples."""
        return sum(map(len, self.parts))

    def name(self, place: int) -> str:
        """As the part says."""
        part, place = self._find(place)
        return part.name(place)

    def sample(self, place: int, epoch: int) -> Sample:
        """As the part says."""
        part, place = self._find(place)
        return part.sample(place, epoch)

    def _find(self, place: int) -> tuple[PixelDataset, int]:
        for part in self.parts[:-1]:
            if place < len(part):
                return part, place
            place -= len(part)
        return self.parts[-1], place


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
        if self.training and not getattr(self.dataset, "ordered", False):
            order = torch.randperm(count, generator=sample_generator(self.seed, epoch, "dataset", "order"))
        mine = order[torch.arange(self.rank, self.total_size, self.num_replicas) % count]
        for some in torch.split(mine, 4096):  # a list of them all would take five times the memory
            for place in some.tolist():
                yield place, epoch


class PixelDataModule(LightningDataModule):
    """The base of the pixel data modules: a subclass sets its datasets in ``setup``, the loaders are made here.

    A batch holds ``pixels`` uint8 ``b c h w`` (a quarter of the bytes of float32, and Lightning does not cast it),
    ``index`` int64 ``b``, ``name`` (a list of strings), where there are masks ``mask`` uint8 ``b 1 h w``, and any other
    column: numbers as a tensor ``b``, all else as a list. Images are laid out channels-last, as decoders give them and
    as convolutions are fastest.

    Training drops its last batch where that is incomplete and another is left; every rank has equally many batches.
    Where samples differ in size, each batch is of one bucket: see `latentdm.data.bucket_batches.BucketBatches`.
    Validation keeps every sample, in order. On several ranks the first few are repeated until the number divides by
    the ranks, so a mean over them differs by those few from the mean on one device.

    Args:
        batch_size: samples a batch, on each device.
        num_workers: processes that read images; 0 reads in the training process. The samples are the same.
        seed: the order and the crops follow from it.
        on_error: what happens to a sample that cannot be read: ``"raise"`` an error that names it, or ``"skip"``:
            another sample takes its place, drawn from (epoch, place), and a report at the end lists what was skipped.
        max_skipped_share: with ``skip``: an error all the same when more than this share of the samples is broken.

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

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_at_least(1, owner, batch_size=batch_size)
        check_at_least(0, owner, num_workers=num_workers, seed=seed)
        if on_error not in ON_ERROR:
            raise UserError(f"{owner}: on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        if not isinstance(max_skipped_share, int | float) or not 0 <= max_skipped_share <= 1:
            raise UserError(f"{owner}: max_skipped_share must be in 0…1, got {max_skipped_share!r}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.on_error = on_error
        self.max_skipped_share = max_skipped_share
        self.skips: Skips | None = None

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

    def problems(self) -> list[str]:
        """What is wrong with the data beside single samples; for the report where ``on_error`` is "skip"."""
        return []

    def teardown(self, stage: str) -> None:
        """Report the samples that were skipped, on the first rank, as a warning."""
        self._report()

    def on_exception(self, exception: BaseException) -> None:
        """A run that fails reports what it had skipped until then, and what to do where a worker died.

        The loader says so itself; but PyTorch's error comes by a signal, and so in the middle of a step as well.
        """
        for dataset in (self.train_set, self.val_set, self.test_set, self.predict_set):
            why = "" if dataset is None else explanation(exception, dataset.reading, dataset.name)
            if why:
                rank_zero_warn(why)
                break
        self._report()

    def _report(self) -> None:
        report = self.skips.report() if self.skips else ""
        if report:
            rank_zero_warn(report)
        self.skips = None

    def _skips(self, ranks: int, rank: int) -> Skips | None:
        """The report of this run; made with its first loader."""
        if self.on_error == "skip" and self.skips is None:
            trainer = self.trainer
            folder = Path(mkdtemp() if trainer is None else trainer.default_root_dir) / "skipped_samples"
            sets = {id(s): len(s) for s in (self.train_set, self.val_set, self.test_set, self.predict_set) if s}
            owner = type(self).__name__
            self.skips = Skips(owner, folder, rank, ranks, self.max_skipped_share, max(sets.values()))
            for problem in self.problems():
                self.skips.add(problem, problem)
        return self.skips

    def _needed(self, name: str) -> PixelDataset:
        dataset: PixelDataset | None = getattr(self, name)
        if dataset is None:
            raise UserError(f"{type(self).__name__}: {name} is None; call setup() first, and let it set {name}")
        return dataset

    def _loader(self, dataset: PixelDataset, training: bool) -> DataLoader[Sample]:
        # The strategy knows which ranks share the data: under tensor parallelism that is not every rank.
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        dataset.distribute(ranks["rank"], ranks["num_replicas"], self.num_workers)
        drop_last = training and len(dataset) // ranks["num_replicas"] >= self.batch_size
        dataset.skips = self._skips(ranks["num_replicas"], ranks["rank"])
        if self.num_workers > (dataset.reading.workers if dataset.reading else 0):
            dataset.reading = Reading(type(self).__name__, self.num_workers)
        settings: dict[str, Any] = {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Without one, each new iterator draws from the global generator, and validating changes the training.
            "generator": torch.Generator().manual_seed(sample_seed(self.seed, 0, "dataset", "workers")),
        }
        if dataset.bucket_of is not None:
            batches = BucketBatches(dataset, dataset.bucket_of, self.batch_size, training, seed=self.seed, **ranks)
            return BucketLoader(dataset, batch_sampler=batches, **settings)
        sampler = EpochSampler(dataset, training, seed=self.seed, drop_last=drop_last, **ranks)
        return WorkerLoader(dataset, batch_size=self.batch_size, sampler=sampler, drop_last=drop_last, **settings)


def collate(samples: Sequence[Sample]) -> Sample:
    """Samples → a batch, key by key: images and numbers become tensors, all else lists.

    Returns:
        A tensor ``b c h w`` keeps the channels-last layout of its images. A key that only some samples have holds None
        for the others.
    """
    batch: Sample = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        values: list[Any] = [sample.get(key) for sample in samples]
        if all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1:
            batch[key] = _stack(values)
        elif len({type(value) for value in values}) == 1 and isinstance(values[0], int | float):
            batch[key] = default_collate(values)
        else:
            batch[key] = values
    return batch


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim != 3:
        return torch.stack(tensors)
    return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)


def check_at_least(least: int, owner: str, **settings: object) -> None:
    """Raise ValueError, naming the class and the setting, unless each is an integer of at least ``least``."""
    for setting, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{owner}: {setting} must be an integer, got {value!r}; set it to {least} or more")
        if value < least:
            raise UserError(f"{owner}: {setting} must be at least {least}, got {value}")


def check_share(owner: str, val_share: object) -> None:
    """Raise ValueError, naming the class, unless ``val_share`` is a number in 0…1, below 1."""
    if not isinstance(val_share, int | float) or not 0 <= val_share < 1:
        raise UserError(f"{owner}: val_share must be at least 0 and below 1, got {val_share!r}")
