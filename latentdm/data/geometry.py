"""From what a data source read to a sample: image, source and mask decoded, resized, cropped and mirrored alike.

Shapes: ``c h w``; ``H W`` is an image as it lies in its file. Sizes are (width, height), as Pillow gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from latentdm.batch import CROP_TOP_LEFT, MASK, ORIGINAL_SIZE, SEGMENTATION, SOURCE, TARGET_SIZE
from latentdm.data.buckets import Size
from latentdm.data.budget import MAX_PIXELS
from latentdm.data.dataset import Sample
from latentdm.data.decode import RESAMPLE, RESAMPLE_REDUCED, ImageFile, decode, image_to_tensor
from latentdm.data.levels import Pick, label_image, mask_image, nearest, of_image, resized
from latentdm.data.skips import SampleError
from latentdm.draws import sample_generator, sample_seed

COMPANIONS = (MASK, SOURCE, SEGMENTATION)
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
        segmentation: the same of its label map.
        target: the size of the sample, where that was planned: an image may have been replaced since. None: that which
            follows from the image.
        rows: whatever else belongs to it, its ``caption`` and any other column; several sets of them where an image has
            several captions. A column that has the name of a picture is left out.
    """

    name: str
    index: int
    image: ImageFile
    mask: ImageFile | None = None
    source: ImageFile | None = None
    segmentation: ImageFile | None = None
    target: Size | None = None
    rows: Sequence[Mapping[str, Any]] = ({},)

    def drawn(self, seed: int, epoch: int, training: bool) -> Mapping[str, Any]:
        """The columns of a sample: of several sets one, drawn for each sample and epoch; the first outside training."""
        if len(self.rows) == 1 or not training:
            return self.rows[0]
        return self.rows[sample_seed(seed, epoch, self.index, "caption") % len(self.rows)]


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
        """An RGB, gray or transparent image → uint8 ``3 height width``; only the part that is kept is resized."""
        bands = [band for band in image.getbands() if band != "A"]
        if len(bands) < len(image.getbands()):
            # Alpha is taken off first: Pillow resizes RGBA premultiplied, which blackens what transparency hides. One
            # channel after another, because a copy of all takes four times the memory.
            kept = [self._kept(image.getchannel(band), resample) for band in bands]
            return image_to_tensor(Image.merge("RGB", kept if len(bands) == 3 else kept * 3))
        return image_to_tensor(self._kept(image, resample).convert("RGB"))

    @property
    def full(self) -> Size:
        """The size that the image is resized to."""
        return self.full_width, self.full_height

    def of_levels(self, pick: Pick) -> npt.NDArray[Any]:
        """``height width`` of the levels of a picture that is resized to `full`, of which no others are computed."""
        rows, columns = np.arange(self.top, self.top + self.height), np.arange(self.left, self.left + self.width)
        kept = pick(rows, columns)
        return np.ascontiguousarray(kept[:, ::-1] if self.mirrored else kept)

    def _kept(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        if image.size == self.full:
            kept = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        else:
            per_x, per_y = image.width / self.full_width, image.height / self.full_height
            right = min((self.left + self.width) * per_x, image.width)
            bottom = min((self.top + self.height) * per_y, image.height)
            box = (self.left * per_x, self.top * per_y, right, bottom)
            kept = image.resize((self.width, self.height), resample, box=box)
        return kept.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else kept


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

    def __call__(self, record: Record, epoch: int) -> Sample:
        """Decode, resize, crop and mirror.

        Returns:
            ``pixels`` uint8 ``3 h w`` (4 with alpha), ``index``, ``name``, `size_columns`, the record's columns and,
            where it has them, in the same geometry: ``mask`` uint8 ``1 h w``, ``source`` uint8 ``3 h w`` and
            ``segmentation`` int32 ``1 h w``, a label a pixel.

        Raises:
            SampleError: a picture cannot be read, or they do not belong together.
        """
        covering = partial(self._covering, record.target)
        image, size = decode(record.image, record.name, covering, self.max_pixels)
        width, height = size
        crop = self._crop(size, record, epoch)
        pixels = crop.of_image(image, _filter(image, size))
        if self.alpha:
            alpha = np.full((crop.height, crop.width), 255, dtype=np.uint8)
            if image.mode.endswith("A"):
                alpha = crop.of_levels(resized(of_image(image.getchannel("A")), size, crop.full))
            pixels = torch.cat([pixels, torch.from_numpy(alpha)[None]])
        del image  # the companions do not lie in memory beside it
        columns = record.drawn(self.seed, epoch, self.training)
        sample: Sample = {name: value for name, value in columns.items() if name not in COMPANIONS}
        sample |= {"pixels": pixels, "index": record.index, "name": record.name, **size_columns(crop, width, height)}
        if record.mask is not None:
            sample[MASK] = self._mask(record, record.mask, size, crop)
        if record.segmentation is not None:
            labels = label_image(record.segmentation, f"the segmentation of {record.name}", self.max_pixels)
            _check_shape(SEGMENTATION, labels.size, size, record)
            kept = crop.of_levels(nearest(of_image(labels), labels.size, crop.full))
            sample[SEGMENTATION] = torch.from_numpy(kept.astype(np.int32))[None]
        if record.source is not None:
            name = f"the source of {record.name}"
            source, its_size = decode(record.source, name, lambda *_: crop.full, self.max_pixels)
            _check_shape(SOURCE, its_size, size, record)
            sample[SOURCE] = crop.of_image(source, _filter(source, its_size))
        return sample

    def _mask(self, record: Record, file: ImageFile, size: Size, crop: Crop) -> Tensor:
        """``1 h w`` uint8: resized to its image, and then along with it."""
        mask = mask_image(file, f"the mask of {record.name}", self.max_pixels)
        _check_shape(MASK, mask.size, size, record)
        kept = crop.of_levels(resized(resized(of_image(mask), mask.size, size), size, crop.full))
        # A crop that only meets the faintest edge of a soft mask would read as a mask of zeros and ones.
        return torch.from_numpy(kept)[None].masked_fill_(torch.from_numpy(kept == 1)[None], 0)

    def _covering(self, planned: Size | None, width: int, height: int) -> Size:
        """What an image of this size is resized to, so that it just covers its target."""
        across, down = planned or self.target(width, height)
        scale = max(across / width, down / height)
        return max(across, round(width * scale)), max(down, round(height * scale))

    def _crop(self, size: Size, record: Record, epoch: int) -> Crop:
        full_width, full_height = self._covering(record.target, *size)
        across, down = record.target or self.target(*size)
        rooms = [full_height - down, full_width - across]
        top, left = (room // 2 for room in rooms)
        if self.random_crop:
            generator = sample_generator(self.seed, epoch, record.index, "crop")
            top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in rooms)
        return Crop(full_width, full_height, left, top, across, down, self.mirrored(record.index, epoch))

    def mirrored(self, index: int, epoch: int) -> bool:
        """Whether a sample is mirrored; nobody needs its image to know."""
        return self.flip and bool(torch.rand((), generator=sample_generator(self.seed, epoch, index, "flip")) < 0.5)


def _square(side: int, width: int, height: int) -> Size:
    return side, side


def _filter(image: Image.Image, size: Size) -> Image.Resampling:
    """The filter for an image whose size before any reduction is given."""
    return RESAMPLE if image.size == size else RESAMPLE_REDUCED


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
