"""Ahead of time: all that a configuration would look up, encoded by Lightning's ``predict`` and nothing else done.

An entry that is there is read, and its image is not opened: a run that was stopped goes on where it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import lcm
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from tqdm import tqdm

from latentdm.batch import LATENTS
from latentdm.cache.cache import Cache
from latentdm.cache.rows import CACHED
from latentdm.cache.samples import VARIANTS, CachedCrops, collate_samples, parts_of
from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.module import PixelDataModule
from latentdm.data.skips import SampleError
from latentdm.data.stream import StreamImages
from latentdm.errors import UserError

LOOKED_AT = 1000
"""Epochs among which one is looked for in which an image is mirrored, or is not: one in two is."""


class Passed:
    """A batch of which everything was found. It is no batch of images, and passes the data module as it is.

    Args:
        entries: their number.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries


class Jobs(PixelDataset):
    """Everything that some data sets would look up, once.

    Args:
        datasets: whose crops look up.
        part: which part of all, and of how many: by key, so that parts of different runs fit together.
    """

    def __init__(self, datasets: Sequence[PixelDataset], part: tuple[int, int] = (0, 1)) -> None:
        self.datasets = list(datasets)
        rows = [_jobs(dataset, number, part) for number, dataset in enumerate(self.datasets)]
        self.rows: npt.NDArray[np.int64] = np.concatenate([*rows, np.empty((0, 3), np.int64)])
        buckets = [dataset.bucket_of for dataset in self.datasets]
        if any(bucket is not None for bucket in buckets):
            self.bucket_of = np.array([self._bucket(*row) for row in self.rows.tolist()], np.int32)
        self.collate = collate_missing

    def _bucket(self, number: int, position: int, epoch: int) -> int:
        bucket = self.datasets[number].bucket_of
        return 0 if bucket is None else int(bucket[position])

    def __len__(self) -> int:
        """Images, each as often as it is encoded."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """The image's."""
        number, at, _ = self.rows[position].tolist()
        name: str = self.datasets[number].name(at)
        return name

    def sample(self, position: int, epoch: int) -> Sample:
        """The image as its data set gives it in the job's own epoch."""
        number, at, job_epoch = self.rows[position].tolist()
        sample: Sample = self.datasets[number].sample(at, job_epoch)
        return sample


def _jobs(dataset: PixelDataset, number: int, part: tuple[int, int]) -> npt.NDArray[np.int64]:
    """``n 3``: number, position and epoch of all that a data set would look up."""
    crops: CachedCrops = dataset.crops  # type: ignore[attr-defined]
    jobs = [
        (number, position, epoch)
        for position in tqdm(range(len(dataset)), "listing", leave=False, delay=2)
        for epoch in wanted_epochs(dataset, crops, position)
        if part[1] == 1 or _part_of(dataset, crops, position, epoch) % part[1] == part[0]
    ]
    return np.array(sorted(jobs, key=itemgetter(2)), np.int64).reshape(-1, 3)  # one epoch after another


def wanted_epochs(dataset: Any, crops: CachedCrops, position: int) -> Iterator[int]:
    """Epochs that together show an image in all of its variants, mirrored and not, and under all of its masks."""
    plan = crops.plan
    masks = plan.mask_variants if plan.masked == VARIANTS else 1
    if plan.variants is not None:
        yield from range(lcm(plan.variants, masks))
        return
    for mask in range(masks):
        if not getattr(crops.crops, "flip", False):
            yield mask
            continue
        index, seen = dataset.record(position).index, set()
        for epoch in range(mask, masks * LOOKED_AT, masks):
            mirrored = crops.crops.mirrored(index, epoch)
            if mirrored not in seen:
                seen.add(mirrored)
                yield epoch
            if len(seen) == 2:
                break


