"""Augmentation of whole batches on the device: mirroring, random resized crops, colours.

Shapes: ``b c H W``, or clips ``b c f H W``, all of whose frames are treated alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.batch import MASK, PIXELS, SEGMENTATION, SOURCE
from latentdm.draws import Draws
from latentdm.errors import UserError, attributed
from latentdm.extras import require
from latentdm.shown import one_line
from latentdm.stages import Stage
from latentdm.tensors import describe, unit_levels, unit_mask
from latentdm.validation import Check


class Augment(Stage):
    """Changes images, and whatever lies on them, in training; each sample by its own draws.

    Image, source, mask and label map are moved alike: nothing is drawn twice. Images keep their dtype: where they are
    uint8 they are rounded again after a crop or a change of colours; mirroring alone is exact. A mask that is cropped
    becomes float32 in 0…1; labels are taken from the nearest pixel. Colours change image and source by the same
    functions, so that what is the same in both stays the same, and leave masks and transparency alone.

    kornia does the colours, by its functions rather than its modules, which would draw from the global generator. Crops
    are torch's own ``grid_sample``: kornia's would solve a homography for each.

    Args:
        flip: probability that a sample is mirrored, left to right.
        crop: the smallest and the largest share of the image's area to crop, in 0…1; the crop is resized to the size of
            the image. None: no crops.
        aspect: a crop's aspect ratio differs from the image's by a factor between one over this and this.
        brightness: levels are multiplied by a factor in 1 ± this; 0: not at all.
        contrast: the distance from the mean gray is multiplied by a factor in 1 ± this.
        saturation: the distance from gray is multiplied by a factor in 1 ± this.
        hue: colours are turned by up to this share of the circle, in 0…0.5.

    Raises:
        UserError: a setting is out of range; colours are asked for and kornia is missing (`MissingExtraError`, which
            names the extra); when called, a ``source`` that has another size than its image.

    Example:
        >>> batch = {"pixels": torch.arange(4.0).view(1, 1, 1, 4) / 4}
        >>> Augment(flip=1.0)(batch, Draws(seed=0, epoch=0, ids=[7]))["pixels"]
        tensor([[[[0.7500, 0.5000, 0.2500, 0.0000]]]])
    """

    reads = (PIXELS,)
    writes = (PIXELS,)
    moves = (PIXELS, SOURCE, MASK, SEGMENTATION)
    """Written as well, where the batch holds them. A mask source behind this stage may write ``mask`` anew."""

    training_only = True

    def __init__(
        self,
        flip: float = 0.0,
        crop: Sequence[float] | None = None,
        aspect: float = 4 / 3,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:
        check = Check("Augment")
        self.flip = check.probability("flip", flip)
        self.crop = (
            None
            if crop is None
            else check.numbers(
                "crop",
                crop,
                "above 0 and at most 1, in order, the share of the area",
                lambda low, high: 0 < low <= high <= 1,
                "for at least two thirds: [0.67, 1.0]",
            )
        )
        self.aspect = check.number("aspect", aspect, 1, hint="1 keeps the image's own")
        self.colours = {
            "brightness": check.number("brightness", brightness, 0, 1),
            "contrast": check.number("contrast", contrast, 0, 1),
            "saturation": check.number("saturation", saturation, 0, 1),
            "hue": check.number("hue", hue, 0, 0.5),
        }
        if any(self.colours.values()):
            require("kornia.enhance", extra="augment", needed_by="Augment")

    def __repr__(self) -> str:
        return one_line(self, **self.colours)

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """Images, sources, masks and label maps as they lie after the move.

        Args:
            batch: ``pixels`` ``b c H W`` uint8 or float 0…1; perhaps ``source`` like it, ``mask``, ``segmentation``.
            draws: the random numbers of the samples.

        Returns:
            Those of the four that the batch holds, in their shapes (one mask for all becomes one an image).

        Raises:
            UserError: ``source`` has another size than ``pixels``.
        """
        pixels: Tensor = batch[PIXELS]
        numbers = draws.uniform("augment", 9)
        moved = {name: batch[name] for name in self.moves if isinstance(batch.get(name), Tensor)}
        if SOURCE in moved:
            _check_source(moved[SOURCE], pixels)
        if MASK in moved and len(moved[MASK]) == 1:  # one for all, until each is moved on its own
            moved[MASK] = moved[MASK].expand(len(pixels), *moved[MASK].shape[1:])
        if self.flip:
            mirrored = (numbers[:, 0] < self.flip).to(pixels.device, non_blocking=True)
            moved = {name: _where(mirrored, value.flip(-1), value) for name, value in moved.items()}
        if self.crop is not None:
            if MASK in moved:
                with attributed("Augment"):
                    moved[MASK] = unit_mask(moved[MASK], pixels)
            windows = self._windows(numbers[:, 1:5]).to(pixels.device, non_blocking=True)
            moved = {name: _cropped(value, windows, nearest=name == SEGMENTATION) for name, value in moved.items()}
        if any(self.colours.values()):
            factors = (numbers[:, 5:] * 2 - 1).to(pixels.device, non_blocking=True)
            pictures = [moved[name] for name in (PIXELS, SOURCE) if name in moved]
            moved.update(zip((PIXELS, SOURCE), self._coloured(pictures, factors), strict=False))
        return moved

    def _windows(self, numbers: Tensor) -> Tensor:
        """``b 4`` in 0…1 → ``b 2 3``: where each pixel of the crop lies in the image, whose sides run from −1 to 1."""
        assert self.crop is not None
        low, high = self.crop
        area, aspect, across, down = numbers.unbind(1)
        area = area * (high - low) + low
        aspect = ((aspect * 2 - 1) * math.log(self.aspect)).exp()
        # Of a crop that would stick out, the aspect gives way rather than the area.
        width = (area * aspect).sqrt().clamp(max=1).maximum(area)
        height = area / width
        windows = numbers.new_zeros(len(numbers), 2, 3)
        windows[:, 0, 0], windows[:, 1, 1] = width, height
        windows[:, 0, 2], windows[:, 1, 2] = (across * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
        return windows

    def _coloured(self, pictures: Sequence[Tensor], reaches: Tensor) -> list[Tensor]:
        """Pictures ``b c … H W`` of one size in new colours, by the same functions; ``reaches`` ``b 4`` in −1…1."""
        enhance = require("kornia.enhance", extra="augment", needed_by="Augment")
        frames = [picture.movedim(1, -3).flatten(0, -4) for picture in pictures]
        channels = max(min(frame.shape[1], 3) for frame in frames)
        # Below each other they have one mean gray, from which contrast is counted.
        colour = torch.cat([unit_levels(frame[:, :3]).expand(-1, channels, -1, -1) for frame in frames], dim=-2)
        reaches = reaches.repeat_interleave(len(colour) // len(reaches), dim=0)
        names = {
            "brightness": enhance.adjust_brightness_accumulative,
            "contrast": enhance.adjust_contrast_with_mean_subtraction,
            "saturation": enhance.adjust_saturation_with_gray_subtraction,
        }
        for number, (name, adjust) in enumerate(names.items()):
            if self.colours[name] and (name != "saturation" or channels == 3):
                colour = adjust(colour, 1 + reaches[:, number] * self.colours[name])
        if self.colours["hue"] and channels == 3:
            colour = enhance.adjust_hue(colour, reaches[:, 3] * (self.colours["hue"] * 2 * math.pi))
        changed = []
        for picture, frame, part in zip(pictures, frames, colour.clamp(0, 1).chunk(len(frames), dim=-2), strict=True):
            levels = torch.cat([_like(part, picture), frame[:, 3:]], dim=1)
            changed.append(levels.view(*picture.movedim(1, -3).shape[:-3], *levels.shape[1:]).movedim(-3, 1))
        return changed


def _check_source(source: Tensor, pixels: Tensor) -> None:
    shape, expected = source.shape, pixels.shape
    if len(shape) != len(expected) or shape[0] != expected[0] or shape[2:] != expected[2:]:
        raise UserError(
            f"Augment: {SOURCE}: expected one an image, of its size, got {describe(source)} for {PIXELS} "
            f"{describe(pixels)}; resize and crop both alike"
        )


def _where(choice: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(choice.view(-1, *[1] * (other.ndim - 1)), chosen, other)


def _cropped(value: Tensor, windows: Tensor, nearest: bool) -> Tensor:
    """``b … H W`` of any dtype, seen through ``windows`` ``b 2 3``, in its own size and dtype."""
    flat = value.flatten(1, -3) if value.ndim > 3 else value[:, None]
    floats = flat.float() if nearest else unit_levels(flat)
    grid = F.affine_grid(windows, [len(flat), 1, *flat.shape[-2:]], align_corners=False)
    seen = F.grid_sample(
        floats, grid, mode="nearest" if nearest else "bilinear", padding_mode="border", align_corners=False
    )
    return (seen.to(value.dtype) if nearest else _like(seen, value)).view(value.shape)


def _like(levels: Tensor, other: Tensor) -> Tensor:
    """Float 0…1 → uint8 0…255 where the other is uint8."""
    return (levels * 255).round_().to(torch.uint8) if other.dtype == torch.uint8 else levels.to(other.dtype)
