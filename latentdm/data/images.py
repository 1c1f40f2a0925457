"""Reading image files into 8-bit images and tensors, and the one way in which masks are resized.

Shapes: ``c h w`` tensors are uint8; Pillow's sizes are (width, height).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""The endings, in lower case, of the files that count as images."""

RESAMPLE = Image.Resampling.LANCZOS
"""How images are resized: Pillow's filters average when they shrink."""


def read_image(path: Path, owner: str) -> Image.Image:
    """Read an image, upright (its EXIF orientation applied), as 8-bit RGB or RGBA.

    Gray, palette, CMYK and 16-bit images become RGB; RGBA is given where the file has transparency of any kind.

    Args:
        path: the file.
        owner: the class that an error names.

    Raises:
        ValueError: the file cannot be read; it names the file and says why.
    """
    image = _open(path, owner)
    # By way of RGBA: Pillow warns when it turns a palette with transparency into RGB.
    return image.convert("RGBA") if image.has_transparency_data else image.convert("RGB")


def read_mask(path: Path, owner: str) -> Tensor:
    """Read a mask as gray levels, upright; its own transparency is ignored.

    Returns:
        ``1 h w`` uint8, 255 = repaint. A file whose highest level is 1 holds zeros and ones, and 1 becomes 255.

    Raises:
        ValueError: the file cannot be read; it names the file and says why.
    """
    mask = image_to_tensor(_open(path, owner).convert("L"))
    return mask * 255 if mask.max() == 1 else mask


def image_to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit Pillow image as uint8 ``c h w``; ``1 h w`` for gray."""
    levels = torch.from_numpy(np.array(image))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1).contiguous()


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


def _open(path: Path, owner: str) -> Image.Image:
    """The decoded first frame, upright, in a mode that Pillow converts rightly to 8 bits."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
        return _eight_bit(image)
    # Six thousand broken files made Pillow raise these and no others.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = "its content is no image that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ValueError(f"{owner}: cannot read {path}: {why}; repair or remove the file") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its levels are floats, whose range is unknown (save it with 8 or 16 bits)")
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips 16 bits at 255.
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its levels span {levels.min()}…{levels.max()} (save it with 8 or 16 bits)")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
