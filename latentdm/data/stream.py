"""Samples that come in a stream, as from tar shards or a hub: split over ranks and workers, in epochs of a set length.

The sampler still counts places, so that batches, epochs and ranks work as everywhere else; a place only says "the next
one". Nobody needs to know how many samples a shard holds, and no rank can run out before the others.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import TypeVar

from torch.utils.data import get_worker_info

from latentdm.data.base import PixelDataset, Sample
from latentdm.data.skips import SampleError
from latentdm.data.squares import Record, Squares
from latentdm.draws import sample_seed
from latentdm.errors import UserError

T = TypeVar("T")

EMPTY_TURNS = 10
"""Passes in a row without a sample after which a stream counts as empty; a part may meet an empty shard in one."""

Item = Record | SampleError


class StreamImages(PixelDataset):
    """The images of a stream. A stream that ends is read again.

    Args:
        squares: makes samples of them.
        length: samples an epoch, on all ranks together; rounded up to a multiple of their number.
        training: go on with other samples in each epoch, and shuffle; otherwise an epoch begins at the beginning.
        shuffle_buffer: records that are held by each worker, and drawn from at random; 0: the stream's own order.
        seed: the order follows from it.
    """

    ordered = True

    def __init__(self, squares: Squares, length: int, training: bool, shuffle_buffer: int, seed: int) -> None:
        self.squares = squares
        self.length = length
        self.training = training
        self.shuffle_buffer = shuffle_buffer if training else 0
        self.seed = seed
        self.rank, self.ranks, self.workers = 0, 1, 1
        self._items: Iterator[Item] | None = None
        self._last = (-1, -1)
        self._again = False
        self._name = ""

    @abstractmethod
    def items(self, part: int, parts: int, turn: int) -> Iterator[Item]:
        """One pass over a part of the stream.

        Args:
            part: 0…parts − 1: this worker of this rank.
            parts: workers on all ranks together; among them they see every sample once.
            turn: distinguishes passes, alike on all workers; what is shuffled follows from it and the seed.
        """

    def distribute(self, rank: int, ranks: int, workers: int) -> None:
        """Tell where this copy runs."""
        self.rank, self.ranks, self.workers = rank, ranks, max(workers, 1)
        self.length = -(-self.length // ranks) * ranks

    def __len__(self) -> int:
        """Samples an epoch."""
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_items": None}

    def name(self, place: int) -> str:
        """The sample that was read last."""
        return self._name

    def replacement(self, place: int, epoch: int, attempt: int) -> int:
        """The next one of the stream."""
        self._again = True
        return place

    def passes(self, epoch: int) -> int:
        """Each training epoch may see new samples."""
        return epoch + 1

    def sample(self, place: int, epoch: int) -> Sample:
        """The next sample; the first of the epoch where ``place`` does not go on from the last one.

        Raises:
            SampleError: it cannot be read.
        """
        if self._items is None or (not self._again and (epoch, place) <= self._last) or epoch != self._last[0]:
            self._items = self._endless(epoch)
        self._last, self._again = (epoch, place), False
        item = next(self._items)
        if isinstance(item, SampleError):
            self._name = str(item)
            raise item
        self._name = item.name
        return self.squares(item, epoch)

    def _endless(self, epoch: int) -> Iterator[Item]:
        info = get_worker_info()
        part = self.rank * self.workers + (info.id if info else 0)
        random = Random(sample_seed(self.seed, epoch, part, "stream"))
        return self._repeated(part, epoch, random)

    def _repeated(self, part: int, epoch: int, random: Random) -> Iterator[Item]:
        turn = empty = 0
        while True:
            empty += 1
            items = self.items(part, self.ranks * self.workers, sample_seed(self.seed, epoch, turn, "turn"))
            for item in shuffled(items, self.shuffle_buffer, random):
                empty = 0
                yield item
            if empty == EMPTY_TURNS:
                raise UserError(
                    f"{self.squares.owner}: part {part} of {self.ranks * self.workers} of the stream is empty; "
                    "use fewer workers or more samples"
                )
            turn += 1


def shuffled(items: Iterator[T], buffer: int, random: Random) -> Iterator[T]:
    """A stream with its items drawn from a buffer, each once; at 0 as they come."""
    held = list(islice(items, buffer))
    for item in items:
        place = random.randrange(buffer) if buffer else 0
        held.append(item)
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()
    random.shuffle(held)
    yield from held


def own_share(shards: Sequence[str], read: Callable[[str], Iterator[T]], part: int, parts: int) -> Iterator[T]:
    """What one part reads: its own shards where there are enough for all, else every n-th sample of them all."""
    if len(shards) >= parts:
        return (sample for shard in shards[part::parts] for sample in read(shard))
    return islice((sample for shard in shards for sample in read(shard)), part, None, parts)


def stable_index(key: str | bytes) -> int:
    """An ``index`` of 63 bits, for samples that have a name or a content but no number."""
    content = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1