def needed_keys(datasets: Sequence[PixelDataset]) -> Iterator[bytes]:
    """The keys of all that some data sets would look up."""
    for number, dataset in enumerate(datasets):
        crops: CachedCrops = dataset.crops  # type: ignore[attr-defined]
        for _, position, epoch in _jobs(dataset, number, (0, 1)).tolist():
            with suppress(SampleError):  # a file that is gone needs nothing
                yield from crops.keys(dataset.record(position), epoch)[0].values()  # type: ignore[attr-defined]


def _part_of(dataset: Any, crops: CachedCrops, position: int, epoch: int) -> int:
    try:
        key = crops.keys(dataset.record(position), epoch)[0][LATENTS]
    except SampleError:
        return 0  # of a file that is gone somebody must say so
    return int.from_bytes(key[:8], "big")


def collate_missing(samples: Sequence[Sample]) -> Any:
    """Samples → a batch of those that are not there; `Passed` where all are."""
    passed, lacking = 0, []
    for sample in samples:
        cached = sample[CACHED]
        if len(cached.found) == len(cached.keys):
            passed += len(cached.keys)
        else:
            lacking.append(sample)
    if not lacking:
        return Passed(passed)
    batch = collate_samples(lacking)
    batch[CACHED].only, batch[CACHED].passed = True, passed
    return batch


class FillData(PixelDataModule):
    """Stands in for a data module of ours and predicts all that it would look up.

    Args:
        pixels: the data module.
        part: see `Jobs`.
    """

    def __init__(self, pixels: PixelDataModule, part: tuple[int, int] = (0, 1)) -> None:
        super().__init__(pixels.batch_size, pixels.num_workers, pixels.seed, "skip", 1.0)
        self.inner = pixels
        self.part = part

    def prepare_data(self) -> None:
        """Delegates."""
        self.inner.prepare_data()

    def setup(self, stage: str = "predict") -> None:
        """Delegates; UserError: the data come in a stream."""
        self.inner.setup(stage)
        self.train_set, self.val_set = self.inner.train_set, self.inner.val_set
        for dataset in (self.train_set, self.val_set):
            if isinstance(dataset, StreamImages):
                raise UserError(
                    f"{type(self.inner).__name__}: a stream has no list of its samples; it is cached as a training "
                    "reads it (cache=disk)"
                )

    def able(self) -> list[PixelDataset]:
        """The data sets that look up; UserError: none does."""
        sets = [dataset for dataset in (self.train_set, self.val_set) if dataset is not None]
        able = [part for dataset in sets for part in parts_of(dataset) if isinstance(_crops(part), CachedCrops)]
        if not able:
            raise UserError(f"{type(self.inner).__name__}: nothing of it can be cached; the warning says why")
        for dataset in able:
            crops: CachedCrops = dataset.crops  # type: ignore[attr-defined]
            crops.plan = replace(crops.plan, needs_pixels=False)  # nobody looks at what is there
        return able

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Everything that the data sets would look up."""
        self.predict_set = Jobs(self.able(), self.part)
        return self._loader(self.predict_set, training=False)

    def teardown(self, stage: str) -> None:
        """Says nothing: what could not be read is in the report."""


def _crops(dataset: PixelDataset) -> Any:
    return getattr(dataset, "crops", None)


class Fill(LightningModule):
    """A model that does nothing, for ``Trainer.predict``.

    Args:
        cache: that is filled.

    Attributes:
        totals: of all ranks, once it has ended: images encoded, ``hits``, ``misses``, ``failures``, ``dropped``.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache
        self.images = 0
        self.totals: dict[str, int] = {}

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Count; returns the images encoded."""
        if isinstance(batch, Passed):
            self.cache.hits += batch.entries
            return 0
        self.images += len(batch[LATENTS])
        return len(batch[LATENTS])

    def on_predict_end(self) -> None:
        """Write the last entries, and add up what all ranks did."""
        self.cache.flush()
        mine = self.cache.report() | {"images": self.images}
        counts = torch.tensor(list(mine.values()), dtype=torch.int64, device=self.device)
        added: Any = self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.totals = dict(zip(mine, added.tolist(), strict=True))
        self.trainer.strategy.barrier()
