"""Masks: moving their edges (`grow_mask`, `offset_mask`) and where they come from (`MaskSource`)."""

from latentdm.masks.morphology import grow_mask, offset_mask
from latentdm.masks.sources import AlphaMask, BatchMask, MaskSource, RandomMask

__all__ = ["AlphaMask", "BatchMask", "MaskSource", "RandomMask", "grow_mask", "offset_mask"]
