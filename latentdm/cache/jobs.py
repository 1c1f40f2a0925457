"""Ahead of time: everything that a configuration would look up, once, as data to predict."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from latentdm.cache.rows import CACHED
from latentdm.cache.samples import CAPTIONS
from latentdm.cache.wanted import WHOLE, Part, epochs_of, wanted_epochs
from latentdm.data.dataset import PixelDataset, Sample, collate
from latentdm.data.skips import SampleError, Skips
from latentdm.data.stream import StreamImages

ENDLESS = 2**31
"""Epochs of a stream, of which nobody knows how many samples it has."""


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
    """

    def __init__(self, datasets: Sequence[PixelDataset], part: Part = WHOLE) -> None:
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


def _jobs(dataset: Any, number: int, part: Part) -> npt.NDArray[np.int64]:
    """``n 3``: number, position and epoch of all that a data set would look up."""
    jobs: list[tuple[int, int, int]] = []
    for position in tqdm(range(len(dataset)), "listing", leave=False, delay=2):
        jobs += [(number, position, epoch) for epoch in epochs_of(dataset, position, part)]
    return np.array(sorted(jobs, key=itemgetter(2)), np.int64).reshape(-1, 3)  # one epoch after another


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
