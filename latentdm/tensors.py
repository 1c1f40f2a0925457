"""Pixels and masks as tensors: what they must be, how they are cropped, and how an error names them.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels as they come, ``h w`` pixels after the crop to the VAE's multiple.
"""

from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.errors import UserError

ROUNDING = 1e-4
"""How far beyond 0…1 floats may lie: resizing in float32 goes some 1e-7 beyond."""


def describe(value: object) -> str:
    """A value as an error names it: shape and dtype of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {dtype_name(value.dtype)}"
    return type(value).__name__


def unit_levels(levels: Tensor) -> Tensor:
    """uint8 0…255 or float 0…1 → float32 in 0…1."""
    return levels.float() / 255 if levels.dtype == torch.uint8 else levels.float()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as settings and messages name it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def crop(image: Tensor, multiple: int) -> Tensor:
    """The centred crop (a view) to the largest multiple that fits: offset ``(H mod multiple) // 2``."""
    height, width = image.shape[-2:]
    over, beside = height % multiple, width % multiple
    if not over and not beside:
        return image
    top, left = over // 2, beside // 2
    return image[..., top : top + height - over, left : left + width - beside]


def check_pixels(pixels: object, multiple: int, name: str = "pixels") -> None:
    """Check images before they are encoded.

    Args:
        pixels: ``b c H W`` or clips ``b c f H W``, c ∈ {1, 3, 4}, uint8 0…255 or float 0…1. The range of floats is
            looked at (on an accelerator that waits for the device: another reason to ship uint8).
        multiple: what sides are cropped to; none may be smaller.
        name: of the key.

    Raises:
        UserError: naming what was found and what is right.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        hint = how_to_convert(pixels)
        raise UserError(f"{name}: expected a tensor of shape b c H W, got {describe(pixels)}{hint}")
    shape = pixels.shape
    if shape[1] not in (1, 3, 4):
        hint = "; for channels-last images set layout=HWC" if shape[-1] in (1, 3, 4) else ""
        raise UserError(f"{name}: expected 1, 3 or 4 channels in b c H W, got {describe(pixels)}{hint}")
    if shape[0] == 0:
        raise UserError(f"{name}: the batch is empty, got {describe(pixels)}")
    if shape[-2] < multiple or shape[-1] < multiple:
        raise UserError(
            f"{name}: {shape[-2]}×{shape[-1]} is smaller than the autoencoder's factor {multiple}; use "
            f"images of at least {multiple}×{multiple}"
        )
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        raise UserError(f"{name}: expected uint8 in 0…255 or float in 0…1, got {describe(pixels)}")
    check_range(pixels, name)


def check_range(levels: Tensor, name: str, low: int = 0) -> None:
    """Raise UserError unless floats lie in ``low``…1, give or take what resizing rounds; ``low`` is 0 or −1."""
    if not levels.numel():
        return
    least, most = (float(bound) for bound in levels.detach().aminmax())
    if least >= low - ROUNDING and most <= 1 + ROUNDING:
        return
    if not (isfinite(least) and isfinite(most)):
        remedy = "look at how they were made"
    elif low:
        remedy = "clamp them, or leave pixel_range out where they lie in 0…1"
    elif least <= -0.5:
        remedy = "undo the normalisation (for −1…1: (x + 1) / 2), or declare it to the data module: pixel_range=[-1, 1]"
    else:
        remedy = "divide by 255" if most > 2 else "clamp them"
    wanted = "−1…1 (pixel_range)" if low else "0…1"
    raise UserError(
        f"{name}: floats must lie in {wanted}, got {least:.6g}…{most:.6g} ({describe(levels)}); {remedy}, or yield "
        "uint8"
    )


def unit_mask(mask: object, pixels: Tensor, name: str = "mask") -> Tensor:
    """A batch's mask, resized to the images.

    Args:
        mask: ``b 1 H' W'`` or ``b H' W'``, b that of the images or 1; bool, float 0…1 or uint8. White = 1 = repaint.
            A uint8 mask whose largest value is 1 is a 0/1 mask, as segmentation tools write them.
        pixels: ``b c H W``, the whole images, before any crop.
        name: of the key.

    Returns:
        ``b 1 H W`` or ``1 1 H W`` float32 in 0…1, resized bilinearly without antialias where its size differs.

    Raises:
        UserError: naming what was found and what is right.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        hint = "; a mask of a single image needs a batch axis: mask[None]" if getattr(mask, "ndim", 0) == 2 else ""
        raise UserError(f"{name}: expected a tensor of shape b 1 H W or b H W, got {describe(mask)}{hint}")
    if mask.shape[0] not in (1, pixels.shape[0]):
        raise UserError(
            f"{name}: got {mask.shape[0]} masks for {pixels.shape[0]} images ({describe(mask)}); "
            "give one an image, or one for all"
        )
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if mask.dtype == torch.uint8:
        white = torch.where(mask.amax(dim=(1, 2, 3), keepdim=True) > 1, 255.0, 1.0)
        mask = mask / white
    elif mask.dtype == torch.bool or mask.is_floating_point():
        if mask.is_floating_point() and (pixels.is_floating_point() or mask.device.type == "cpu"):
            check_range(mask, name)  # elsewhere a look would make uint8 images wait for the device
        mask = mask.float()
    else:
        raise UserError(f"{name}: expected bool, uint8 in 0…255 or float in 0…1, got {describe(mask)}")
    if mask.shape[-2:] != pixels.shape[-2:]:
        mask = F.interpolate(mask, size=pixels.shape[-2:], mode="bilinear")
    return mask


