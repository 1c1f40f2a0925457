"""`Cache`: what was encoded once is read ever after."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import WarningCache  # type: ignore[attr-defined]
from torch import Tensor

from latentdm.batch import MASK, MASKED_LATENTS
from latentdm.cache.keys import IDENTITIES, decoder
from latentdm.cache.memory import memory_folder
from latentdm.cache.planning import Planner
from latentdm.cache.rows import MOMENTS, SIZES, CachedRows, packed
from latentdm.cache.shards import BrokenShard
from latentdm.cache.steps import CachedAugment, CachedMasks, KeyedLookup
from latentdm.cache.store import Store, open_space
from latentdm.cache.text import CachedTextEncoder
from latentdm.cache.writer import Writer
from latentdm.frozen.weights import DTYPES
from latentdm.stages import Stage
from latentdm.tensors import dtype_name
from latentdm.text.encoder import TextEncoder
from latentdm.validation import Check

FORMAT = 1
"""Of entries; those of another one are never found."""


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
        for name, value in (("variants", variants), ("mask_variants", mask_variants)):
            if value is not None:
                check.integer(name, value, 1, hint="leave it out (null) for new ones each time")
        self.variants = variants
        self.mask_variants = mask_variants
        self.dtype = check.choice("dtype", dtype, DTYPES)
        self.identity = check.choice("identity", identity, IDENTITIES)
        self.hits = self.misses = 0
        self.text: CachedTextEncoder | None = None
        self.said = WarningCache()
        self.keyed = KeyedLookup(self.said)
        self.writer = Writer()
        self.store: Store | None = None
        self._kept = torch.float32
        self._read_failures = 0

    # ---------------------------------------------------------------- before the first batch

    def stages(self, masks: Any, augment: Any, text: Any, stages: Sequence[Stage]) -> dict[str, Any]:
        """A data module's steps, which look up what was made before."""
        if isinstance(text, TextEncoder):
            self.text = CachedTextEncoder(text, self.writer, DTYPES[self.dtype])
            text = self.text
        return {
            "masks": CachedMasks(masks) if isinstance(masks, Stage) else masks,
            "augment": CachedAugment(augment) if isinstance(augment, Stage) else augment,
            "text": text,
            "stages": [self.keyed, *stages],
        }

    def setup(self, datamodule: Any) -> None:
        """Open the entries of a data module's encoder, and let its data sets look them up.

        Args:
            datamodule: a `latentdm.LatentDataModule` whose encoder is on its device. What cannot be cached is said,
                with the remedy.
        """
        trainer: Trainer | None = datamodule.trainer
        self.writer.rank = trainer.global_rank if trainer is not None else 0
        store = self.open(datamodule.encoder.vae, trainer)
        if self.text is not None:
            self._open_text(datamodule.captions, self.text)
        if trainer is None or trainer.is_global_zero:
            for each in self.stores:
                each.sweep()
            self.keep_index()
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        if not any(isinstance(callback, Flush) and callback.cache is self for callback in callbacks):
            callbacks.append(Flush(self))
        Planner(self, datamodule, store).look_up()

    def _open_text(self, captions: Any, text: CachedTextEncoder) -> None:
        assert self.dir is not None
        text.store = None
        if not getattr(captions, "shuffle_tags", False):
            text.open(self.dir)
            return
        self.said.warn(
            "Cache: not cached: captions, whose tags come in another order each time; set captions.shuffle_tags=false "
            "to encode each once"
        )

    @property
    def stores(self) -> list[Store]:
        """Those that are open: of the encoder, and of the text encoder where there is one."""
        every = [self.store, None if self.text is None else self.text.store]
        return [store for store in every if store is not None]

    def keep_index(self) -> None:
        """Write the indexes anew where they lack many entries."""
        with suppress(OSError, BrokenShard):  # each process reads the shards' own keys
            for store in self.stores:
                store.keep_index()

    def open(self, vae: Any, trainer: Trainer | None = None) -> Store:
        """The entries of one encoder; its weights are hashed."""
        root = self.dir
        if root is None:
            root = self.dir = memory_folder(trainer)
        self._kept = wanted = self.dtype_of(vae)
        space = {
            "format": FORMAT, "store": dtype_name(wanted), "decoder": decoder(), "encoder": vae.fingerprint(),
        }  # fmt: skip
        self.store = open_space(root, space)
        if not self.store.folder.exists():  # which was said
            self.writer.stopped, self.writer.warned = "the folder cannot be made", True
        return self.store

    def dtype_of(self, vae: Any) -> torch.dtype:
        """What is kept of an encoder's moments."""
        wanted = DTYPES[self.dtype]
        if wanted is not None:
            return wanted
        kept: torch.dtype = torch.float16 if vae.dtype == torch.float32 else vae.dtype
        return kept

    # ---------------------------------------------------------------- while it runs

    def count(self, rows: CachedRows) -> None:
        """Count what a batch found."""
        self.hits += rows.hits + rows.passed
        self.misses += rows.misses
        self._read_failures += sum(sample.failures for sample in rows.samples)

    @property
    def failures(self) -> int:
        """Entries that could not be read and shards that could not be written, so far."""
        return self._read_failures + self.writer.failures

    def put(self, rows: CachedRows, name: str, missing: Sequence[int], moments: Tensor, mask: Any) -> None:
        """Keep the moments of some rows of a batch; see `latentdm.cache.rows.Sink`."""
        if self.writer.stopped and self.writer.warned:
            return
        assert self.store is not None
        samples = [rows.samples[row] for row in missing]
        kept = moments.to(self._kept)
        fields: dict[str, Tensor] = {
            MOMENTS: kept,
            SIZES: torch.tensor([sample.sizes for sample in samples], dtype=torch.int32),
            # Here and not in the writer's thread; see there.
            "keep": kept.isfinite().flatten(1).all(1),
        }
        if name == MASKED_LATENTS:
            masks = mask()
            fields[MASK] = packed(masks if len(missing) == len(masks) else masks[list(missing)])
        self.writer.put(self.store, [sample.keys[name] for sample in samples], fields, wait=rows.only)

    def flush(self) -> None:
        """Write what waits to be written, and know of it."""
        self.writer.flush()
        for store in self.stores:
            store.refresh()

    def report(self) -> dict[str, int]:
        """Entries and bytes written so far, and how often they were found, by this process."""
        writer = self.writer
        return {
            "entries": writer.entries, "bytes": writer.bytes, "hits": self.hits, "misses": self.misses,
            "failures": self.failures, "dropped": writer.dropped,
        }  # fmt: skip


class Flush(Callback):
    """Writes at the end of each epoch what waits, so that the next one finds it.

    Args:
        cache: of the trainer's data module.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flush on all ranks before any of them goes on; after an epoch that lacked no caption free the device."""
        self.cache.flush()
        if trainer.is_global_zero:
            self.cache.keep_index()
        if self.cache.text is not None:
            self.cache.text.rest()
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
