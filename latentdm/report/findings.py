"""What a look at some samples finds: sizes, masks, captions, latents, what was skipped, and what an epoch costs.

Shapes: ``b`` batch, ``z`` latent channels.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from shutil import rmtree
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from tqdm import tqdm

from latentdm.alarms import latent_std_alarm, mask_alarm, repeated_batches_alarm
from latentdm.batch import LATENTS, NOISE_MASK, ORIGINAL_SIZE, PIXELS
from latentdm.callbacks.latent_stats import Window, overall
from latentdm.data.buckets import Size
from latentdm.data.module import PixelDataModule
from latentdm.datamodule import LatentDataModule
from latentdm.errors import RunError, UserError
from latentdm.preview.batch import Drawn, mask_shares, rows
from latentdm.preview.samples import CAPTIONS, batches, captions_of, encoded, first, joined
from latentdm.report.costs import Kept, kept

ROWS, SIZES = 6, 3
"""Samples that are drawn, and of how many sizes at most."""


@dataclass
class Findings:
    """What was found.

    Attributes:
        stage: ``"train"`` or ``"val"``.
        wanted: samples that were asked for.
        total: samples of an epoch; None where nobody knows.
        samples: that were looked at.
        counts: samples that each batch held, which may be more than were looked at.
        drawn: the first of them.
        sizes: (width, height) of each image as it lies in its file, as far as the data tell.
        given: how many have each size (width, height) after resizing and cropping.
        buckets: the same of all samples of the data, where it was planned ahead.
        enlarged: images that are smaller than what they are resized to.
        masks: the share of its image that each mask covers.
        noise_masks: the same of each mask as the encoder moved it.
        captions: the characters of each caption.
        mean: of each latent channel ``z``.
        std: of each latent channel ``z``.
        latent_values: of all samples.
        mask_bytes: of all masks of samples, a bit a pixel, as a cache keeps them.
        skipped: samples that cannot be read → why.
        ended: why no more samples could be had; "".
        on_error: what a training would do about a broken sample; "" where the data are no module of ours.
        summary: what the data hold, in the data module's words.
        notes: what was left out, in its words.
        said: warnings.
        alarms: what looks wrong.
        waited: seconds that each batch was waited for.
        encoding: seconds that each batch took on the device.
        device: where.
        kept: what a cache would hold; None where nothing was encoded.
    """

    stage: str
    wanted: int
    device: str = ""
    total: int | None = None
    samples: int = 0
    counts: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    given: Counter[Size] = field(default_factory=Counter)
    buckets: Counter[Size] = field(default_factory=Counter)
    enlarged: int = 0
    masks: list[float] = field(default_factory=list)
    noise_masks: list[float] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    latent_values: int = 0
    mask_bytes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    ended: str = ""
    on_error: str = ""
    summary: str = ""
    notes: str = ""
    said: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    encoding: list[float] = field(default_factory=list)
    kept: Kept | None = None

    def rate(self) -> float | None:
        """Samples a second, read and encoded; the first batch warms up, and counts only where it is the only one."""
        seconds = [wait + encode for wait, encode in zip(self.waited, self.encoding, strict=True)]
        first = 1 if len(seconds) > 1 else 0
        return sum(self.counts[first:]) / sum(seconds[first:]) if sum(seconds[first:]) > 0 else None


def look(datamodule: LatentDataModule, samples: int, device: torch.device, stage: str = "train") -> Findings:
    """Take samples through the stages of a data module, without a trainer, and keep what they show.

    A sample that cannot be read is skipped, whatever ``on_error`` says, and told. Nothing is kept in a cache.

    Args:
        datamodule: it is set up here. Of several loaders the first one is asked.
        samples: how many; fewer come where the data has fewer.
        device: where to encode.
        stage: ``"train"`` or ``"val"``.

    Raises:
        UserError: the data or the settings are wrong, or there is no batch.
    """
    found = Findings(stage, samples, str(device))
    pixels = datamodule.pixels
    with warnings.catch_warnings(record=True) as said, _skipping(pixels):
        warnings.simplefilter("always")
        _Look(datamodule, device, found).run()
        if isinstance(pixels, PixelDataModule):
            found.skipped = _skipped(pixels)
            found.summary, found.notes = pixels.summary(), pixels.notes()
        datamodule.teardown("fit")
    texts = [str(each.message) for each in said if issubclass(each.category, UserWarning)]
    found.said = list(dict.fromkeys(text for text in texts if "deprecated" not in text))  # no matter of data
    if not found.samples and not found.skipped:
        raise UserError(f"no batch: the {stage} data is empty; choose another stage, or look at the data")
    if isinstance(pixels, PixelDataModule):
        found.on_error = pixels.on_error
        found.alarms += _skip_alarms(found, pixels.max_skipped_share)
    return found


@contextmanager
def _skipping(pixels: LightningDataModule) -> Iterator[None]:
    """Meanwhile any number of samples may be broken, in a data module of ours."""
    if not isinstance(pixels, PixelDataModule):
        yield
        return
    before = pixels.on_error, pixels.max_skipped_share
    pixels.on_error, pixels.max_skipped_share = "skip", inf  # what describes samples may be broken beside them all
    try:
        yield
    finally:
        pixels.on_error, pixels.max_skipped_share = before


def _skip_alarms(found: Findings, limit: float) -> Iterator[str]:
    """What a training would do about samples that cannot be read."""
    share = len(found.skipped) / max(len(found.skipped) + found.samples, 1)
    if found.skipped and found.on_error == "raise":
        yield "on_error is raise: training ends at the first sample that cannot be read; see Left out"
    elif share > limit:
        yield f"{share:.0%} of the samples cannot be read, more than max_skipped_share={limit:g}: training would end"


class _Look:
    """The loop over batches."""

    def __init__(self, datamodule: LatentDataModule, device: torch.device, found: Findings) -> None:
        self.datamodule, self.device, self.found = datamodule, device, found
        self.window = Window()
        self.parts: dict[tuple[int, ...], list[tuple[Any, Any, list[str]]]] = {}

    def run(self) -> None:
        """Look at as many samples as are wanted."""
        found = self.found
        loader = batches(self.datamodule, found.stage)
        try:
            with tqdm(total=found.wanted, desc="looking", unit=" samples") as bar:
                while found.samples < found.wanted:
                    started = perf_counter()
                    batch = next(loader, None)
                    if batch is None:
                        break
                    bar.update(self.take(batch, started))
                bar.total = found.samples  # an epoch may have fewer than were asked for
                bar.refresh()
        except RunError as error:
            if not getattr(getattr(self.datamodule.pixels, "skips", None), "read", dict)():
                raise
            found.ended = str(error)  # nearly nothing can be read, which is told sample by sample
        finally:
            loader.close()  # with its workers
            found.total = _length(self.datamodule, found.stage)
        if found.samples:
            self.conclude()

    def take(self, batch: Any, started: float) -> int:
        """Add a batch; returns how many of its samples were looked at."""
        found, encoder = self.found, self.datamodule.encoder
        read = perf_counter()
        inputs, outputs, held = encoded(self.datamodule, batch, self.device)
        float(outputs[LATENTS].flatten()[0])  # waits for the device
        found.waited.append(read - started)
        found.encoding.append(perf_counter() - read)
        whole = len(outputs[LATENTS])
        found.counts.append(whole)
        count = min(whole, found.wanted - found.samples)
        inputs, outputs = first(inputs, count), first(outputs, count)
        latents = outputs[LATENTS]
        self.window.add(inputs[PIXELS], latents, None, 0)
        found.samples += count
        found.latent_values += latents.numel()
        height, width = encoder.crop(inputs[PIXELS]).shape[-2:]
        found.given[width, height] += count
        _add_sizes(found, inputs.get(ORIGINAL_SIZE, held.get(ORIGINAL_SIZE)), count, (width, height))
        if NOISE_MASK in outputs:
            masks, moved = mask_shares(encoder, inputs, outputs)
            found.masks += masks.tolist()
            found.noise_masks += moved.tolist()
            found.mask_bytes += count * height * -(-width // 8)
        found.captions += [len(caption) for caption in _captions(held, count)]
        self.keep(inputs, outputs, captions_of(held))
        return count

    def keep(self, inputs: dict[str, Any], outputs: dict[str, Tensor], titles: list[str] | None) -> None:
        """Keep the first samples of each of the first sizes, to be drawn."""
        size = tuple(inputs[PIXELS].shape[1:])
        if size not in self.parts and len(self.parts) == SIZES:
            return
        parts = self.parts.setdefault(size, [])
        lacking = ROWS - sum(len(part[1][LATENTS]) for part in parts)
        if lacking > 0:
            kept = first(inputs, lacking), first(outputs, lacking)
            parts.append((*kept, (titles or [])[: len(kept[1][LATENTS])]))

    def conclude(self) -> None:
        """Figures of all samples, and pictures of the first."""
        found, encoder = self.found, self.datamodule.encoder
        for parts in self.parts.values():
            inputs, outputs = joined([part[0] for part in parts]), joined([part[1] for part in parts])
            count = min(len(outputs[LATENTS]), max(1, ROWS // len(self.parts)))
            titles = [title for part in parts for title in part[2]]
            captions = titles if len(titles) >= count else None
            found.drawn.append(rows(encoder, first(inputs, count), first(outputs, count), captions))
        mean, std, _ = self.window.read()
        found.mean, found.std = mean.tolist(), std.tolist()
        masks = mask_alarm(torch.tensor(found.noise_masks))
        alarms = (latent_std_alarm(overall(std)), masks, repeated_batches_alarm(self.window.repeated()))
        found.alarms += [alarm for alarm in alarms if alarm]
        found.kept = kept(self.datamodule, found.latent_values / found.samples, found.mask_bytes / found.samples)
        dataset = getattr(self.datamodule.pixels, f"{found.stage}_set", None)
        bucket_of, shapes = getattr(dataset, "bucket_of", None), getattr(dataset, "shapes", None)
        if bucket_of is not None and shapes:
            counts = np.bincount(bucket_of, minlength=len(shapes)).tolist()
            found.buckets = Counter({shape: count for shape, count in zip(shapes, counts, strict=True) if count})


def _length(datamodule: LatentDataModule, stage: str) -> int | None:
    """Samples of an epoch, of ours; None where nobody knows."""
    dataset = getattr(datamodule.pixels, f"{stage}_set", None)
    return len(dataset) if isinstance(datamodule.pixels, PixelDataModule) and dataset is not None else None


def _add_sizes(found: Findings, sizes: Any, count: int, given: Size) -> None:
    """Sizes of the images as they lie in their files, rows first, if the batch tells them in our form."""
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or sizes.shape[1] != 2:
        return
    for height, width in sizes[:count].tolist():
        if width > 0 and height > 0:  # −1 stands for unknown
            found.sizes.append((width, height))
            found.enlarged += width < given[0] or height < given[1]


def _captions(held: Mapping[Any, Any], count: int) -> Sequence[str]:
    """The captions of a batch; None in it counts as an empty one."""
    for key in CAPTIONS[1:]:
        texts = held.get(key)
        if isinstance(texts, list | tuple) and any(isinstance(text, str) for text in texts):
            return ["" if text is None else str(text) for text in islice(texts, count)]
    return ()


def _skipped(pixels: PixelDataModule) -> dict[str, str]:
    """What was skipped so far; its list goes, as it is told in the page."""
    skips, pixels.skips = pixels.skips, None
    if skips is None:
        return {}
    found = dict(skips.read())
    rmtree(skips.folder, ignore_errors=True)
    with suppress(OSError):
        skips.folder.parent.rmdir()  # without a trainer it was made for this alone
    return found
