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


def epochs_of(dataset: Any, position: int, part: Part = WHOLE) -> Iterator[int]:
    """The same of a sample at a position."""
    crops: CachedCrops = dataset.crops
    photograph = isinstance(crops.crops, PhotographCrop)
    flips = crops.plan.variants is None and getattr(crops.crops, "flip", False)
    if part == WHOLE and not photograph and not flips:  # whatever the record, which may take long to read
        yield from range(_turns(crops))
        return
    try:
        yield from wanted_epochs(crops, dataset.record(position), part)
    except SampleError:
        yield from [0] if part[0] == 0 else []  # somebody must say so


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
