"""Where the mask of a batch comes from: the batch itself, the alpha channel of its images, or chance.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels. White, 1 and True mean repaint.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentdm.batch import MASK, PIXELS, describe
from latentdm.randomness import Draws

SHAPES_LIMIT = 32
"""The most shapes a mask may have: each costs a pass over the batch."""

COARSE = 64
"""Side of the grid on which the share of a random mask is measured."""


class MaskSource(ABC):
    """Gives each image of a batch its mask; called on the device, before the images are encoded."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """The masks of a batch.

        Args:
            inputs: the batch under our names: ``pixels`` ``b c H W`` uint8 or float, perhaps ``mask`` and ``index``.
            draws: the random numbers of its samples.

        Returns:
            ``b 1 H W`` bool, uint8 (0…255) or float32 (0…1) on the device of ``pixels``.

        Raises:
            ValueError: the batch lacks what the source reads.
        """


class BatchMask(MaskSource):
    """The mask that the batch brought, as it is."""

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``inputs["mask"]``, untouched: the encoder resizes it to the images; ValueError where there is none."""
        if inputs.get(MASK) is None:
            raise ValueError(
                f"BatchMask: the batch has no {MASK!r}; say where it lies with keys={{{MASK}: …}}, "
                "or choose another source: masks=random or masks=alpha"
            )
        return inputs[MASK]


