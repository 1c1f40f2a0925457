"""Reading image files into 8-bit images and tensors, and the one way in which masks are resized.

Pillow does the decoding. Its draft mode lets libjpeg leave out the frequencies that the target size cannot show; that
is most of what simplejpeg, OpenCV or libvips would gain (``benchmarks/data.py`` compares them), for every format that
people have and without another dependency.

Shapes: ``c h w`` tensors are uint8; Pillow's sizes are (width, height).
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentdm.data.skips import SampleError
from latentdm.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
"""The endings, in lower case, of the files that count as images."""

RESAMPLE = Image.Resampling.LANCZOS
"""How images are resized: Pillow's filters average when they shrink."""

RESAMPLE_REDUCED = Image.Resampling.BICUBIC
"""The same for one that the decoder reduced: at less than a half there is little left to average."""

MAX_PIXELS = 178_956_970
"""The largest image that is decoded unless a user says otherwise: Pillow's own limit against decompression bombs."""

EXIF_ORIENTATION = 0x0112
"""The EXIF tag."""

TURNED = (5, 6, 7, 8)
"""The EXIF orientations of an image that lies on its side."""

ImageFile = Path | bytes
"""A file, or what it holds."""

Resized = Callable[[int, int], tuple[int, int]]
"""The width and height of an image → those that it is to be resized to."""


def read_image(
    file: ImageFile, name: str = "", resized: Resized | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """Read an image, upright (its EXIF orientation applied), as 8-bit RGB or RGBA in sRGB.

    Gray, palette, CMYK and 16-bit images become RGB; RGBA is given where the file has transparency of any kind; of an
    animation the first frame is read. An ICC profile is converted to sRGB; one that cannot be read is passed over.

    Args:
        file: the file or its content.
        name: what an error calls the content where ``file`` is no path.
        resized: the size wanted in the end, from the full one: a JPEG is then decoded at a half, a quarter or an
            eighth of its sides, as long as neither falls below what is wanted.
        max_pixels: a larger image is refused before it is decoded.

    Returns:
        The image, perhaps reduced, and the size of the upright image before any reduction.

    Raises:
        SampleError: the image cannot be read; it names the file and says why.
    """
    image, size = _open(file, name, resized, max_pixels)
    if image.mode != "RGB" or image.has_transparency_data:  # converting RGB to itself would copy it
        # By way of RGBA: Pillow warns when it turns a palette with transparency into RGB.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image, size


def read_mask(file: ImageFile, name: str = "", max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a mask as gray levels, upright; its own transparency is ignored.

    Returns:
        ``1 h w`` uint8, 255 = repaint. A file whose highest level is 1 holds zeros and ones, and 1 becomes 255.

    Raises:
        SampleError: the mask cannot be read; it names the file and says why.
    """
    image, _ = _open(file, name, None, max_pixels, srgb=False)  # a mask's levels are no colours
    mask = image_to_tensor(image.convert("L"))
    return mask * 255 if mask.max() == 1 else mask


def read_size(file: ImageFile, name: str = "") -> tuple[int, int]:
    """The width and height of an image, upright, from the file's head alone.

    Raises:
        SampleError: the file cannot be read; it names the file and says why.
    """
    with _opened(file, name) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(EXIF_ORIENTATION) in TURNED else (width, height)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit Pillow image as uint8 ``c h w``, laid out channels-last as Pillow has it; ``1 h w`` for gray."""
    levels = torch.from_numpy(np.array(image))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize gray levels bilinearly, without antialias, as the inpainting encoders resize a mask.

    Gray levels stay, because rounding comes later. A level half-way between two integers goes down: the mean of 0 and
    255 is exactly 0.5, which later rounds to 0, and 128 would round to 1.

    Args:
        mask: ``1 h w`` uint8.
        height: of the result.
        width: of the result.

    Returns:
        ``1 height width`` uint8.
    """
    if mask.shape[-2:] == (height, width):
        return mask
    levels = F.interpolate(mask[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0]
    return (levels - 0.5).ceil_().clamp_(0, 255).to(torch.uint8)


@contextmanager
def _opened(file: ImageFile, name: str) -> Iterator[Image.Image]:
    """Open an image; whatever Pillow raises inside becomes a `SampleError`, and what it warns of is left unsaid.

    A broken file makes Pillow raise nearly anything. It warns of odd metadata, which a person can do nothing about.
    """
    try:
        # We open the file, because Pillow leaves those of some formats open.
        with warnings.catch_warnings(), io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
            warnings.simplefilter("ignore")
            yield Image.open(stream)
    except Exception as error:
        what = file if isinstance(file, Path) else name or "an image"
        why = "its content is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise SampleError(f"cannot read {what}: {why}; repair or remove the file") from error


def _open(
    file: ImageFile, name: str, resized: Resized | None, max_pixels: int, srgb: bool = True
) -> tuple[Image.Image, tuple[int, int]]:
    """The decoded first frame, upright, in a mode that Pillow converts rightly to 8 bits; and its full size."""
    with _opened(file, name) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise UserError(f"its {width} × {height} pixels exceed max_pixels={max_pixels}")
        orientation = opened.getexif().get(EXIF_ORIENTATION, 1)
        turned = orientation in TURNED
        size = (height, width) if turned else (width, height)
        if resized is not None:
            wanted = resized(*size)
            opened.draft(None, wanted[::-1] if turned else wanted)  # None keeps the mode
        opened.load()
        image = ImageOps.exif_transpose(opened) if orientation != 1 else opened
        image = _eight_bit(image)
        if srgb and opened.info.get("icc_profile"):
            image = _srgb(image, opened.info["icc_profile"])
    return image, size


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("its levels are floats, whose range is unknown (save it with 8 or 16 bits)")
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips 16 bits at 255.
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UserError(f"its levels span {levels.min()}…{levels.max()} (save it with 8 or 16 bits)")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image's colours as sRGB shows them; transparency stays."""
    mode = {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    transform = _to_srgb(profile, mode)
    if transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    flat = image.convert("RGBA").convert(mode) if alpha else image.convert(mode)
    converted: Image.Image = transform.apply(flat)
    if alpha:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None if there is nothing to convert, or no way to."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(opened):
            return None
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
