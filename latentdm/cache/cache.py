"""`Cache`: what was encoded once is read ever after."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from latentdm.autoencoders.posterior import Posterior
from latentdm.batch import MASK, MASKED_LATENTS, PIXELS, SEGMENTATION, SOURCE, SOURCE_LATENTS
from latentdm.cache.keys import IDENTITIES, decoder, described, key_of
from latentdm.cache.memory import memory_folder
from latentdm.cache.rows import MOMENTS, SIZES, CachedRows, packed
from latentdm.cache.samples import FIXED, OWN, VARIANTS, Plan, can_look_up, draws_freely, look_up, parts_of
from latentdm.cache.steps import CachedAugment, CachedMasks, CachedStep
from latentdm.cache.store import Store
from latentdm.cache.writer import Writer
from latentdm.data.module import PixelDataModule
from latentdm.errors import UserError
from latentdm.frozen.weights import DTYPES
from latentdm.hooks import HOOKS
from latentdm.stages import Stage
from latentdm.tensors import dtype_name
from latentdm.validation import Check

FORMAT = 1
"""Of entries; those of another one are never found."""

SETS = ("train_set", "val_set", "test_set", "predict_set")

MOVED = {PIXELS, SOURCE, MASK, SEGMENTATION}
"""What lies on an image, or is one."""


class Cache:
    """Keeps what the encoder gave for each image, so that it is encoded once; later epochs read.

    Means and log variances are kept, before anything is scaled: each step draws a new sample of them. An entry is found
    by a hash over all that decides its bytes: the image's file, how it is cropped and mirrored, the encoder's weights,
    dtype and tiling. So nothing is ever stale; what has changed is encoded again, and the rest is read. A sum over key
    and content is checked on each read. Whatever goes wrong with the cache itself is a miss, and is counted.

    Of an inpainting batch the clean half comes from the cache and the masked image is encoded, under a mask that is new
    each time. A data set's own masks are cached with their images, and with ``mask_variants`` drawn ones.

    A process that is killed loses the last half minute of what it encoded; the cache stays right. Any number of
    processes may read and write one cache at once, on a network's file system too.

    Args:
        dir: the folder. None: in memory, for as long as the program runs.
        variants: how many crops an image gets where a data set draws crops, or ``augment`` changes images in training:
            these are then drawn from the epoch modulo this number, and from the image's file rather than its
            ``index``. None: such images are encoded each time, as no crop comes twice. Where images are mirrored and
            nothing else is drawn, both sides have entries, and this has no effect.
        mask_variants: how many masks an image gets from a mask source that draws: those are then drawn as crops are,
            and cached with their images. None: masks are new each time, and masked images encoded each time.
        dtype: of what is kept: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: that of the encoder, with
            which nothing is lost; float16 for an encoder in float32.
        identity: how a file is told from what it was before: ``"stat"`` by path, size and time of change, ``"content"``
            by a hash of what it holds, for files that are copied from place to place.

    Raises:
        UserError: a setting is out of range.

    Attributes:
        hits: entries found so far, by this process and its workers.
        misses: entries looked for in vain.
        writer: writes what was missing; it counts ``entries``, ``bytes``, ``dropped`` and ``failures``.
        store: the entries of the encoder at hand; known from `setup` on.

    Example:
        >>> LatentDataModule(pixels, encoder, cache=Cache("latents"))  # doctest: +SKIP
    """

    def __init__(
        self,
        dir: str | Path | None = None,
        variants: int | None = None,
        mask_variants: int | None = None,
        dtype: str = "auto",
        identity: str = "stat",
    ) -> None:
        check = Check("Cache")
        self.dir = None if dir is None else Path(dir).expanduser()
        self.in_memory = dir is None
        for name, value in (("variants", variants), ("mask_variants", mask_variants)):
            if value is not None:
                check.integer(name, value, 1, hint="leave it out (null) for new ones each time")
        self.variants = variants
        self.mask_variants = mask_variants
        self.dtype = check.choice("dtype", dtype, DTYPES)
        self.identity = check.choice("identity", identity, IDENTITIES)
        self.hits = self.misses = 0
        self.writer = Writer()
        self.store: Store | None = None
        self._kept = torch.float32
        self._read_failures = 0
        self._said: set[str] = set()

    # ---------------------------------------------------------------- before the first batch

    def stages(self, masks: Stage | None, augment: Stage | None) -> tuple[Stage | None, Stage | None]:
        """A data module's mask source and augmentation, with draws that follow from keys where entries are made."""
        wrapped_masks = CachedMasks(masks) if isinstance(masks, Stage) else masks
        return wrapped_masks, CachedAugment(augment) if isinstance(augment, Stage) else augment

    def setup(self, datamodule: Any) -> None:
        """Open the entries of a data module's encoder, and let its data sets look them up.

        Args:
            datamodule: a `latentdm.LatentDataModule` whose encoder is on its device. What cannot be cached is said, with
                the remedy.
        """
        trainer: Trainer | None = datamodule.trainer
        self.writer.rank = trainer.global_rank if trainer is not None else 0
        self.open(datamodule.encoder.vae, trainer)
        assert self.store is not None
        if trainer is None or trainer.is_global_zero:
            self.store.sweep()
            try:
                self.store.keep_index()
            except OSError:
                pass  # each process reads the shards' own keys
        datamodule.encoder.cache = self
        if trainer is not None and not any(isinstance(callback, Flush) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(Flush(self))  # type: ignore[attr-defined]
        pixels = datamodule.pixels
        why = self._whole_reason(datamodule)
        if why:
            self._say_not(why)
        elif isinstance(pixels, PixelDataModule):
            for name in SETS:
                dataset = getattr(pixels, name)
                if dataset is not None:
                    look_up_all = self._reason(datamodule, dataset, name)
                    if look_up_all:
                        self._say_not(f"{type(pixels).__name__}'s {name}: {look_up_all}")
                    if all(map(can_look_up, parts_of(dataset))):
                        look_up(dataset, None if look_up_all else self.plan(datamodule, dataset, name == "train_set"))

    def open(self, vae: Any, trainer: Trainer | None = None) -> Store:
        """The entries of one encoder; its weights are hashed."""
        root = self.dir
        if root is None:
            root = self.dir = memory_folder(trainer)
        wanted = DTYPES[self.dtype]
        if wanted is None:
            wanted = torch.float16 if vae.dtype == torch.float32 else vae.dtype
        self._kept = wanted
        space = {
            "format": FORMAT, "store": dtype_name(wanted), "decoder": decoder(), "encoder": vae.fingerprint(),
        }  # fmt: skip
        folder = root / key_of(space).hex()
        if self.store is None or self.store.folder != folder:
            self.store = Store(folder)
        self.store.refresh(all_anew=True)
        described_in = folder / "space.json"
        try:
            if not described_in.exists():
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f"space.{os.getpid()}.{self.writer.rank}"
                part.write_text(json.dumps(space, indent=1), encoding="utf-8")
                part.replace(described_in)
        except OSError as error:
            if not folder.exists():
                rank_zero_warn(f"Cache: cannot write to dir={str(root)!r} ({error}); nothing is kept. Set another one")
        return self.store

    def _whole_reason(self, datamodule: Any) -> str:
        """Why nothing of a data module can be cached; "" if something can."""
        encoder, pixels = datamodule.encoder, datamodule.pixels
        kind = type(encoder)
        if not all(getattr(kind, name).__module__.startswith("latentdm.encoders.") for name in ("_prepare", "_encode")):
            return f"{kind.__name__} prepares images by code of its own, which no key can tell; use latentdm's encoders"
        for stage in datamodule.line.host:
            if MOVED & set(stage.writes):
                name = type(stage).__name__
                return (
                    f"{name} changes images on the host, which no key can tell; let the data do it, and give cache_key"
                )
        if isinstance(pixels, PixelDataModule):
            for hook in HOOKS:
                if is_overridden(hook, pixels, LightningDataModule):
                    return f"{type(pixels).__name__} overrides {hook}, and no key can tell what it does to images"
        return ""

    def _reason(self, datamodule: Any, dataset: Any, name: str) -> str:
        """Why one data set cannot be cached; "" if it can."""
        if not all(map(can_look_up, parts_of(dataset))):
            return (
                f"{type(dataset).__name__} makes samples by code of its own, which no key can tell; give each batch a "
                "cache_key, a text an image that names all that its pixels depend on"
            )
        if name != "train_set" or self.variants is not None:
            return ""
        if any(map(draws_freely, parts_of(dataset))):
            return "each epoch draws other crops; set cache.variants, say 4 crops an image, or random_crop=false"
        if datamodule.augment is not None:
            return "augment changes images anew each epoch; set cache.variants, say 4 an image, or leave augment out"
        return ""

    def plan(self, datamodule: Any, dataset: Any, training: bool) -> Plan:
        """How a data set's samples are looked up."""
        assert self.store is not None
        encoder, augment = datamodule.encoder, datamodule.augment if training else None
        drawn = augment is not None or any(map(draws_freely, parts_of(dataset)))
        if drawn and training and self.variants is not None:
            self._tell(f"crops are drawn from variants={self.variants} an image")
        looks = any(
            MOVED & set(stage.reads)
            for stage in datamodule.line.device
            if stage is not encoder and not isinstance(stage, CachedStep)
        )
        inpaints = MASK in encoder.reads
        masked, mask, reads_mask = None, None, False
        if inpaints and not any(MASK in s.reads for s in datamodule.line.device[-1:] if s is not encoder):
            masked, mask, reads_mask = self._masked(datamodule, augment)
        return Plan(
            store=self.store,
            identity=self.identity,
            multiple=encoder.multiple or encoder.vae.spatial_compression,
            variants=self.variants if drawn else None,
            augment=None if augment is None else described(augment, "augment"),
            masked=masked,
            mask=mask,
            mask_variants=self.mask_variants or 1,
            reads_mask=reads_mask,
            source=SOURCE_LATENTS in encoder.writes,
            needs_pixels=looks or datamodule.keep_pixels or (inpaints and masked is None),
            seed=datamodule.seed,
            training=training,
        )

    def _masked(self, datamodule: Any, augment: Stage | None) -> tuple[str | None, Any, bool]:
        """Which masked images have entries, by what masks, and whether these read the data set's own."""
        encoder, masks = datamodule.encoder, datamodule.masks
        settings = [encoder.grow_mask_by, encoder.mask_offset, encoder.fill]
        kind = type(masks).__name__
        if masks is None or kind == "BatchMask":
            if augment is not None:
                self._tell("masked images are encoded each time, as augment moves the data's own masks")
                return None, None, True
            return OWN, settings, True
        fixed = kind == "AlphaMask"
        if not fixed and self.mask_variants is None:
            return None, None, False
        if unknown := set(masks.reads) - {PIXELS, MASK}:
            self._say_not(f"masked images: {kind} reads {min(unknown)!r} of the batch, which no key can tell")
            return None, None, False
        try:
            source = described(masks, kind)
        except UserError as error:
            self._say_not(f"masked images: {error}")
            return None, None, False
        if not fixed:
            self._tell(f"masks are drawn from mask_variants={self.mask_variants} an image")
        return FIXED if fixed else VARIANTS, [settings, source], MASK in masks.reads

    def _say_not(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            rank_zero_warn(f"Cache: not cached: {why}")

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_info(f"Cache: {what}")

    # ---------------------------------------------------------------- while it runs

    def count(self, rows: CachedRows) -> None:
        """Count what a batch found."""
        self.hits += rows.hits
        self.misses += rows.misses
        self._read_failures += rows.failures

    @property
    def failures(self) -> int:
        """Entries that could not be read and shards that could not be written, so far."""
        return self._read_failures + self.writer.failures

    def put(self, rows: CachedRows, name: str, missing: Sequence[int], moments: Posterior, mask: Any) -> None:
        """Keep the moments of some rows of a batch; see `latentdm.cache.rows.Sink`."""
        if self.writer.stopped and self.writer.warned:
            return
        assert self.store is not None
        both = [moments.mean] if moments.logvar is None else [moments.mean, moments.logvar]
        fields: dict[str, Tensor] = {
            MOMENTS: torch.stack(both, dim=1).to(self._kept),
            SIZES: torch.tensor([rows.sizes[row] for row in missing], dtype=torch.int32),
        }
        if name == MASKED_LATENTS:
            masks = mask()
            fields[MASK] = masks if len(missing) == len(masks) else masks[list(missing)]
        keys = [rows.keys[name][row] for row in missing]
        self.writer.put(self.store, keys, fields, _prepared, wait=rows.only)

    def flush(self) -> None:
        """Write what waits to be written."""
        self.writer.flush()

    def report(self) -> dict[str, int]:
        """Entries and bytes written so far, and how often they were found, by this process."""
        writer = self.writer
        return {
            "entries": writer.entries, "bytes": writer.bytes, "hits": self.hits, "misses": self.misses,
            "failures": self.failures, "dropped": writer.dropped,
        }  # fmt: skip


def _prepared(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host: masks in bits, and no rows that are not finite."""
    ready = dict(fields)
    if MASK in ready:
        ready[MASK] = packed(ready[MASK])
    finite = ready[MOMENTS].isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        ready["keep"] = finite
    return ready


class Flush(Callback):
    """Writes at the end of each epoch what waits, so that the next one finds it.

    Args:
        cache: of the trainer's data module.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flush on all ranks before any of them goes on."""
        self.cache.flush()
        trainer.strategy.barrier()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flush; nobody waits for others."""
        self.cache.flush()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Flush, whatever else has failed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.cache.flush()
