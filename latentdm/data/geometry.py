"""From what a data source read to a sample: image, source and mask decoded, resized, cropped and mirrored alike.

Shapes: ``c h w``; ``H W`` is an image as it lies in its file. Sizes are (width, height), as Pillow gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdm.batch import CROP_TOP_LEFT, MASK, ORIGINAL_SIZE, SOURCE, TARGET_SIZE
from latentdm.data.buckets import Size
from latentdm.data.dataset import Sample
from latentdm.data.decode import (
    MAX_PIXELS,
    RESAMPLE,
    RESAMPLE_REDUCED,
    ImageFile,
    image_to_tensor,
    read_image,
    read_mask,
    resize_mask,
)
from latentdm.data.skips import SampleError
from latentdm.draws import sample_generator, sample_seed

COMPANIONS = (MASK, SOURCE)
"""The other pictures that an image may have."""

Target = Callable[[int, int], Size]
"""The width and height of an image → those that it is to have as a sample."""


@dataclass(frozen=True)
class Record:
    """A sample as a data source knows it, before anything is decoded.

    Attributes:
        name: what a person calls it.
        index: its id, on which its random draws are keyed.
        image: the file, or its content.
        mask: the same of its mask.
        source: the same of the picture that the model is shown where that is not the image itself.
        columns: whatever else belongs to it: its ``caption``, and any other column. One that has the name of a picture
            is left out.
        others: further sets of columns, as where an image has several captions.
    """

    name: str
    index: int
    image: ImageFile
    mask: ImageFile | None = None
    source: ImageFile | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[Mapping[str, Any]] = ()

    def drawn(self, seed: int, epoch: int, training: bool) -> Mapping[str, Any]:
        """The columns of a sample: of several sets one, drawn for each sample and epoch; the first outside training."""
        if not self.others or not training:
            return self.columns
        return (self.columns, *self.others)[sample_seed(seed, epoch, self.index, "caption") % (1 + len(self.others))]


@dataclass(frozen=True)
class Crop:
    """What is kept of an image that was resized to ``full_width`` × ``full_height``, and whether it is mirrored."""

    full_width: int
    full_height: int
    left: int
    top: int
    width: int
    height: int
    mirrored: bool = False

    def of_image(self, image: Image.Image, resample: Image.Resampling) -> Tensor:
        """An RGB image → uint8 ``3 height width``; only the part that is kept is resized."""
        if image.size == (self.full_width, self.full_height):
            kept = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        else:
            per_x, per_y = image.width / self.full_width, image.height / self.full_height
            right = min((self.left + self.width) * per_x, image.width)
            bottom = min((self.top + self.height) * per_y, image.height)
            box = (self.left * per_x, self.top * per_y, right, bottom)
            kept = image.resize((self.width, self.height), resample, box=box)
        return image_to_tensor(kept.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else kept)

    def of_mask(self, mask: Tensor) -> Tensor:
        """``1 H W`` uint8 → ``1 height width``."""
        full = resize_mask(mask, self.full_height, self.full_width)
        kept = full[:, self.top : self.top + self.height, self.left : self.left + self.width].contiguous()
        return kept.flip(-1) if self.mirrored else kept


def size_columns(crop: Crop, width: int, height: int) -> Sample:
    """What SDXL's micro-conditioning needs to know of a crop from an image of this size.

    Returns:
        ``original_size``, ``crop_top_left`` (in the resized image, mirrored with it) and ``target_size``: each int64
        ``2``, rows first, as diffusers' pipelines take them.
    """
    left = crop.full_width - crop.width - crop.left if crop.mirrored else crop.left
    sizes = {
        ORIGINAL_SIZE: (height, width),
        CROP_TOP_LEFT: (crop.top, left),
        TARGET_SIZE: (crop.height, crop.width),
    }
    return {name: torch.tensor(size) for name, size in sizes.items()}


def square(side: int) -> Target:
    """The target of images that all become squares."""
    return partial(_square, side)  # workers may need to pickle it


@dataclass(frozen=True)
class ResizeCrop:
    """Makes a sample of a record: resized until it just covers its target; what sticks out is cut off.

    Attributes:
        target: the size of the sample, from that of its image: `square`, or a bucket plan's ``shape``.
        random_crop: crop anywhere, drawn for each sample and epoch; otherwise in the centre.
        flip: mirror half of the samples.
        alpha: keep transparency as a fourth channel.
        seed: crops and mirroring follow from it.
        max_pixels: larger images are refused.
        training: draw one of several captions; otherwise the first is taken.
    """

    target: Target
    random_crop: bool = False
    flip: bool = False
    alpha: bool = False
    seed: int = 0
    max_pixels: int = MAX_PIXELS
    training: bool = False

    def resized(self, width: int, height: int) -> Size:
        """What an image of this size is resized to, so that it just covers its target."""
        across, down = self.target(width, height)
        scale = max(across / width, down / height)
        return max(across, round(width * scale)), max(down, round(height * scale))

    def __call__(self, record: Record, epoch: int) -> Sample:
        """Decode, resize, crop and mirror.

        Returns:
            ``pixels`` uint8 ``3 h w`` (4 with alpha), ``index``, ``name``, `size_columns`, the record's columns and,
            where it has them, ``mask`` uint8 ``1 h w`` and ``source`` uint8 ``3 h w`` in the same geometry.

        Raises:
            SampleError: a picture cannot be read, or they do not belong together.
        """
        image, size = read_image(record.image, record.name, self.resized, self.max_pixels)
        width, height = size
        crop = self._crop(width, height, record.index, epoch)
        pixels = _pixels(image, size, crop)
        if self.alpha:
            opaque = torch.full((1, height, width), 255, dtype=torch.uint8)
            alpha = image_to_tensor(image.getchannel("A")) if image.mode == "RGBA" else opaque
            pixels = torch.cat([pixels, crop.of_mask(alpha)])
        columns = record.drawn(self.seed, epoch, self.training)
        sample: Sample = {name: value for name, value in columns.items() if name not in COMPANIONS}
        sample |= {"pixels": pixels, "index": record.index, "name": record.name, **size_columns(crop, width, height)}
        if record.mask is not None:
            mask = read_mask(record.mask, f"the mask of {record.name}", self.max_pixels)
            _check_shape("mask", (mask.shape[-1], mask.shape[-2]), size, record)
            mask = crop.of_mask(resize_mask(mask, height, width))
            # A crop that only meets the faintest edge of a soft mask would read as a mask of zeros and ones.
            sample["mask"] = mask.masked_fill_(mask == 1, 0)
        if record.source is not None:
            name, full = f"the source of {record.name}", (crop.full_width, crop.full_height)
            source, its_size = read_image(record.source, name, lambda *_: full, self.max_pixels)
            _check_shape("source", its_size, size, record)
            sample["source"] = _pixels(source, its_size, crop)
        return sample

    def _crop(self, width: int, height: int, index: int, epoch: int) -> Crop:
        (full_width, full_height), (across, down) = self.resized(width, height), self.target(width, height)
        rooms = [full_height - down, full_width - across]
        top, left = (room // 2 for room in rooms)
        if self.random_crop:
            generator = sample_generator(self.seed, epoch, index, "crop")
            top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in rooms)
        flips = self.flip and bool(torch.rand((), generator=sample_generator(self.seed, epoch, index, "flip")) < 0.5)
        return Crop(full_width, full_height, left, top, across, down, flips)


def _square(side: int, width: int, height: int) -> Size:
    return side, side


def _pixels(image: Image.Image, size: Size, crop: Crop) -> Tensor:
    """The colours of what a crop keeps of an image whose size before any reduction is given: uint8 ``3 h w``."""
    # Alpha is taken off first: Pillow resizes RGBA premultiplied, which blackens what transparency hides.
    opaque = image if image.mode == "RGB" else image.convert("RGB")
    return crop.of_image(opaque, RESAMPLE if image.size == size else RESAMPLE_REDUCED)


def _check_shape(kind: str, its_size: Size, size: Size, record: Record) -> None:
    """A mask or a source may have another size than its image, but not another shape: it would be of another image."""
    (its_width, its_height), (width, height) = its_size, size
    if abs(its_width * height - its_height * width) > max(*its_size, *size):
        file = getattr(record, kind)
        what = f"the {kind} of {record.name}" if isinstance(file, bytes) else file
        raise SampleError(
            f"{what} has {its_width} × {its_height} pixels, which is another shape than the {width} × {height} of its "
            f"image {record.name}; replace or remove it"
        )
