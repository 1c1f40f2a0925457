"""What a data set would look up: of each image all variants, sides and masks, and all that may come of its captions."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import lcm
from typing import Any

from latentdm.batch import CAPTION, LATENTS
from latentdm.cache.samples import VARIANTS, CachedCrops
from latentdm.captions import Captions
from latentdm.data.geometry import Record
from latentdm.data.samples import PhotographCrop
from latentdm.data.skips import SampleError
from latentdm.data.stream import StreamImages
from latentdm.draws import Draws
from latentdm.stages import Stage

LOOKED_AT = 1000
"""Epochs among which one is looked for in which an image is mirrored, or is not: one in two is."""

Part = tuple[int, int]
"""Which part of all, and of how many: by key, so that parts of different runs fit together."""


def wanted_epochs(crops: CachedCrops, record: Record) -> Iterator[int]:
    """Epochs that together show an image in all of its variants, mirrored and not, and under all of its masks."""
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


def epochs_of(dataset: Any, position: int, part: Part = (0, 1)) -> Iterator[int]:
    """The same of a sample at a position, and of a part of all."""
    crops: CachedCrops = dataset.crops
    photograph = isinstance(crops.crops, PhotographCrop)
    flips = crops.plan.variants is None and getattr(crops.crops, "flip", False)
    if part[1] == 1 and not photograph and not flips:  # whatever the record, which may take long to read
        yield from range(_turns(crops))
        return
    try:
        record = dataset.record(position)
    except SampleError:
        yield from [0] if part[0] == 0 else []  # somebody must say so
        return
    yield from (epoch for epoch in wanted_epochs(crops, record) if is_in(part, crops, record, epoch))


def is_in(part: Part, crops: CachedCrops, record: Record, epoch: int) -> bool:
    """Whether an image, as it is in an epoch, belongs to a part."""
    if part[1] == 1:
        return True
    try:
        key = crops.keys(record, epoch)[0][LATENTS]
    except SampleError:
        return part[0] == 0  # of a file that is gone somebody must say so
    return int.from_bytes(key[:8], "big") % part[1] == part[0]


def needed_keys(datasets: Sequence[Any]) -> Iterator[bytes]:
    """The keys of all that some data sets would look up."""
    for dataset in datasets:
        if isinstance(dataset, StreamImages):
            for record in dataset.items(0, 1, 0, False):
                if isinstance(record, Record):
                    crops: Any = dataset.crops
                    yield from _keys(crops, record, wanted_epochs(crops, record))
            continue
        for position in range(len(dataset)):
            with suppress(SampleError):
                yield from _keys(dataset.crops, dataset.record(position), epochs_of(dataset, position))


def _keys(crops: Any, record: Record, epochs: Iterator[int]) -> Iterator[bytes]:
    for epoch in epochs:
        with suppress(SampleError):  # a file that is gone needs nothing
            yield from crops.keys(record, epoch)[0].values()


def possible_captions(stage: Stage | None, caption: Any) -> list[str]:
    """All that training may make of a caption; of shuffled tags their own order, of foreign stages what comes first.

    Args:
        stage: of the data module.
        caption: of an image: a text, several, or None.
    """
    if stage is None:
        return list(caption) if isinstance(caption, list | tuple) else [caption or ""]
    if isinstance(stage, Captions):
        return stage.possible(caption)
    made: list[str] = stage({CAPTION: [caption]}, Draws(0, 0, [0], training=False))[CAPTION]
    return made
