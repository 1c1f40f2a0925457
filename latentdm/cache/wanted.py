"""Everything that a configuration would look up, once: of each image all variants, sides and masks, ahead of time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import lcm
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from latentdm.batch import LATENTS
from latentdm.cache.rows import CACHED
from latentdm.cache.samples import CAPTIONS, VARIANTS, CachedCrops
from latentdm.data.dataset import PixelDataset, Sample, collate
from latentdm.data.geometry import Record
from latentdm.data.samples import PhotographCrop
from latentdm.data.skips import SampleError, Skips
from latentdm.data.stream import StreamImages

ENDLESS = 2**31
"""Epochs of a stream, of which nobody knows how many samples it has."""

LOOKED_AT = 1000
"""Epochs among which one is looked for in which an image is mirrored, or is not: one in two is."""

Part = tuple[int, int]
"""Which part of all, and of how many: by key, so that parts of different runs fit together."""

WHOLE: Part = (0, 1)


def wanted_epochs(crops: CachedCrops, record: Record, part: Part = WHOLE) -> Iterator[int]:
    """Epochs that together show an image in all of its variants, mirrored and not, and under all of its masks."""
    for epoch in _epochs(crops, record):
        try:
            key = crops.keys(record, epoch)[0][LATENTS] if part != WHOLE else b""
        except SampleError:
            key = b""  # of a file that is gone the first part must say so
        if int.from_bytes(key[:8], "big") % part[1] == part[0]:
            yield epoch


def _epochs(crops: CachedCrops, record: Record) -> Iterator[int]:
    turns = _turns(crops)
    if crops.plan.variants is not None:
        first, an_epoch = crops.turn(record, 0), crops.turn(record, 1) - crops.turn(record, 0)
        if first < an_epoch:  # one more of a photograph in an epoch has the first turn of the next
            yield from range(-(-(turns - first) // an_epoch))
        return
    for mask in range(turns):
        if not getattr(crops.crops, "flip", False):
            yield mask
            continue
        seen = set()
        for epoch in range(mask, turns * LOOKED_AT, turns):
            mirrored = crops.crops.mirrored(record.index, epoch)
            if mirrored not in seen:
                seen.add(mirrored)
                yield epoch
            if len(seen) == 2:
                break


def _turns(crops: CachedCrops) -> int:
    plan = crops.plan
    return lcm(plan.variants or 1, plan.mask_variants if plan.masked == VARIANTS else 1)


def needed_keys(datasets: Sequence[Any]) -> Iterator[bytes]:
    """The keys of all that some data sets would look up."""
    for dataset in datasets:
        for record in _records(dataset):
            for epoch in wanted_epochs(dataset.crops, record):
                with suppress(SampleError):  # a file that is gone needs nothing
                    yield from dataset.crops.keys(record, epoch)[0].values()


def _records(dataset: Any) -> Iterator[Record]:
    """All that can be read."""
    if isinstance(dataset, StreamImages):
        yield from (record for record in dataset.items(0, 1, 0, False) if isinstance(record, Record))
        return
    for position in range(len(dataset)):
        with suppress(SampleError):
            yield dataset.record(position)


class Passed:
    """A batch of which everything was found. It is no batch of images, and passes the data module as it is.

    Args:
        entries: their number.
        captions: of its images.
    """

    def __init__(self, entries: int, captions: list[list[Any]]) -> None:
        self.entries = entries
        self.captions = captions


class Jobs(PixelDataset):
    """Everything that some data sets would look up, once.

    Args:
        datasets: whose crops look up, and whose samples can be had by position.
        part: see `Part`.

    Attributes:
        rows: ``n 3``: number of the data set, position and epoch.
    """

    def __init__(self, datasets: Sequence[Any], part: Part = WHOLE) -> None:
        self.datasets = datasets
        rows: list[tuple[int, int, int]] = []
        for number, dataset in enumerate(datasets):
            each = tqdm(range(len(dataset)), "listing", leave=False, delay=2)
            jobs = [(number, position, epoch) for position in each for epoch in _epochs_at(dataset, position, part)]
            rows += sorted(jobs, key=itemgetter(2))  # one epoch after another
        self.rows: npt.NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 3)
        buckets = [dataset.bucket_of for dataset in datasets]
        if any(bucket is not None for bucket in buckets):
            of_rows = (0 if buckets[number] is None else buckets[number][position] for number, position, _ in rows)
            self.bucket_of = np.fromiter(of_rows, np.int32, len(rows))
        self.collate = collate_missing

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


def _epochs_at(dataset: Any, position: int, part: Part) -> Iterable[int]:
    """The `wanted_epochs` of a sample."""
    crops: CachedCrops = dataset.crops
    photograph = isinstance(crops.crops, PhotographCrop)
    flips = crops.plan.variants is None and getattr(crops.crops, "flip", False)
    if part == WHOLE and not photograph and not flips:  # whatever the record, which may take long to read
        return range(_turns(crops))
    try:
        return wanted_epochs(crops, dataset.record(position), part)
    except SampleError:
        return [0] if part[0] == 0 else []  # somebody must say so


class StreamJobs(IterableDataset[Sample]):
    """Everything that some streams would look up, once; ranks and workers share it.

    Args:
        streams: whose crops look up.
        part: see `Part`.
        rank: of this process.
        ranks: how many there are.

    Attributes:
        skips: where samples that cannot be read are written down; None: they are left out.
    """

    skips: Skips | None = None

    def __init__(self, streams: Sequence[StreamImages], part: Part = WHOLE, rank: int = 0, ranks: int = 1) -> None:
        self.streams = list(streams)
        self.part = part
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[Sample]:
        """The samples of this rank and worker."""
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        number = self.rank * workers + (0 if worker is None else worker.id)
        for stream in self.streams:
            readers = max(min(self.ranks * workers, stream.items.files), 1)  # each has a file of its own
            if number >= readers:
                continue
            for record in stream.items(number, readers, 0, False):
                try:
                    if isinstance(record, SampleError):
                        raise record
                    crops: Any = stream.crops
                    yield from (crops(record, epoch) for epoch in wanted_epochs(crops, record, self.part))
                except SampleError as error:
                    if self.skips is not None:
                        self.skips.add(getattr(record, "name", str(error)), str(error), ENDLESS)


def collate_missing(samples: Sequence[Sample]) -> Any:
    """Samples → a batch of those that are not there; `Passed` where all are."""
    passed, lacking = 0, []
    captions = [sample.pop(CAPTIONS, []) for sample in samples]
    for sample in samples:
        cached = sample[CACHED]
        if len(cached.found) == len(cached.keys):
            passed += len(cached.keys)
        else:
            lacking.append(sample)
    if not lacking:
        return Passed(passed, captions)
    batch = collate(lacking)
    batch[CACHED].only, batch[CACHED].passed = True, passed
    return batch | ({CAPTIONS: captions} if any(captions) else {})
