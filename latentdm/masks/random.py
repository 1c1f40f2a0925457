"""Random masks, as inpainting models are trained with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdm.batch import PIXELS
from latentdm.draws import Draws
from latentdm.masks.shapes import Blobs, Borders, Boxes, Polygons, Shapes, Strokes
from latentdm.masks.sources import MaskSource
from latentdm.validation import Check

MAX_SHAPES = 32
"""The most shapes a mask may have: each costs a pass over the batch."""


class RandomMask(MaskSource):
    """Random boxes, brush strokes, polygons, blobs and borders.

    Each sample draws a kind, a share of the image to cover, and where a few shapes lie. The shapes then swell
    together until they cover that share; so no mask is empty, none is full, and the shares are spread as asked for.

    The few numbers of a sample come from its own stream on the CPU and go to the device in one copy a kind; there all
    masks of a kind are painted at once, without waiting for the device. A mask depends on nothing but the sample's
    draws and ``H W``.

    Stable Diffusion's inpainting models were trained with a quarter of all images masked as a whole, which keeps what
    they know of making images from text: ``masks=inpainting``. Here that is off by default, because a whole mask is
    outside ``share``, and someone who previews masks or measures a model in them rarely wants it.

    Args:
        kinds: what to draw from: ``"boxes"`` (upright rectangles), ``"strokes"`` (a chain of straight round strokes),
            ``"polygons"``, ``"blobs"`` (smooth noise) and ``"borders"`` (what lies beyond some sides of a rectangle,
            for outpainting).
        share: the smallest and the largest share of the image to repaint, above 0 and below 1.
        boxes: the smallest and the largest number of boxes a mask.
        segments: the smallest and the largest number of strokes of the chain.
        polygons: the smallest and the largest number of polygons a mask.
        sides: the smallest and the largest number of sides at which a border lies, in 1…4.
        complement: probability that a mask's shapes are what stays, and all around them is repainted. The share
            repainted stays in ``share``.
        whole: probability that the whole image is repainted.

    Raises:
        UserError: a setting is out of range, or a kind unknown.

    Example:
        >>> draws = Draws(seed=0, epoch=0, ids=[7])
        >>> mask = RandomMask(share=(0.25, 0.25))({"pixels": torch.zeros(1, 3, 64, 64)}, draws)["mask"]
        >>> mask.shape, mask.dtype, mask.float().mean()
        (torch.Size([1, 1, 64, 64]), torch.bool, tensor(0.2500))
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("boxes", "strokes"),
        share: Sequence[float] = (0.1, 0.5),
        boxes: Sequence[int] = (1, 4),
        segments: Sequence[int] = (3, 8),
        polygons: Sequence[int] = (1, 2),
        sides: Sequence[int] = (1, 4),
        complement: float = 0.0,
        whole: float = 0.0,
    ) -> None:
        check = Check("RandomMask")

        def counts(setting: str, values: Sequence[int], most: int = MAX_SHAPES) -> tuple[int, int]:
            return check.integers(setting, values, 1, most, "for always three: [3, 3]")

        shapes: dict[str, Shapes] = {
            "boxes": Boxes(*counts("boxes", boxes)),
            "strokes": Strokes(*counts("segments", segments)),
            "polygons": Polygons(*counts("polygons", polygons)),
            "blobs": Blobs(),
            "borders": Borders(*counts("sides", sides, 4)),
        }
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(shapes):
            raise check.fail("kinds", f"a list of some of {', '.join(shapes)}, each once", kinds)
        self.share = check.numbers(
            "share",
            share,
            "above 0 and below 1, in order",
            lambda low, high: 0 < low <= high < 1,
            "for a tenth to a half of the image: [0.1, 0.5]",
        )
        self.shapes = [shapes[kind] for kind in kinds]
        self.kinds, self.boxes, self.segments = list(kinds), list(boxes), list(segments)
        self.polygons, self.sides = list(polygons), list(sides)
        self.complement = check.probability("complement", complement)
        self.whole = check.probability("whole", whole)

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 H W`` bool on the device of ``pixels``."""
        pixels: Tensor = batch[PIXELS]
        height, width = pixels.shape[-2:]
        extent = torch.tensor([width, height]) / min(height, width)
        choice, share, complement, whole = draws.uniform("mask", 4).unbind(1)
        low, high = self.share
        share, turned = share * (high - low) + low, complement < self.complement
        share = torch.where(turned, 1 - share, share)
        kinds = torch.where(whole < self.whole, -1, (choice * len(self.shapes)).long())

        masks = torch.ones(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
        for kind, shapes in enumerate(self.shapes):
            rows = (kinds == kind).nonzero().flatten()  # on the CPU: no one waits for the device
            if len(rows) == 0:
                continue
            drawn = shapes.draw(draws.of(rows.tolist()), extent)
            numbers = torch.cat([rows[:, None], share[rows, None], turned[rows, None], drawn.flatten(1)], dim=1)
            numbers = numbers.to(pixels.device, non_blocking=True)
            painted = shapes.paint(numbers[:, 3:].view(drawn.shape), numbers[:, 1], (height, width))
            if self.complement:
                painted ^= numbers[:, 2].bool()[:, None, None]
            masks = painted if len(rows) == len(masks) else masks.index_copy_(0, numbers[:, 0].long(), painted)
        return masks[:, None]
