"""Samples that come in a stream, as from tar shards or a hub: dealt from parts, in epochs of a set length.

A stream is read in parts, whose number has nothing to do with that of ranks or workers: so the samples of a step do not
either. A position says which part's how-manieth sample is meant (`latentdm.data.layout.Dealt`); whoever asks for it
reads that part up to there, and what lies between is passed over undecoded. Nobody needs to know how many samples a
shard holds, and no rank can run out before the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import Any, Protocol, TypeVar

from lightning.pytorch.utilities import rank_zero_info

from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.decode import ImageFile
from latentdm.data.geometry import Record, ResizeCrop
from latentdm.data.module import PictureDataModule
from latentdm.data.skips import SampleError
from latentdm.draws import sample_seed
from latentdm.errors import UserError
from latentdm.validation import Check

T = TypeVar("T")

MAX_EMPTY_PASSES = 10
"""Passes in a row without a sample after which a stream counts as empty; a part may meet an empty shard in one."""

FILES_A_PART = 8
"""The fewest files of a part: parts see equally many samples, so uneven ones repeat some before others are through."""

Item = Record | SampleError


class Items(Protocol):
    """The records of a stream."""

    @property
    def files(self) -> int:
        """How many shards or files it has."""

    def __call__(self, part: int, parts: int, turn: int, shuffle: bool) -> Iterator[Item]:
        """One pass over a part of the stream; the parts among them see every sample once.

        Args:
            part: 0…parts − 1.
            parts: how many there are.
            turn: distinguishes passes, alike for all parts; what is shuffled follows from it.
            shuffle: the files, anew in each pass.
        """


class Part:
    """The samples of one part in one epoch, which can be read forward alone.

    Args:
        items: all of them.

    Attributes:
        first: the number that was asked for last, apart from replacements.
        number: that of the sample read last. Those from ``first`` on cannot be read, and it stands for them.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self.first, self.number = 0, -1
        self._items = items
        self._last: Item

    def item(self, number: int, first: int) -> Item:
        """A sample by its number, which may be that of one that replaces ``first``."""
        self.first = first
        while self.number < number:
            self._last = next(self._items)
            self.number += 1
        return self._last


@dataclass(eq=False)
class StreamImages(PixelDataset):
    """The images of a stream. A stream that ends is read again.

    Attributes:
        items: gives the records.
        crops: makes samples of them.
        length: samples an epoch, on all ranks together.
        training: go on with other samples in each epoch, and shuffle; otherwise an epoch begins at the beginning.
        shuffle_buffer: records of each part that are held, and drawn from at random; 0: the stream's own order.
        seed: the order follows from it.
        parts: in how many the stream is read.
        owner: the class that an error names; None: this one.
    """

    items: Items
    crops: ResizeCrop
    length: int
    training: bool
    shuffle_buffer: int
    seed: int
    parts: int = 1
    owner: str | None = None
    _epoch: int = field(default=0, init=False)
    _read: dict[int, Part] = field(default_factory=dict, init=False)
    _replaced: int | None = field(default=None, init=False)
    _name: str = field(default="", init=False)

    def __len__(self) -> int:
        """Samples an epoch."""
        return self.length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_read": {}}

    def name(self, position: int) -> str:
        """The sample that was read last."""
        return self._name

    def replacement(self, position: int, epoch: int, attempt: int) -> int:
        """The position of the part's next sample; which comes again in its own turn."""
        self._replaced = position
        return position + (attempt + 1) * self.parts

    def sample(self, position: int, epoch: int) -> Sample:
        """The sample of a part: ``position`` is ``number · parts + part``.

        Raises:
            SampleError: it cannot be read.
        """
        number, part = divmod(position, self.parts)
        first, self._replaced = number if self._replaced is None else self._replaced // self.parts, None
        if epoch != self._epoch:
            self._epoch, self._read = epoch, {}
        read = self._read.get(part)
        if read is None or first < read.first:
            read = self._read[part] = Part(self._endless(part, epoch))
        item = read.item(number, first)
        if isinstance(item, SampleError):
            self._name = str(item)
            raise item
        self._name = item.name
        return self.crops(item, epoch)

    def _endless(self, part: int, epoch: int) -> Iterator[Item]:
        random = Random(sample_seed(self.seed, epoch, part, "stream"))
        turn = empty = 0
        while empty < MAX_EMPTY_PASSES:
            empty += 1
            items = self.items(part, self.parts, sample_seed(self.seed, epoch, turn, "turn"), self.training)
            for item in shuffled(items, self.shuffle_buffer, random):
                empty = 0
                yield item
            turn += 1
        if not self.training:
            raise UserError("the validation data hold no sample; give them some, or leave validation out")
        raise UserError(f"part {part} of {self.parts} of the stream is empty; set fewer parts, or give more samples")


class StreamDataModule(PictureDataModule):
    """The base of the data modules that may read a stream.

    Args:
        epoch_length: training images an epoch of a stream, on all devices together.
        val_length: validation images of a stream.
        shuffle_buffer: images of a stream that are held, as files, over all its parts, and drawn from.
        parts: in how many a stream is read at most, whatever the ranks and workers; the order follows from it. With
            less than eight files a part there are fewer.
        settings: of `PictureDataModule`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, epoch_length: int, val_length: int, shuffle_buffer: int, parts: int, **settings: Any) -> None:
        super().__init__(**settings)
        check = Check(type(self).__name__)
        self.epoch_length = check.integer("epoch_length", epoch_length, 1)
        self.val_length = check.integer("val_length", val_length, 1)
        self.shuffle_buffer = check.integer("shuffle_buffer", shuffle_buffer, 0)
        self.parts = check.integer("parts", parts, 1)

    def stream(self, items: Items, training: bool) -> StreamImages:
        """The dataset of a stream of records."""
        owner, crops = type(self).__name__, self.crops(training)
        if not training:
            return StreamImages(items, crops, self.val_length, training, 0, self.seed, owner=owner)
        length, parts = self.epoch_length, usable_parts(items.files, self.parts)
        rank_zero_info(f"{owner}: an epoch is epoch_length={length} images, however many the stream holds")
        return StreamImages(items, crops, length, training, -(-self.shuffle_buffer // parts), self.seed, parts, owner)


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


def usable_parts(files: int, most: int) -> int:
    """In how many parts so many files are read: halved until each has `FILES_A_PART`, and one at least."""
    parts = most
    while parts > 1 and parts * FILES_A_PART > files:
        parts //= 2
    return parts


def own_share(shards: Sequence[str], read: Callable[[str], Iterator[T]], part: int, parts: int) -> Iterator[T]:
    """What one part reads: its own shards if there are enough for all, else every n-th sample of them all."""
    if len(shards) >= parts:
        return (sample for shard in shards[part::parts] for sample in read(shard))
    return islice((sample for shard in shards for sample in read(shard)), part, None, parts)


def stable_index(key: str | ImageFile) -> int:
    """An ``index`` of 63 bits, for samples that have a name or a content but no number."""
    content = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1
