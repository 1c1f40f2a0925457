"""Datasets of images that are drawn anew each epoch, and batches of their samples.

A dataset inside a worker cannot know the epoch (a persistent worker holds the copy it was started with), so the sampler
sends it along with every position. A sample that cannot be read is replaced inside the dataset, so that no batch and no
rank ever comes up short.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from latentdm.batch import EPOCH, PIXELS, SOURCE
from latentdm.cache.rows import CACHED, CachedRows, CachedSample
from latentdm.data.files import READ_TIMEOUT_S, Patience, patient
from latentdm.data.reading import Reading
from latentdm.data.skips import SampleError, Skips
from latentdm.draws import sample_seed
from latentdm.errors import RunError, attributed

Sample = dict[str, Any]

MAX_REPLACEMENTS = 100
"""How many samples are tried to replace a broken one: if half of all are broken, these all are once in 10³⁰ times."""


class PixelDataset(Dataset[Sample], ABC):
    """Images that are drawn anew each epoch: ``dataset[position, epoch]``; ``dataset[position]`` means epoch 0.

    Attributes:
        owner: the class that an error names; None: the dataset's own. A data module sets its own.
        skips: where a sample that cannot be read is written down while another replaces it; None: it is an error.
        bucket_of: ``n``: the bucket of each sample, where samples differ in size; None: all are alike.
        reading: what each worker reads, for the error of one that dies; None: there are no workers.
        collate: samples → a batch; see the function `collate`.
        parts: of a stream, which shuffles by itself: see `latentdm.data.layout.Dealt`; None: any sample can be reached.
        read_timeout: seconds that the reading of a file may wait, see `latentdm.data.PixelDataModule`.
    """

    owner: str | None = None
    skips: Skips | None = None
    reading: Reading | None = None
    read_timeout: float = READ_TIMEOUT_S
    parts: int | None = None
    bucket_of: npt.NDArray[np.integer] | None = None
    collate: Callable[[Sequence[Sample]], Sample]

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples of an epoch."""

    @abstractmethod
    def sample(self, position: int, epoch: int) -> Sample:
        """One sample; a function of its arguments and of nothing else.

        Args:
            position: 0…len − 1.
            epoch: the training epoch; 0 in validation.

        Returns:
            ``pixels`` uint8 ``c h w``, ``index`` int, ``name`` str, where the sample has them ``mask`` uint8 ``1 h w``
            and ``source`` uint8 ``3 h w``, and any other column.

        Raises:
            SampleError: it cannot be read.
        """

    def name(self, position: int) -> str:
        """What the report calls a sample that cannot be read."""
        return f"sample {position}"

    def replacement(self, position: int, epoch: int, attempt: int) -> int:
        """The position of the sample that replaces a broken one: drawn, and the same on every worker."""
        drawn = sample_seed(0, epoch, position, f"replacement/{attempt}")
        if self.bucket_of is None:
            return drawn % len(self)
        alike = np.flatnonzero(self.bucket_of == self.bucket_of[position])  # the batch has their size
        return int(alike[drawn % len(alike)])

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at ``(position, epoch)``, which it then carries along, or at ``position`` in epoch 0.

        Raises:
            IndexError: the position is past the end.
            SampleError: the sample cannot be read, and ``skips`` is None.
            TooManySkipped: more samples were skipped than may be.
        """
        position, epoch = key if isinstance(key, tuple) else (key, 0)
        if self.parts is None and not 0 <= position < len(self):
            raise IndexError(f"{type(self).__name__}: there is no sample {position}; it holds {len(self)}")
        patience = Patience(self.read_timeout, self.reading.tick if self.reading else lambda: None)
        with attributed(self.owner or type(self).__name__), patient(patience):
            sample = self._readable(position, epoch)
        return {**sample, EPOCH: epoch} if isinstance(key, tuple) else sample

    def _readable(self, position: int, epoch: int) -> Sample:
        """The sample, or where it cannot be read and may be skipped, the first one that replaces it."""
        other = position
        for attempt in range(MAX_REPLACEMENTS):
            try:
                with self.reading.at(other) if self.reading else nullcontext():
                    return self.sample(other, epoch)
            except SampleError as error:
                if self.skips is None:
                    raise
                # Each epoch of a stream brings new samples; otherwise all have the same ones.
                self.skips.add(self.name(other), str(error), new_epochs=1 if self.parts is None else epoch + 1)
            other = self.replacement(position, epoch, attempt)
        raise RunError(f"{MAX_REPLACEMENTS} samples in a row cannot be read; the report lists what is wrong")


class Joined(PixelDataset):
    """Datasets one after another."""

    def __init__(self, *parts: PixelDataset) -> None:
        self.joined = parts
        buckets = [part.bucket_of for part in parts if part.bucket_of is not None]
        self.bucket_of = np.concatenate(buckets) if len(buckets) == len(parts) else None

    def __len__(self) -> int:
        """All samples."""
        return sum(map(len, self.joined))

    def name(self, position: int) -> str:
        """The part's name of a sample."""
        part, position = self._find(position)
        return part.name(position)

    def sample(self, position: int, epoch: int) -> Sample:
        """The part's sample."""
        part, position = self._find(position)
        return part.sample(position, epoch)

    def _find(self, position: int) -> tuple[PixelDataset, int]:
        for part in self.joined[:-1]:
            if position < len(part):
                return part, position
            position -= len(part)
        return self.joined[-1], position


def collate(samples: Sequence[Sample]) -> Sample:
    """Samples → a batch, key by key: images and numbers become tensors, all else lists.

    Returns:
        A tensor ``b c h w`` keeps the channels-last layout of its images. A key that only some samples have holds None
        for the others. Of samples that were looked up in a cache the batch holds a `CachedRows`; those that were found
        get black images where others have some, and nobody looks at them.
    """
    cached = [sample[CACHED] for sample in samples if isinstance(sample.get(CACHED), CachedSample)]
    if cached:
        samples = [{name: value for name, value in sample.items() if name != CACHED} for sample in samples]
    if not cached or len(cached) < len(samples):
        return _collate(samples)
    for name in (PIXELS, SOURCE):
        like = next((sample[name] for sample in samples if isinstance(sample.get(name), Tensor)), None)
        if like is not None:
            samples = [s if name in s else {**s, name: torch.zeros_like(like)} for s in samples]
    batch = _collate(samples)
    return batch | {CACHED: CachedRows(cached, None if PIXELS in batch else cached[0].sizes[-2:])}


def _collate(samples: Sequence[Sample]) -> Sample:
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


PixelDataset.collate = staticmethod(collate)


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim != 3:
        return torch.stack(tensors)
    return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).permute(0, 3, 1, 2)
