"""Soft edges of masks."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from latentdm.batch import PIXELS, unit_mask
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.masks.sources import MaskSource

LIMIT = 128


class FeatheredMask(MaskSource):
    """The masks of another source with soft edges.

    The inpainting encoders of this package round a mask before they use it, as the nodes that they follow do: there a
    feathered mask is one with smoother corners. It is for encoders of your own, and for losses weighted by the mask.

    Args:
        source: where the masks come from.
        pixels: how far the edge reaches to either side, in 1…128. Its middle stays where it was: the mask is averaged
            twice over windows of about this width.

    Raises:
        ValueError: ``pixels`` is out of range.
    """

    def __init__(self, source: MaskSource, pixels: int = 8) -> None:
        if type(pixels) is not int or not 1 <= pixels <= LIMIT:
            raise UserError(f"FeatheredMask: pixels must be an integer in 1…{LIMIT}, got {pixels!r}")
        if not isinstance(source, MaskSource):
            raise UserError(f"FeatheredMask: source must be a mask source, got {type(source).__name__}")
        self.source = source
        self.pixels = pixels

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1."""
        mask = unit_mask(self.source(inputs, draws), inputs[PIXELS], type(self.source).__name__)
        for reach in (self.pixels // 2, self.pixels - self.pixels // 2):
            for window, pad in (((1, 2 * reach + 1), (reach, reach, 0, 0)), ((2 * reach + 1, 1), (0, 0, reach, reach))):
                # What lies outside the image counts as its nearest pixel: no edge is made at the border.
                mask = F.avg_pool2d(F.pad(mask, pad, mode="replicate"), window, stride=1)
        return mask.clamp_(0, 1)

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """As the source."""
        self.source.check(inputs)
