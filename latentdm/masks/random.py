"""Random masks, as inpainting models are trained with."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentdm.batch import PIXELS
from latentdm.draws import Draws, check_probability
from latentdm.errors import UserError
from latentdm.masks.shapes import Blobs, Borders, Boxes, Polygons, Shapes, Strokes
from latentdm.masks.sources import MaskSource

SHAPES_LIMIT = 32
"""The most shapes a mask may have: each costs a pass over the batch."""


class RandomMask(MaskSource):
    """Random boxes, brush strokes, polygons, blobs and borders.

    Each sample draws a kind, a share of the image to cover, and the places of a few shapes. The shapes then swell
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
        ValueError: a setting is out of range, or a kind unknown.

    Example:
        >>> draws = Draws(seed=0, epoch=0, ids=[7])
        >>> mask = RandomMask(share=(0.25, 0.25))({"pixels": torch.zeros(1, 3, 64, 64)}, draws)
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
        shapes: dict[str, Shapes] = {
            "boxes": Boxes(*_counts("boxes", boxes)),
            "strokes": Strokes(*_counts("segments", segments)),
            "polygons": Polygons(*_counts("polygons", polygons)),
            "blobs": Blobs(),
            "borders": Borders(*_counts("sides", sides, 4)),
        }
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(shapes):
            raise UserError(
                f"RandomMask: kinds must be a list of some of {', '.join(shapes)}, each once, got {_shown(kinds)}"
            )
        if isinstance(share, int | float) or len(share) != 2 or not 0 < share[0] <= share[1] < 1:
            raise UserError(
                f"RandomMask: share must be two numbers above 0 and below 1, in order, got {_shown(share)}; "
                "for a tenth to a half of the image: [0.1, 0.5]"
            )
        self.shapes = [shapes[kind] for kind in kinds]
        self.share = (float(share[0]), float(share[1]))
        self.complement = check_probability("RandomMask", "complement", complement)
        self.whole = check_probability("RandomMask", "whole", whole)

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` bool on the device of ``pixels``."""
        pixels = inputs[PIXELS]
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
            placed = shapes.draw(draws.of(rows.tolist()), extent)
            numbers = torch.cat([rows[:, None], share[rows, None], turned[rows, None], placed.flatten(1)], dim=1)
            numbers = numbers.to(pixels.device, non_blocking=True)
            painted = shapes.paint(numbers[:, 3:].view(placed.shape), numbers[:, 1], (height, width))
            if self.complement:
                painted ^= numbers[:, 2].bool()[:, None, None]
            masks = painted if len(rows) == len(masks) else masks.index_copy_(0, numbers[:, 0].long(), painted)
        return masks[:, None]


def _counts(setting: str, values: Sequence[int], limit: int = SHAPES_LIMIT) -> tuple[int, int]:
    if not isinstance(values, int) and len(values) == 2 and all(type(value) is int for value in values):
        low, high = values
        if 1 <= low <= high <= limit:
            return low, high
    raise UserError(
        f"RandomMask: {setting} must be two integers in 1…{limit}, in order, got {_shown(values)}; "
        "for always three: [3, 3]"
    )


def _shown(value: object) -> object:
    """Tuples, and the lists that Hydra makes of them, are shown alike."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