class AlphaMask(MaskSource):
    """The transparency of the images: what is transparent is repainted, 1 − alpha as ComfyUI's LoadImage gives it.

    Args:
        invert: repaint what is opaque instead.
    """

    def __init__(self, invert: bool = False) -> None:
        self.invert = invert

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1, from ``pixels`` ``b 4 H W``; ValueError where they have no alpha channel."""
        pixels = inputs[PIXELS]
        if pixels.ndim != 4 or pixels.shape[1] != 4:
            raise ValueError(
                f"AlphaMask: expected {PIXELS} of shape b 4 H W, got {describe(pixels)}; let the data keep its alpha "
                "channel (pixels.alpha=true), or choose another source: masks=random or masks=batch"
            )
        alpha = pixels[:, 3:]
        # Floats, because a uint8 mask that is nowhere above 1, as 255 − 254, reads as a mask of zeros and ones.
        alpha = alpha.float() / 255 if alpha.dtype == torch.uint8 else alpha.float()
        return alpha if self.invert else 1 - alpha


class RandomMask(MaskSource):
    """Random boxes and brush strokes.

    Each sample draws a kind, a share of the image to cover, and the places of a few shapes. The shapes then swell
    together until they cover that share; so no mask is empty, none is full, and the shares are spread as asked for.

    The few numbers of a sample come from its own stream on the CPU and go to the device in one copy; there the masks
    of the whole batch are painted at once, shape by shape. Each step is one addition, multiplication or comparison,
    which round alike everywhere: a mask depends on nothing but the sample's draws and ``H W``.

    Args:
        kinds: what to draw from: ``"boxes"`` (upright rectangles), ``"strokes"`` (a chain of straight round strokes).
        share: the smallest and the largest share of the image to repaint, above 0 and below 1.
        boxes: the smallest and the largest number of boxes a mask.
        segments: the smallest and the largest number of strokes of the chain.

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
    ) -> None:
        shapes: dict[str, _Shapes] = {
            "boxes": _Boxes(*_counts("boxes", boxes)),
            "strokes": _Strokes(*_counts("segments", segments)),
        }
        if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(shapes):
            raise ValueError(
                f"RandomMask: kinds must be a list of some of {', '.join(shapes)}, each once, got {_shown(kinds)}"
            )
        if isinstance(share, int | float) or len(share) != 2 or not 0 < share[0] <= share[1] < 1:
            raise ValueError(
                f"RandomMask: share must be two numbers above 0 and below 1, in order, got {_shown(share)}; "
                "for a tenth to a half of the image: [0.1, 0.5]"
            )
        self.shapes = [shapes[kind] for kind in kinds]
        self.share = (float(share[0]), float(share[1]))

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` bool on the device of ``pixels``."""
        pixels = inputs[PIXELS]
        height, width = pixels.shape[-2:]
        short = min(height, width)
        extent = torch.tensor([width / short, height / short])
        parts = [draws.uniform("mask", 2), *(shapes.draw(draws, extent) for shapes in self.shapes)]
        numbers = torch.cat([part.flatten(1) for part in parts], dim=1).to(pixels.device, non_blocking=True)
        (choice, share), *placed = (
            flat.view(len(flat), -1, *part.shape[2:], 1, 1).unbind(1)
            for part, flat in zip(parts, torch.split(numbers, [part[0].numel() for part in parts], dim=1), strict=True)
        )

        x = ((torch.arange(width, device=pixels.device) + 0.5) / short).view(1, 1, -1)
        y = ((torch.arange(height, device=pixels.device) + 0.5) / short).view(1, -1, 1)
        fields = [shapes.field(x, y, rows) for shapes, rows in zip(self.shapes, placed, strict=True)]
        field = fields[0]
        for number, other in enumerate(fields[1:], start=1):
            field = torch.where(choice * len(fields) < number, field, other)
        low, high = self.share
        return _lowest(field, share * (high - low) + low)[:, None]


class _Shapes(ABC):
    """low…high shapes a sample, in units of the image's short side; ``n`` is high."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    @abstractmethod
    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b n k`` on the CPU: k numbers a shape, in an image of ``extent`` (width, height)."""

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """``b H W``, new: how far one shape (``row``, ``b k 1 1``) must swell to reach a pixel."""

    def field(self, x: Tensor, y: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """``b H W``: how far all shapes of a mask must swell until one reaches a pixel."""
        nearest = self.distance(x, y, rows[0])
        for row in rows[1:]:
            torch.minimum(nearest, self.distance(x, y, row), out=nearest)
        return nearest

    def _keep(self, shapes: Tensor, choice: Tensor) -> Tensor:
        """Some of the shapes; the others become copies of the first, which paint nothing new."""
        count = self.low + (choice * (self.high - self.low + 1)).long()
        kept = torch.arange(self.high) < count[:, None]
        return torch.where(kept[..., None], shapes, shapes[:, :1])


class _Boxes(_Shapes):
    """Upright rectangles: centre x, y, one over the half width and over the half height."""

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        numbers = draws.uniform("boxes", 1 + 4 * self.high)
        centre, half = numbers[:, 1:].view(-1, self.high, 4).chunk(2, dim=-1)
        return self._keep(torch.cat([centre * extent, 1 / (half * 0.8 + 0.2)], dim=-1), numbers[:, 0])

    def distance(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        centre_x, centre_y, per_x, per_y = row.unbind(1)
        return torch.maximum((x - centre_x).abs() * per_x, (y - centre_y).abs() * per_y)


class _Strokes(_Shapes):
    """A chain of strokes: start x, y, step x, y, one over the squared length and over the squared width."""

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        numbers = draws.uniform("strokes", 3 + 3 * self.high)
        strokes = numbers[:, 3:].view(-1, self.high, 3)
        points = [numbers[:, 1:3] * extent]
        for number in range(self.high):
            step = (strokes[:, number, :2] - 0.5) * 1.5
            points.append((points[-1] + step).clamp_min(0).minimum(extent))
        ends = torch.stack(points, dim=1)
        step = ends[:, 1:] - ends[:, :-1]
        per_length = 1 / (step * step).sum(-1, keepdim=True).clamp_min(1e-6)
        width = strokes[..., 2:] * 0.5 + 0.5
        return self._keep(torch.cat([ends[:, :-1], step, per_length, 1 / (width * width)], dim=-1), numbers[:, 0])

    def distance(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        start_x, start_y, step_x, step_y, per_length, per_width = row.unbind(1)
        from_x, from_y = x - start_x, y - start_y
        along = (from_x * (step_x * per_length) + from_y * (step_y * per_length)).clamp_(0, 1)
        off_x = (along * step_x).sub_(from_x)
        off_y = along.mul_(step_y).sub_(from_y)
        return off_x.mul_(off_x).add_(off_y.mul_(off_y)).mul_(per_width)


def _lowest(field: Tensor, share: Tensor) -> Tensor:
    """Where a field is low, so that the wished share of each image is covered.

    The level is read off a coarse grid of the field's own pixels: sorting 64² numbers instead of 512² costs nothing,
    and what holds on the grid holds on the image: at least one pixel is in, and the highest one is out.

    Args:
        field: ``b H W`` float32.
        share: ``b 1 1`` float32, above 0 and at most 1.

    Returns:
        ``b H W`` bool.
    """
    step_y, step_x = (-(-side // COARSE) for side in field.shape[-2:])
    levels = field[:, step_y // 2 :: step_y, step_x // 2 :: step_x].flatten(1).sort(dim=1).values
    level = levels.gather(1, (share[..., 0] * levels.shape[1]).ceil().long() - 1)
    return (field <= level[..., None]) & (field < levels[:, -1:, None])


def _counts(setting: str, values: Sequence[int]) -> tuple[int, int]:
    if not isinstance(values, int) and len(values) == 2 and all(type(value) is int for value in values):
        low, high = values
        if 1 <= low <= high <= SHAPES_LIMIT:
            return low, high
    raise ValueError(
        f"RandomMask: {setting} must be two integers in 1…{SHAPES_LIMIT}, in order, got {_shown(values)}; "
        "for always three: [3, 3]"
    )


def _shown(value: object) -> object:
    """Tuples, and the lists that Hydra makes of them, are shown alike."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
