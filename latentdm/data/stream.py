"""Samples that come in a stream, as from tar shards or a hub: split over ranks and workers, in epochs of a set length.

The sampler still counts positions, so that batches, epochs and ranks work as everywhere else; a position only means
"the next one". Nobody needs to know how many samples a shard holds, and no rank can run out before the others.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import get_worker_info

from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.geometry import Record, ResizeCrop
from latentdm.data.module import PictureDataModule
from latentdm.data.skips import SampleError
from latentdm.draws import sample_seed
from latentdm.errors import UserError
from latentdm.validation import Check

T = TypeVar("T")

MAX_EMPTY_PASSES = 10
"""Passes in a row without a sample after which a stream counts as empty; a part may meet an empty shard in one."""

Item = Record | SampleError

Items = Callable[[int, int, int, bool], Iterator[Item]]
"""``items(part, parts, turn, shuffle)``: one pass over a part of a stream.

The part is 0…parts − 1: this worker of this rank; ``parts`` are the workers on all ranks together, which among them see
every sample once. ``turn`` distinguishes passes, alike on all workers; what is shuffled follows from it and the seed.
"""


class StreamImages(PixelDataset):
    """The images of a stream. A stream that ends is read again.

    Args:
        owner: the class that an error names.
        items: gives the records.
        crops: makes samples of them.
        length: samples an epoch, on all ranks together; rounded up to a multiple of their number.
        training: go on with other samples in each epoch, and shuffle; otherwise an epoch begins at the beginning.
        shuffle_buffer: records that are held by each worker, and drawn from at random; 0: the stream's own order.
        seed: the order follows from it.
    """

    ordered = True

    def __init__(
        self, owner: str, items: Items, crops: ResizeCrop, length: int, training: bool, shuffle_buffer: int, seed: int
    ) -> None:
        self.owner = owner
        self.items = items
        self.crops = crops
        self.length = length
        self.training = training
        self.shuffle_buffer = shuffle_buffer if training else 0
        self.seed = seed
        self.rank, self.ranks, self.workers = 0, 1, 1
        self._items: Iterator[Item] | None = None
        self._last = (-1, -1)
        self._again = False
        self._name = ""

    def distribute(self, rank: int, ranks: int, workers: int) -> None:
        """Keep which part this copy reads."""
        self.rank, self.ranks, self.workers = rank, ranks, max(workers, 1)
        self.length = -(-self.length // ranks) * ranks

    def __len__(self) -> int:
        """Samples an epoch."""
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_items": None}

    def name(self, position: int) -> str:
        """The sample that was read last."""
        return self._name

    def replacement(self, position: int, epoch: int, attempt: int) -> int:
        """The next one of the stream."""
        self._again = True
        return position

    def new_epochs(self, epoch: int) -> int:
        """Each training epoch may see new samples."""
        return epoch + 1

    def sample(self, position: int, epoch: int) -> Sample:
        """The next sample; the first of the epoch where ``position`` does not go on from the last one.

        Raises:
            SampleError: it cannot be read.
        """
        if self._items is None or (not self._again and (epoch, position) <= self._last) or epoch != self._last[0]:
            self._items = self._endless(epoch)
        self._last, self._again = (epoch, position), False
        item = next(self._items)
        if isinstance(item, SampleError):
            self._name = str(item)
            raise item
        self._name = item.name
        return self.crops(item, epoch)

    def _endless(self, epoch: int) -> Iterator[Item]:
        info = get_worker_info()
        part, parts = self.rank * self.workers + (info.id if info else 0), self.ranks * self.workers
        random = Random(sample_seed(self.seed, epoch, part, "stream"))
        turn = empty = 0
        while empty < MAX_EMPTY_PASSES:
            if empty and not self.training:
                part, parts = 0, 1  # fewer samples than parts: validation repeats some anyway
            empty += 1
            items = self.items(part, parts, sample_seed(self.seed, epoch, turn, "turn"), self.training)
            for item in shuffled(items, self.shuffle_buffer, random):
                empty = 0
                yield item
            turn += 1
        if not self.training:
            raise UserError("the validation data hold no sample; give them some, or leave validation out")
        raise UserError(f"part {part} of {parts} of the training stream is empty; use fewer workers or more samples")


class StreamDataModule(PictureDataModule):
    """The base of the data modules that may read a stream.

    Args:
        epoch_length: training images an epoch of a stream, on all devices together.
        val_length: validation images of a stream.
        shuffle_buffer: images of a stream that each worker holds, as files, and draws from.
        settings: of `PictureDataModule`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, epoch_length: int, val_length: int, shuffle_buffer: int, **settings: Any) -> None:
        super().__init__(**settings)
        check = Check(type(self).__name__)
        self.epoch_length = check.integer("epoch_length", epoch_length, 1)
        self.val_length = check.integer("val_length", val_length, 1)
        self.shuffle_buffer = check.integer("shuffle_buffer", shuffle_buffer, 0)

    def stream(self, items: Items, training: bool) -> StreamImages:
        """The dataset of a stream of records."""
        length = self.epoch_length if training else self.val_length
        owner, crops = type(self).__name__, self.crops(training)
        if training:
            rank_zero_info(f"{owner}: an epoch is epoch_length={length} images, however many the stream holds")
        return StreamImages(owner, items, crops, length, training, self.shuffle_buffer, self.seed)


def shuffled(items: Iterator[T], buffer: int, random: Random) -> Iterator[T]:
    """A stream with its items drawn from a buffer, each once; at 0 as they come."""
    held = list(islice(items, buffer))
    for item in items:
        drawn = random.randrange(buffer) if buffer else 0
        held.append(item)
        held[drawn], held[-1] = held[-1], held[drawn]
        yield held.pop()
    random.shuffle(held)
    yield from held


def own_share(shards: Sequence[str], read: Callable[[str], Iterator[T]], part: int, parts: int) -> Iterator[T]:
    """What one part reads: its own shards if there are enough for all, else every n-th sample of them all."""
    if len(shards) >= parts:
        return (sample for shard in shards[part::parts] for sample in read(shard))
    return islice((sample for shard in shards for sample in read(shard)), part, None, parts)


def stable_index(key: str | bytes) -> int:
    """An ``index`` of 63 bits, for samples that have a name or a content but no number."""
    content = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1
