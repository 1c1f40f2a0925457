"""A data set's samples with the cache in front: what is found is read before an image is opened.

Shapes: ``H W`` pixels. This runs in the loader's workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from latentdm.batch import (
    CROP_TOP_LEFT,
    LATENTS,
    MASK,
    MASKED_LATENTS,
    ORIGINAL_SIZE,
    PIXELS,
    SOURCE,
    SOURCE_LATENTS,
    TARGET_SIZE,
)
from latentdm.cache.keys import described, identity, key_of
from latentdm.cache.rows import CACHED, NO_SIZES, SIZES, CachedSample, collate_cached, unpacked
from latentdm.cache.store import Entry, Store
from latentdm.data.dataset import Joined, PixelDataset, Sample, collate
from latentdm.data.decode import read_size
from latentdm.data.geometry import COMPANIONS, Record, ResizeCrop, square
from latentdm.data.samples import PhotographCrop

OWN, FIXED, VARIANTS = "own", "fixed", "variants"
"""Which masked images have entries: those under a data set's own masks; under masks that follow from the image; and
under one of some masks that are drawn for each image."""


CAPTIONS = "all_captions"
"""Of a sample that is encoded ahead of time: all captions of its image."""

COMPANIONS_OF_ENTRIES = (MASK, SOURCE)

DRAWN = ("target", "seed", "flip", "training")
"""Settings of a `ResizeCrop` that a key holds by what they come to: a size, a draw. The last is about captions."""


@dataclass(frozen=True)
class Plan:
    """How the samples of one data set are looked up.

    Attributes:
        store: where.
        identity: of files: see `latentdm.cache.keys.identity`.
        multiple: what the encoder crops to.
        variants: how many crops an image has, where crops are drawn; None: they are not.
        augment: what augments on the device in training, as JSON.
        masked: `OWN`, `FIXED` or `VARIANTS`; None: masked images have no entries.
        mask: the mask source and the encoder's mask settings, as JSON.
        mask_variants: how many masks an image has under `VARIANTS`.
        reads_mask: the mask source reads the data set's own masks.
        source: the encoder makes ``source_latents`` of a ``source``.
        needs_pixels: someone looks at the images, found or not.
        seed: of the data module.
        training: whether the samples are drawn as in training.
        caption: the column of captions, where each image is to bring all of its own; None: it brings the drawn one.
    """

    store: Store
    identity: str
    multiple: int
    variants: int | None = None
    augment: Any = None
    masked: str | None = None
    mask: Any = None
    mask_variants: int = 1
    reads_mask: bool = False
    source: bool = False
    needs_pixels: bool = False
    seed: int = 0
    training: bool = False
    caption: str | None = None


def draws_freely(dataset: PixelDataset) -> bool:
    """Whether a data set draws crops anew each epoch, beside mirroring."""
    crops = getattr(dataset, "crops", None)
    crops = crops.crops if isinstance(crops, CachedCrops) else crops
    return crops.split == "train" if isinstance(crops, PhotographCrop) else bool(getattr(crops, "random_crop", False))


def can_look_up(dataset: PixelDataset) -> bool:
    """Whether it is one of ours, all of whose samples are made of records by what is known."""
    crops = getattr(dataset, "crops", None)
    ours = type(dataset).sample.__module__.startswith("latentdm.data.")
    return ours and isinstance(crops, ResizeCrop | PhotographCrop | CachedCrops)


def parts_of(dataset: PixelDataset) -> Sequence[PixelDataset]:
    """The data sets that a joined one consists of; itself alone otherwise."""
    return dataset.joined if isinstance(dataset, Joined) else [dataset]


def look_up(dataset: PixelDataset, plan: Plan | None) -> None:
    """Let a data set look its samples up, or with None no longer."""
    for part in parts_of(dataset):
        crops: Any = part.crops  # type: ignore[attr-defined]
        plain = crops.crops if isinstance(crops, CachedCrops) else crops
        part.crops = plain if plan is None else CachedCrops(plain, plan)  # type: ignore[attr-defined]
    dataset.collate = collate if plan is None else collate_samples


def collate_samples(samples: Sequence[Sample]) -> Sample:
    """Samples, found or read, → a batch."""
    return collate_cached(samples, collate)


@dataclass
class CachedCrops:
    """Makes a sample of a record: from the cache if all of it is there, else as ``crops`` does.

    Attributes:
        crops: decodes, resizes, crops and mirrors.
        plan: how to look it up.
    """

    crops: Any
    plan: Plan
    _epoch: int = -1

    def __call__(self, record: Record, epoch: int) -> Sample:
        """The sample, with a `CachedSample` under ``cached``; without images where it was found and nobody needs them.

        Raises:
            SampleError: it is not there, and cannot be read.
        """
        plan, store = self.plan, self.plan.store
        if epoch != self._epoch:
            self._epoch = epoch
            store.refresh()
        captions = {}
        if plan.caption is not None and epoch == 0:
            captions = {CAPTIONS: [columns.get(plan.caption) for columns in record.rows]}
        if len(record.rows) > 1:  # a caption is drawn in the true epoch, whatever crop comes with it
            record = replace(record, rows=[record.drawn(self.crops.seed, epoch, self.crops.training)])
        keys, drawn, drawn_epoch = self.keys(record, epoch)
        failed = store.failures
        entries = {name: store.read(key) for name, key in keys.items()}
        found: dict[str, Entry] = {name: entry for name, entry in entries.items() if entry is not None}
        cached = CachedSample(keys, found, NO_SIZES, failures=store.failures - failed, training=plan.training)
        turn = self.turn(record, epoch)
        if plan.variants is not None:
            cached.variant = turn % plan.variants
        if plan.masked == VARIANTS:
            cached.mask_variant = turn % plan.mask_variants
        if len(found) == len(keys) and not plan.needs_pixels and not _needs_more(record):
            return self._from(found, record, cached) | captions | {CACHED: cached}
        sample: Sample = self.crops(drawn, drawn_epoch)
        sample["index"] = record.index
        cached.sizes = _sizes(sample)
        return sample | captions | {CACHED: cached}

    def turn(self, record: Record, epoch: int) -> int:
        """Which variant it is the turn of: how often an image has come before, as of a photograph in one epoch."""
        if self.plan.variants is None or not isinstance(self.crops, PhotographCrop):
            return epoch
        return epoch * self.crops.an_epoch + self.crops.again(record)[0]

    def keys(self, record: Record, epoch: int) -> tuple[dict[str, bytes], Record, int]:
        """Output → the key of its entry; and the record and the epoch that the crop is drawn from.

        Raises:
            SampleError: a file is gone.
        """
        plan, crops, turn = self.plan, self.crops, self.turn(record, epoch)
        image = identity(record.image, plan.identity)
        drawn: list[Any] = []
        if plan.variants is not None:
            epoch = turn % plan.variants
            drawn = ["drawn", crops.seed, epoch, plan.augment, plan.seed if plan.augment else None]
            # Not from the index, which is a place among names: another image would move it, and all that is drawn.
            photograph = isinstance(crops, PhotographCrop)
            index = crops.again(record)[1] if photograph else int.from_bytes(key_of(image)[:8], "big") >> 1
            record = replace(record, index=index)
        elif isinstance(crops, ResizeCrop):
            drawn = ["mirrored", crops.mirrored(record.index, epoch)]
        recipe = [_recipe(crops, record), plan.multiple, *([drawn] if drawn else ())]
        clean = key_of(image, recipe)
        keys, shown = {LATENTS: clean}, clean
        if record.source is not None:
            shown = key_of(clean, "source", identity(record.source, plan.identity))
            if plan.source:
                keys[SOURCE_LATENTS] = shown
        if plan.masked is not None and (plan.masked != OWN or record.mask is not None):
            parts: list[Any] = [plan.masked, plan.mask]
            if record.mask is not None and (plan.masked == OWN or plan.reads_mask):
                parts.append(identity(record.mask, plan.identity))
            if plan.masked == VARIANTS:
                parts += [plan.seed, turn % plan.mask_variants, plan.training]
            keys[MASKED_LATENTS] = key_of(shown, "masked", parts)
        return keys, record, epoch

    def _from(self, found: dict[str, Entry], record: Record, cached: CachedSample) -> Sample:
        """A sample without images."""
        cached.sizes = tuple(found[LATENTS][SIZES].tolist())
        *original, top, left, height, width = cached.sizes
        sample: Sample = {name: value for name, value in record.rows[0].items() if name not in COMPANIONS}
        sample |= {"index": record.index, "name": record.name}
        if top >= 0:
            sizes = {ORIGINAL_SIZE: original, CROP_TOP_LEFT: [top, left], TARGET_SIZE: [height, width]}
            sample |= {name: torch.tensor(size) for name, size in sizes.items()}
        if self.plan.masked == OWN and MASKED_LATENTS in found:
            entry = found[MASKED_LATENTS]
            sample[MASK] = unpacked(entry[MASK], width)
            found[MASKED_LATENTS] = {name: value for name, value in entry.items() if name != MASK}
        return sample


def _needs_more(record: Record) -> bool:
    """Whether a sample has pictures beside those that an entry stands for."""
    known = {"name", "index", "image", "rows", "target", *COMPANIONS_OF_ENTRIES}
    return any(getattr(record, each.name) is not None for each in fields(record) if each.name not in known)


def _recipe(crops: Any, record: Record) -> list[Any]:
    """What makes pixels of a file, beside what is drawn."""
    if isinstance(crops, PhotographCrop):
        return ["photograph", crops.split, crops.size, record.index - crops.first_index, crops.seed]
    assert isinstance(crops, ResizeCrop)
    target: Any = crops.target
    side = getattr(target, "args", (None,))[0]
    if record.target is not None:
        size = list(record.target)
    elif isinstance(side, int) and target.func is square(side).func:  # type: ignore[attr-defined]
        size = [side, side]
    else:  # a bucket: which one it is follows from the head of the file
        size = list(target(*read_size(record.image, record.name)))
    # All of its settings, whatever comes to be among them; what is drawn has a place of its own.
    settings = {each.name: getattr(crops, each.name) for each in fields(crops) if each.name not in DRAWN}
    return ["resize", size, described(settings, "ResizeCrop")]


def _sizes(sample: Sample) -> tuple[int, ...]:
    height, width = sample[PIXELS].shape[-2:]
    if ORIGINAL_SIZE not in sample:
        return (*NO_SIZES, height, width)
    return (*sample[ORIGINAL_SIZE].tolist(), *sample[CROP_TOP_LEFT].tolist(), height, width)
