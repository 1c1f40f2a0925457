"""Masks: moving their edges (`grow_mask`, `offset_mask`) and where they come from (`MaskSource`)."""

from latentdm.masks.morphology import grow_mask, offset_mask
from latentdm.masks.random import RandomMask
from latentdm.masks.sources import AlphaMask, BatchMask, FeatheredMask, MaskSource, MixedMask, SegmentationMask

__all__ = [
    "AlphaMask",
    "BatchMask",
    "FeatheredMask",
    "MaskSource",
    "MixedMask",
    "RandomMask",
    "SegmentationMask",
    "grow_mask",
    "offset_mask",
]