def is_image(image: object) -> bool:
    """Whether something is a single image: a tensor or an array of three dimensions, or one of Pillow's."""
    return hasattr(image, "getbands") or getattr(image, "ndim", 0) == 3


def how_to_convert(images: object, layout: str = "CHW") -> str:
    """How to make a batch of images of what is none: a single one, PIL images, arrays, or a list of any of these.

    Args:
        images: what was given in their place.
        layout: of the data module.

    Returns:
        The end of a sentence; empty where nothing is known.
    """
    if isinstance(images, Tensor):
        return "; a single image needs a batch axis: images[None]" if is_image(images) else ""
    if not isinstance(images, list | tuple):
        code = _to_tensor(images, "images", layout)
        return f"; convert it: {code}{'[None]' if is_image(images) else ''}" if code else ""
    if len({type(image) for image in images}) != 1:
        return ""
    code = _to_tensor(images[0], "image", layout)
    if not code:
        return ""
    if len({image.size if hasattr(image, "getbands") else image.shape for image in images}) > 1:
        return (
            " of images of different sizes; give them one size in the data (pixels.size), batches of one size "
            "(pixels=folder_buckets), or set batch_size=1"
        )
    join = "stack" if is_image(images[0]) else "cat"
    if code == "image":
        return f" of images; {join} them: torch.{join}(images)"
    return f" of images; convert and {join} them: torch.{join}([{code} for image in images])"


def _to_tensor(image: object, name: str, layout: str) -> str:
    """The code that makes a tensor of a PIL image, an array or a tensor; empty for anything else."""
    if isinstance(image, Tensor):
        return name if image.ndim in (3, 4) else ""
    if hasattr(image, "getbands"):
        code = f"torch.from_numpy(numpy.array({name}.convert('RGB')))"
        return code if layout == "HWC" else f"{code}.permute(2, 0, 1)"
    shape: tuple[int, ...] = getattr(image, "shape", ())
    if not hasattr(image, "__array_interface__") or len(shape) not in (3, 4):
        return ""
    code = f"torch.from_numpy({name})"
    if layout == "HWC" or shape[-1] not in (1, 3, 4):
        return code
    return f"{code}.permute({'2, 0, 1' if len(shape) == 3 else '0, 3, 1, 2'})"
