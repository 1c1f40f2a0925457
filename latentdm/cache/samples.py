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
from latentdm.cache.rows import CACHED, NO_SIZES, SIZES, CachedSample, unpacked
from latentdm.cache.store import Store
from latentdm.data.dataset import Joined, PixelDataset, Sample
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

    def keys(self, clean: bytes, source: Sequence[Any] | None, masks: Sequence[Any] | None) -> dict[str, bytes]:
        """Output → the key of its entry.

        Args:
            clean: that of the image.
            source: what tells its source from every other; None: it has none.
            masks: what tells its mask from every other; None: the masked image has no entry.
        """
        keys, shown = {LATENTS: clean}, clean
        if source is not None:
            shown = key_of(clean, "source", *source)
            if self.source:
                keys[SOURCE_LATENTS] = shown
        if masks is not None:
            keys[MASKED_LATENTS] = key_of(shown, "masked", *masks)
        return keys

    def look_up(self, keys: dict[str, bytes], turn: int, sizes: tuple[int, ...] = NO_SIZES) -> CachedSample:
        """What there is of a sample, when it is the turn of some variant of it."""
        failed = self.store.failures
        entries = {name: self.store.read(key) for name, key in keys.items()}
        return CachedSample(
            keys,
            found={name: entry for name, entry in entries.items() if entry is not None},
            sizes=sizes,
            variant=-1 if self.variants is None else turn % self.variants,
            mask_variant=turn % self.mask_variants if self.masked == VARIANTS else -1,
            training=self.training,
            failures=self.store.failures - failed,
        )


def draws_freely(dataset: PixelDataset) -> bool:
    """Whether a data set draws crops anew each epoch, beside mirroring."""
    every = [_plain(part) for part in parts_of(dataset)]
    return any(
        crops.split == "train" if isinstance(crops, PhotographCrop) else getattr(crops, "random_crop", False)
        for crops in every
    )


def can_look_up(dataset: PixelDataset) -> bool:
    """Whether it is one of ours, all of whose samples are made of records by what is known."""
    parts = parts_of(dataset)
    ours = all(type(part).sample.__module__.startswith("latentdm.data.") for part in parts)
    return ours and all(isinstance(_plain(part), ResizeCrop | PhotographCrop) for part in parts)


def _plain(dataset: PixelDataset) -> Any:
    """What makes its samples, without the cache in front."""
    crops = getattr(dataset, "crops", None)
    return crops.crops if isinstance(crops, CachedCrops) else crops


def parts_of(dataset: PixelDataset) -> Sequence[PixelDataset]:
    """The data sets that a joined one consists of; itself alone otherwise."""
    return dataset.joined if isinstance(dataset, Joined) else [dataset]


def look_up(dataset: PixelDataset, plan: Plan | None) -> None:
    """Let a data set look its samples up, or with None no longer."""
    for part in parts_of(dataset):
        plain = _plain(part)
        part.crops = plain if plan is None else CachedCrops(plain, plan)  # type: ignore[attr-defined]


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
        plan = self.plan
        if epoch != self._epoch:
            self._epoch = epoch
            plan.store.refresh()
        captions = {}
        if plan.caption is not None and epoch == 0:
            captions = {CAPTIONS: [columns.get(plan.caption) for columns in record.rows]}
        if len(record.rows) > 1:  # a caption is drawn in the true epoch, whatever crop comes with it
            record = replace(record, rows=[record.drawn(self.crops.seed, epoch, self.crops.training)])
        keys, drawn, drawn_epoch = self.keys(record, epoch)
        cached = plan.look_up(keys, self.turn(record, epoch))
        if len(cached.found) == len(keys) and not plan.needs_pixels and not _needs_more(record):
            return self._from(record, cached) | captions | {CACHED: cached}
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
        source = None if record.source is None else [identity(record.source, plan.identity)]
        masks: list[Any] | None = None
        if plan.masked is not None and (plan.masked != OWN or record.mask is not None):
            masks = [plan.masked, plan.mask]
            if record.mask is not None and (plan.masked == OWN or plan.reads_mask):
                masks.append(identity(record.mask, plan.identity))
            if plan.masked == VARIANTS:
                masks += [plan.seed, turn % plan.mask_variants, plan.training]
        return plan.keys(key_of(image, recipe), source, None if masks is None else [masks]), record, epoch

    def _from(self, record: Record, cached: CachedSample) -> Sample:
        """A sample without images."""
        found = cached.found
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
