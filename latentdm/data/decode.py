"""Reading image files into 8-bit images and tensors.

Pillow does the decoding. Its draft mode lets libjpeg leave out the frequencies that the target size cannot show; that
is most of what simplejpeg, OpenCV or libvips would gain (``benchmarks/data.py`` compares them), for every format that
people have and without another dependency.

Shapes: ``c h w`` tensors are uint8; Pillow's sizes are (width, height).
"""

import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile as PillowFile
from torch import Tensor

from latentdm.data.budget import MAX_PIXELS, check_memory
from latentdm.data.effort import check_effort, takes_long
from latentdm.data.files import open_file, size_of
from latentdm.data.skips import SampleError
from latentdm.errors import UserError

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""The decoders that are used, whatever a file is called, and the endings of their files. Pillow has others that run
programs (Ghostscript for EPS) or open further files."""

EXTENSIONS = (*(first for first, *_ in FORMATS.values()), *(e for endings in FORMATS.values() for e in endings[1:]))
"""The endings, in lower case, of the files that count as images."""

RESAMPLE = Image.Resampling.LANCZOS
"""How images are resized: Pillow's filters average when they shrink."""

RESAMPLE_REDUCED = Image.Resampling.BICUBIC
"""The same for one that the decoder reduced: at less than a half there is little left to average."""

ORIENTATION = 0x0112
"""The EXIF tag."""

TURNED = (5, 6, 7, 8)
"""The EXIF orientations of an image that lies on its side."""

BLOCK = 1 << 20
"""Pixels that are converted at once where a conversion takes many times their memory."""

MAX_TRANSFORMS = 32
"""Conversions from other colours to sRGB that are kept, of a few hundred kilobytes each."""

ImageFile = Path | bytes
"""A file, or what it holds."""

Resized = Callable[[int, int], tuple[int, int]]
"""The width and height of an image → those that it is to be resized to."""


def decode(
    file: ImageFile, name: str = "", resized: Resized | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image, upright (its EXIF orientation applied), to 8 bits in sRGB.

    Palette, CMYK and 16-bit images become RGB or gray; of an animation the first frame is read. An ICC profile is
    converted to sRGB; one that cannot be read is passed over.

    Args:
        file: the file or its content.
        name: what an error calls the content where ``file`` is no path.
        resized: the size wanted in the end, from the full one: a JPEG is then decoded at a half, a quarter or an
            eighth of its sides, as long as neither falls below what is wanted.
        max_pixels: a larger image is refused before it is decoded.

    Returns:
        The image in one of Pillow's modes L, RGB, LA and RGBA, the latter two where the file has transparency of any
        kind, perhaps reduced; and the size of the upright image before any reduction.

    Raises:
        SampleError: the image cannot be read, or would take more memory than a file of its size may; it names the file
            and says why.
    """
    with _opened(file, name) as (opened, file_bytes):
        size = _load(opened, file_bytes, resized, max_pixels)
        profile = opened.info.get("icc_profile")
        image = eight_bit(opened)
        del opened  # else it would lie beside what it is converted to
        return _in_colour(image, profile), size


def load(file: ImageFile, name: str, max_pixels: int) -> tuple[Image.Image, str]:
    """An image with the levels that its file holds, upright, and Pillow's name of the layout that they have there.

    Raises:
        SampleError: the image cannot be read; it names the file and says why.
    """
    with _opened(file, name) as (opened, file_bytes):
        layout = _layout(opened)
        _load(opened, file_bytes, None, max_pixels)
        return opened, layout


def read_size(file: ImageFile, name: str = "") -> tuple[int, int]:
    """The width and height of an image, upright, from the file's head alone.

    Raises:
        SampleError: the file cannot be read; it names the file and says why.
    """
    with _opened(file, name) as (image, file_bytes):
        if image.format == "PNG":
            check_memory(image, file_bytes, MAX_PIXELS)  # as in decoding
        width, height = image.size
        return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit Pillow image as uint8 ``c h w``, laid out channels-last as Pillow has it; ``1 h w`` for gray."""
    levels = torch.from_numpy(np.array(image))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)


