"""Stages that draw for the cache: what is kept must be drawn alike whenever it is made."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentdm.batch import MASK
from latentdm.cache.rows import CACHED, CachedRows
from latentdm.draws import Draws
from latentdm.stages import Stage


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
