"""Stages that draw for the cache: what is kept must be drawn alike whenever it is made."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentdm.batch import LATENTS, MASK, MASKED_LATENTS, PIXELS, SOURCE, SOURCE_LATENTS
from latentdm.cache.keys import key_of
from latentdm.cache.rows import CACHED, NO_SIZES, CachedRows, CachedSample, rows_of
from latentdm.cache.samples import VARIANTS, Plan
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.stages import Stage
from latentdm.tensors import describe

NO_KEY = (
    "{} makes samples by code of its own, which no key can tell; give each sample a cache_key, a text that names all "
    "that its pixels depend on"
)

CACHE_KEY = "cache_key"
"""Of a foreign batch: a text for each image that names all that its pixels, mask and source depend on."""


class CachedStep(Stage):
    """A stage whose draws for samples of the cache follow from their keys, in the place of index and epoch.

    Args:
        step: the stage.
    """

    def __init__(self, step: Stage) -> None:
        self.step = step
        self.reads, self.writes, self.drops = step.reads, step.writes, step.drops

    def setup(self, device: Any) -> None:
        """Set the stage up."""
        self.step.setup(device)

    def draws(self, cached: CachedRows, draws: Draws, variants: list[int]) -> Draws:
        """The draws of samples of the cache."""
        keys = next(iter(cached.keys.values()))
        ids = [f"{key.hex()}/{variant}" for key, variant in zip(keys, variants, strict=True)]
        return Draws(draws.seed, 0, ids, cached.training)


class CachedMasks(CachedStep):
    """A mask source; masks that were found stand in for those that it would draw."""

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The batch's ``mask``."""
        cached = batch.get(CACHED)
        if not isinstance(cached, CachedRows):
            return self.step(batch, draws)
        if cached.masks is not None and len(cached.masks[0]) == len(cached):
            return {MASK: cached.masks[1]}
        if cached.mask_variants[0] >= 0:
            draws = self.draws(cached, draws, cached.mask_variants)
        made: dict[str, Any] = self.step(batch, draws)
        mask: Tensor = made[MASK]
        return {MASK: cached.with_masks(mask)}


class CachedAugment(CachedStep):
    """An augmentation; images that were not read are left as they are."""

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """What the augmentation writes; nothing outside training."""
        cached = batch.get(CACHED)
        if not isinstance(cached, CachedRows):
            return self.step(batch, draws) if draws.training else {}
        if not cached.training or cached.blank is not None:
            return {}
        return self.step(batch, self.draws(cached, draws, cached.variants))


class KeyedLookup(Stage):
    """Looks up the samples of data modules that name what their pixels depend on: a ``cache_key`` for each image.

    Attributes:
        plan: how; None: nothing is looked up.
        owner: the data module's class, for messages.
        told: whether it was said that batches have none.
        augmented: images are augmented in training, where they are then not looked up.
    """

    on_host = True
    writes = (CACHED,)

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.owner = ""
        self.augmented = False
        self.told = False

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """A `CachedRows`, where the batch has a key and none yet.

        Raises:
            UserError: not one key an image.
        """
        plan, given = self.plan, batch.get(CACHE_KEY)
        pixels = batch.get(PIXELS)
        if plan is None or not isinstance(pixels, Tensor) or CACHED in batch or (draws.training and self.augmented):
            return {}
        if given is None:
            if not self.told:
                self.told = True
                rank_zero_warn(f"Cache: not cached: {NO_KEY.format(self.owner)}")
            return {}
        keys = given.flatten().tolist() if isinstance(given, Tensor) else given
        if not isinstance(keys, list | tuple) or len(keys) != len(draws.ids):
            raise UserError(
                f"{CACHE_KEY}: expected a list of texts, one an image, got {describe(given)} for {len(draws.ids)} "
                "images"
            )
        parts = [self._sample(plan, str(key), batch, draws) for key in keys]
        return {CACHED: rows_of(parts, None)}

    def _sample(self, plan: Plan, key: str, batch: Mapping[str, Any], draws: Draws) -> CachedSample:
        shape = list(batch[PIXELS].shape[1:])
        clean = key_of("cache_key", key, shape, plan.multiple)
        keys, shown, variant = {LATENTS: clean}, clean, -1
        if batch.get(SOURCE) is not None:
            shown = key_of(clean, "source")
            if plan.source:
                keys[SOURCE_LATENTS] = shown
        if plan.masked is not None:
            drawn: list[Any] = []
            if plan.masked == VARIANTS:
                variant = draws.epoch % plan.mask_variants
                drawn = [plan.seed, variant, draws.training]
            keys[MASKED_LATENTS] = key_of(shown, "masked", plan.masked, plan.mask, drawn)
        before = plan.store.failures
        entries = {name: plan.store.read(entry) for name, entry in keys.items()}
        found = {name: entry for name, entry in entries.items() if entry is not None}
        failures, size = plan.store.failures - before, tuple(shape[-2:])
        return CachedSample(keys, found, (*NO_SIZES, *size), -1, variant, draws.training, failures)
