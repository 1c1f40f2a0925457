"""Augmentation of whole batches on the device: mirroring, random resized crops, colours.

Shapes: ``b c H W``, or clips ``b c f H W``, all of whose frames are treated alike.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.batch import MASK, PIXELS, SEGMENTATION, unit_mask
from latentdm.draws import Draws, check_probability
from latentdm.errors import UserError
from latentdm.extras import require

GEOMETRY = (PIXELS, MASK, SEGMENTATION)
"""What is moved together."""


class Augment:
    """Changes images, and whatever lies on them, in training; each sample by its own draws.

    Image, mask and label map are moved alike: nothing is drawn twice. Images keep their dtype: where they are uint8
    they are rounded again after a crop or a change of colours; mirroring alone is exact. A mask that is cropped becomes
    float32 in 0…1; labels are taken from the nearest pixel. Colours leave masks and transparency alone.

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
        ValueError: a setting is out of range.
        ImportError: colours are asked for and kornia is missing; the message names the extra.

    Example:
        >>> batch = {"pixels": torch.arange(4.0).view(1, 1, 1, 4) / 4}
        >>> Augment(flip=1.0)(batch, Draws(seed=0, epoch=0, ids=[7]))["pixels"]
        tensor([[[[0.7500, 0.5000, 0.2500, 0.0000]]]])
    """

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
        self.flip = check_probability("Augment", "flip", flip)
        if crop is not None and (len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1):
            raise UserError(
                f"Augment: crop must be two shares of the area above 0 and at most 1, in order, got {list(crop)}; "
                "for at least two thirds: [0.67, 1.0]"
            )
        self.crop = None if crop is None else (float(crop[0]), float(crop[1]))
        if not 1 <= aspect < math.inf:
            raise UserError(f"Augment: aspect must be at least 1, got {aspect!r}; 1 keeps the image's own")
        self.aspect = aspect
        self.colours = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        for setting, reach in self.colours.items():
            most = 0.5 if setting == "hue" else 1
            if isinstance(reach, bool) or not isinstance(reach, int | float) or not 0 <= reach <= most:
                raise UserError(f"Augment: {setting} must be a number in 0…{most}, got {reach!r}")
        if any(self.colours.values()):
            require("kornia.enhance", extra="augment", needed_by="Augment")

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """The inputs with images, masks and label maps in their new places.

        Args:
            inputs: under our names: ``pixels`` ``b c H W`` uint8 or float 0…1, perhaps ``mask`` and ``segmentation``.
            draws: the random numbers of the samples.

        Returns:
            A new dict; what is not moved is in it as it was.
        """
        pixels = inputs[PIXELS]
        numbers = draws.uniform("augment", 9)
        changed = {name: inputs[name] for name in GEOMETRY if isinstance(inputs.get(name), Tensor)}
        if MASK in changed and len(changed[MASK]) == 1:  # one for all, until each is moved on its own
            changed[MASK] = changed[MASK].expand(len(pixels), *changed[MASK].shape[1:])
        if self.flip:
            mirrored = (numbers[:, 0] < self.flip).to(pixels.device, non_blocking=True)
            changed = {name: _where(mirrored, value.flip(-1), value) for name, value in changed.items()}
        if self.crop is not None:
            if MASK in changed:
                changed[MASK] = unit_mask(changed[MASK], pixels, "Augment")
            places = self._places(numbers[:, 1:5]).to(pixels.device, non_blocking=True)
            changed = {name: _cropped(value, places, nearest=name == SEGMENTATION) for name, value in changed.items()}
        if any(self.colours.values()):
            factors = (numbers[:, 5:] * 2 - 1).to(pixels.device, non_blocking=True)
            changed[PIXELS] = self._coloured(changed[PIXELS], factors)
        return {**inputs, **changed}

    def _places(self, numbers: Tensor) -> Tensor:
        """``b 4`` in 0…1 → ``b 2 3``: where each pixel of the crop lies in the image, whose sides run from −1 to 1."""
        assert self.crop is not None
        low, high = self.crop
        area, aspect, across, down = numbers.unbind(1)
        area = area * (high - low) + low
        aspect = ((aspect * 2 - 1) * math.log(self.aspect)).exp()
        # Of a crop that would stick out, the aspect gives way rather than the area.
        width = (area * aspect).sqrt().clamp(max=1).maximum(area)
        height = area / width
        places = numbers.new_zeros(len(numbers), 2, 3)
        places[:, 0, 0], places[:, 1, 1] = width, height
        places[:, 0, 2], places[:, 1, 2] = (across * 2 - 1) * (1 - width), (down * 2 - 1) * (1 - height)
        return places

    def _coloured(self, pixels: Tensor, reaches: Tensor) -> Tensor:
        """``pixels`` with new colours; ``reaches`` ``b 4`` in −1…1."""
        enhance = require("kornia.enhance", extra="augment", needed_by="Augment")
        frames = pixels.movedim(1, -3)
        flat = frames.flatten(0, -4)
        reaches = reaches.repeat_interleave(len(flat) // len(pixels), dim=0)
        colour = _floats(flat[:, :3])
        names = {
            "brightness": enhance.adjust_brightness_accumulative,
            "contrast": enhance.adjust_contrast_with_mean_subtraction,
            "saturation": enhance.adjust_saturation_with_gray_subtraction,
        }
        for number, (name, adjust) in enumerate(names.items()):
            if self.colours[name] and (name != "saturation" or colour.shape[1] == 3):
                colour = adjust(colour, 1 + reaches[:, number] * self.colours[name])
        if self.colours["hue"] and colour.shape[1] == 3:
            colour = enhance.adjust_hue(colour, reaches[:, 3] * (self.colours["hue"] * 2 * math.pi))
        colour = torch.cat([_like(colour.clamp(0, 1), pixels), flat[:, 3:]], dim=1)
        return colour.view(frames.shape).movedim(-3, 1)


def _where(choice: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(choice.view(-1, *[1] * (other.ndim - 1)), chosen, other)


def _cropped(value: Tensor, places: Tensor, nearest: bool) -> Tensor:
    """``b … H W`` of any dtype, seen through ``places`` ``b 2 3``, in its own size and dtype."""
    flat = value.flatten(1, -3) if value.ndim > 3 else value[:, None]
    floats = flat.float() if nearest else _floats(flat)
    grid = F.affine_grid(places, [len(flat), 1, *flat.shape[-2:]], align_corners=False)
    seen = F.grid_sample(
        floats, grid, mode="nearest" if nearest else "bilinear", padding_mode="border", align_corners=False
    )
    return (seen.to(value.dtype) if nearest else _like(seen, value)).view(value.shape)


def _floats(levels: Tensor) -> Tensor:
    return levels.float() / 255 if levels.dtype == torch.uint8 else levels.float()


def _like(levels: Tensor, other: Tensor) -> Tensor:
    """Float 0…1 → uint8 0…255 where the other is uint8."""
    return (levels * 255).round_().to(torch.uint8) if other.dtype == torch.uint8 else levels.to(other.dtype)
