"""Stages that draw for the cache: what is kept must be drawn alike whenever it is made."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import WarningCache  # type: ignore[attr-defined]
from torch import Tensor

from latentdm.batch import MASK, PIXELS, SOURCE
from latentdm.cache.keys import key_of
from latentdm.cache.rows import CACHED, NO_SIZES, CachedRows, CachedSample
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

    def draws(self, cached: CachedRows, draws: Draws, variants: Iterable[int]) -> Draws:
        """The draws of samples of the cache."""
        keys = [sample.keys[cached.names[0]] for sample in cached.samples]
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
        if cached.samples[0].mask_variant >= 0:
            draws = self.draws(cached, draws, (sample.mask_variant for sample in cached.samples))
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
        return self.step(batch, self.draws(cached, draws, (sample.variant for sample in cached.samples)))


class KeyedLookup(Stage):
    """Looks up the samples of data modules that name what their pixels depend on: a ``cache_key`` for each image.

    Args:
        said: what was said before.

    Attributes:
        plan: how; None: nothing is looked up.
        no_key: what is said of batches that have none; "" where nothing is.
        augmented: images are augmented in training, where they are then not looked up.
    """

    on_host = True
    writes = (CACHED,)

    def __init__(self, said: WarningCache) -> None:
        self.said = said
        self.plan: Plan | None = None
        self.no_key = ""
        self.augmented = False

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
            if self.no_key:
                self.said.warn(f"Cache: not cached: {self.no_key}")
            return {}
        keys = given.flatten().tolist() if isinstance(given, Tensor) else given
        if not isinstance(keys, list | tuple) or len(keys) != len(draws.ids):
            raise UserError(
                f"{CACHE_KEY}: expected a list of texts, one an image, got {describe(given)} for {len(draws.ids)} "
                "images"
            )
        plan = replace(plan, training=draws.training)
        return {CACHED: CachedRows([self._sample(plan, str(key), batch, draws.epoch) for key in keys])}

    def _sample(self, plan: Plan, key: str, batch: Mapping[str, Any], epoch: int) -> CachedSample:
        shape = list(batch[PIXELS].shape[1:])
        source = None if batch.get(SOURCE) is None else ()
        drawn = [plan.seed, epoch % plan.mask_variants, plan.training] if plan.masked == VARIANTS else []
        masks = None if plan.masked is None else (plan.masked, plan.mask, drawn)
        keys = plan.keys(key_of("cache_key", key, shape, plan.multiple), source, masks)
        return plan.look_up(keys, epoch, (*NO_SIZES, *shape[-2:]))
