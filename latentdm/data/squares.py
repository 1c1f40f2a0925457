"""From what a source read to a sample: image and mask decoded, resized, cropped and mirrored alike.

Shapes: ``c h w``; ``H W`` is an image as it lies in its file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdm.data.base import Sample
from latentdm.data.images import (
    MAX_PIXELS,
    RESAMPLE,
    RESAMPLE_REDUCED,
    Source,
    image_to_tensor,
    read_image,
    read_mask,
    resize_mask,
)
from latentdm.data.skips import SampleError
from latentdm.draws import sample_generator


@dataclass(frozen=True)
class Record:
    """A sample as a source knows it, before anything is decoded.

    Attributes:
        name: what a person calls it.
        index: its id, on which its random draws are keyed.
        image: the file, or its content.
        mask: the same of its mask.
        columns: whatever else belongs to it: its ``caption``, and any other column.
    """

    name: str
    index: int
    image: Source
    mask: Source | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Crop:
    """What is kept of an image that was resized to ``full_width`` × ``full_height``."""

    full_width: int
    full_height: int
    left: int
    top: int
    width: int
    height: int

    def of_image(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Resize that part of the image which is kept; whatever lies outside costs nothing."""
        if image.size == (self.full_width, self.full_height):
            return image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        per_x, per_y = image.width / self.full_width, image.height / self.full_height
        right = min((self.left + self.width) * per_x, image.width)
        bottom = min((self.top + self.height) * per_y, image.height)
        box = (self.left * per_x, self.top * per_y, right, bottom)
        return image.resize((self.width, self.height), resample, box=box)

    def of_mask(self, mask: Tensor) -> Tensor:
        """``1 H W`` uint8 → ``1 height width``."""
        full = resize_mask(mask, self.full_height, self.full_width)
        return full[:, self.top : self.top + self.height, self.left : self.left + self.width].contiguous()


class Squares:
    """Makes a square sample of a record.

    Args:
        owner: the class that an error names.
        size: side of the square in pixels: the short side of each image is resized to it, the long side cropped.
        random_crop: crop anywhere, drawn for each sample and epoch; otherwise in the centre.
        flip: mirror half of the samples.
        alpha: keep transparency as a fourth channel.
        seed: crops and mirroring follow from it.
        max_pixels: larger images are refused.
        finish: has the last word on each sample, as a change of its captions would: ``finish(sample, epoch)``.
    """

    def __init__(
        self,
        owner: str,
        size: int,
        random_crop: bool = False,
        flip: bool = False,
        alpha: bool = False,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        finish: Callable[[Sample, int], Sample] | None = None,
    ) -> None:
        self.owner = owner
        self.size = size
        self.random_crop = random_crop
        self.flip = flip
        self.alpha = alpha
        self.seed = seed
        self.max_pixels = max_pixels
        self.finish = finish

    def target(self, width: int, height: int) -> tuple[int, int]:
        """The width and height of what is kept of an image of this size."""
        return self.size, self.size

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """What an image of this size is resized to, so that it just covers its target."""
        across, down = self.target(width, height)
        scale = max(across / width, down / height)
        return max(across, round(width * scale)), max(down, round(height * scale))

    def sizes(self, crop: Crop, width: int, height: int, mirrored: bool) -> Sample:
        """What a sample tells of its geometry: nothing, since all squares are alike."""
        return {}

    def __call__(self, record: Record, epoch: int) -> Sample:
        """Decode, resize, crop and mirror.

        Returns:
            ``pixels`` uint8 ``3 size size`` (4 with alpha), ``index``, ``name``, the record's columns and, where it has
            one, ``mask`` uint8 ``1 size size`` in the same geometry.

        Raises:
            SampleError: image or mask cannot be read, or do not belong together.
        """
        image, (width, height) = read_image(record.image, self.owner, record.name, self.resized, self.max_pixels)
        crop = self._crop(width, height, record.index, epoch)
        mirrored = self._mirrored(record.index, epoch)
        # Alpha is taken off first: Pillow resizes RGBA premultiplied, which blackens what transparency hides.
        resample = RESAMPLE if image.size == (width, height) else RESAMPLE_REDUCED
        kept = crop.of_image(image if image.mode == "RGB" else image.convert("RGB"), resample)
        pixels = image_to_tensor(kept.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else kept)
        if self.alpha:
            opaque = torch.full((1, height, width), 255, dtype=torch.uint8)
            alpha = crop.of_mask(image_to_tensor(image.getchannel("A")) if image.mode == "RGBA" else opaque)
            pixels = torch.cat([pixels, alpha.flip(-1) if mirrored else alpha])
        sample: Sample = {**record.columns, "pixels": pixels, "index": record.index, "name": record.name}
        sample |= self.sizes(crop, width, height, mirrored)
        if record.mask is not None:
            mask = read_mask(record.mask, self.owner, f"the mask of {record.name}", self.max_pixels)
            _check_aspect(mask, width, height, record, self.owner)
            mask = crop.of_mask(resize_mask(mask, height, width))
            # A crop that only meets the faintest edge of a soft mask would read as a mask of zeros and ones.
            mask = mask.masked_fill_(mask == 1, 0)
            sample["mask"] = mask.flip(-1) if mirrored else mask
        return sample if self.finish is None else self.finish(sample, epoch)

    def _crop(self, width: int, height: int, index: int, epoch: int) -> Crop:
        (full_width, full_height), (across, down) = self.resized(width, height), self.target(width, height)
        rooms = [full_height - down, full_width - across]
        top, left = (room // 2 for room in rooms)
        if self.random_crop:
            generator = sample_generator(self.seed, epoch, index, "crop")
            top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in rooms)
        return Crop(full_width, full_height, left, top, across, down)

    def _mirrored(self, index: int, epoch: int) -> bool:
        return self.flip and bool(torch.rand((), generator=sample_generator(self.seed, epoch, index, "flip")) < 0.5)


def _check_aspect(mask: Tensor, width: int, height: int, record: Record, owner: str) -> None:
    """A mask may have another size than its image, but not another shape: it would be of another image."""
    mask_height, mask_width = mask.shape[-2:]
    if abs(mask_width * height - mask_height * width) > max(width, height, mask_width, mask_height):
        what = record.mask if not isinstance(record.mask, bytes) else f"the mask of {record.name}"
        raise SampleError(
            f"{owner}: {what} has {mask_width} × {mask_height} pixels, which is another shape than the "
            f"{width} × {height} of its image {record.name}; replace or remove it"
        )