def eight_bit(image: Image.Image) -> Image.Image:
    """An image of 16 bits with 8; of 8 bits as it is.

    Raises:
        UserError: its levels are floats, or more than 16 bits hold.
    """
    if image.mode == "F":
        raise UserError("its levels are floats, whose range is unknown (save it with 8 or 16 bits)")
    if not image.mode.startswith("I"):
        return image
    low, high = extremes(image)
    if low < 0 or high > 65535:
        raise UserError(f"its levels span {low}…{high} (save it with 8 or 16 bits)")
    # Pillow's own conversion clips 16 bits at 255.
    return in_blocks(image, lambda levels: (levels.astype(np.uint32) + 128) // 257)


def extremes(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest level of an image of one channel; not a number where any level is none."""
    if image.mode == "L":
        gray: Any = image.getextrema()
        return gray[0], gray[1]
    blocks = (np.asarray(part) for _, part in parts(image))
    bounds = [(block.min().item(), block.max().item()) for block in blocks]
    lows, highs = zip(*bounds, strict=True)
    return np.min(lows).item(), np.max(highs).item()


def in_blocks(image: Image.Image, convert: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Image.Image:
    """Turn an image's levels into 8-bit ones."""
    gray = Image.new("L", image.size)
    for corner, part in parts(image):
        gray.paste(Image.fromarray(convert(np.asarray(part)).astype(np.uint8)), corner)
    return gray


def parts(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """Crops that make up an image, each with its upper left corner: as one array it would lie in memory thrice."""
    columns = min(image.width, BLOCK)
    rows = BLOCK // columns
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            yield (left, top), image.crop((left, top, min(left + columns, image.width), min(top + rows, image.height)))


@contextmanager
def _opened(file: ImageFile, name: str) -> Iterator[tuple[PillowFile, int]]:
    """Open an image, and tell its bytes; what Pillow raises inside becomes a `SampleError`, what it warns of is unsaid.

    A broken file makes Pillow raise nearly anything. It warns of odd metadata, which a person can do nothing about.
    """
    try:
        with warnings.catch_warnings(), io.BytesIO(file) if isinstance(file, bytes) else open_file(file) as stream:
            warnings.simplefilter("ignore")
            yield Image.open(stream, formats=list(FORMATS)), len(file) if isinstance(file, bytes) else size_of(stream)
    except SampleError:
        raise
    except Exception as error:
        what = file if isinstance(file, Path) else name or "an image"
        why = "its content is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise SampleError(f"cannot read {what}: {why}; repair or remove the file") from error


def _load(opened: PillowFile, file_bytes: int, resized: Resized | None, max_pixels: int) -> tuple[int, int]:
    """Decode the first frame, upright, within the limits; give its full size."""
    width, height = opened.size
    if width * height > max_pixels:
        raise UserError(f"its {width} × {height} pixels exceed max_pixels={max_pixels}")
    if opened.format == "PNG":
        check_memory(opened, file_bytes, max_pixels)  # it decodes the image to look for its orientation behind it
    orientation = opened.getexif().get(ORIENTATION, 1)
    turned = orientation in TURNED
    size = (height, width) if turned else (width, height)
    if resized is not None:
        wanted = resized(*size)
        opened.draft(None, wanted[::-1] if turned else wanted)  # None keeps the mode
    check_memory(opened, file_bytes, max_pixels, lying=orientation != 1)
    check_effort(opened, file_bytes)
    opened.load()
    if orientation != 1:
        ImageOps.exif_transpose(opened, in_place=True)
    return size


def _in_colour(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An 8-bit image of any mode in L, RGB, LA or RGBA, with the colours that its profile means."""
    transparent = image.has_transparency_data
    if profile and (transform := _to_srgb(profile, {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode))):
        return _transformed(image, transform)
    if image.mode in ("RGB", "L", "RGBA", "LA") and transparent == image.mode.endswith("A"):
        return image
    if image.mode == "1" and not transparent:
        return image.convert("L")
    # By way of RGBA: Pillow warns when it turns a palette with transparency into RGB.
    return image.convert("RGBA" if transparent else "RGB")


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """The image's colours as sRGB shows them; transparency stays."""
    mode, alpha = transform.input_mode, None
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode != mode:
        image = image.convert(mode)
    if mode == "RGB":
        transform.apply_in_place(image)
    else:
        image = transform.apply(image)
    if alpha:
        image.putalpha(alpha)
    return image


_transforms: OrderedDict[tuple[bytes, str], ImageCms.ImageCmsTransform | None] = OrderedDict()


def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None if there is nothing to convert, or no way to."""
    key = blake2b(profile).digest(), mode  # not the profile, which may be of megabytes
    if key not in _transforms:
        _transforms[key] = _new_transform(profile, mode)
        if len(_transforms) > MAX_TRANSFORMS:
            _transforms.popitem(last=False)
    return _transforms[key]


def _new_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    if takes_long(profile):
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(opened):
            return None
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _layout(opened: Image.Image) -> str:
    """Pillow's name of the levels' layout in the file, among the arguments of its decoder."""
    for tile in getattr(opened, "tile", [])[:1]:
        for part in (tile.args,) if isinstance(tile.args, str) else tile.args or ():
            if isinstance(part, str):
                return part
    return opened.mode
