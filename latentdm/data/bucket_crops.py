"""Samples in the size of their bucket, and the sizes that SDXL's micro-conditioning needs."""

from typing import Any

import torch

from latentdm.data.base import Sample
from latentdm.data.buckets import BucketPlan
from latentdm.data.squares import Crop, Squares


class BucketCrops(Squares):
    """Makes samples of the size of their bucket: resized until they just cover it; what sticks out is cut off.

    Args:
        plan: which bucket an image goes to.
        settings: of `Squares`; ``size`` has no effect.
    """

    def __init__(self, plan: BucketPlan, **settings: Any) -> None:
        super().__init__(size=1, **settings)
        self.plan = plan

    def target(self, width: int, height: int) -> tuple[int, int]:
        """The size of the image's bucket."""
        return self.plan.shape(width, height)

    def sizes(self, crop: Crop, width: int, height: int, mirrored: bool) -> Sample:
        """``original_size``, ``crop_top_left`` (in the resized image, mirrored with it) and ``target_size``.

        Each is int64 ``2``: rows first, as diffusers' pipelines take them.
        """
        left = crop.full_width - crop.width - crop.left if mirrored else crop.left
        sizes = {
            "original_size": (height, width),
            "crop_top_left": (crop.top, left),
            "target_size": (crop.height, crop.width),
        }
        return {name: torch.tensor(size) for name, size in sizes.items()}
