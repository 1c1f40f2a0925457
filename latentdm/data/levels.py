"""Masks and label maps: what the levels of their files mean, and their resizing, of which what is kept is computed.

Shapes: ``H W`` is a picture as it lies in its file, ``h w`` what a crop keeps of it. Sizes are (width, height).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from latentdm.data.budget import MAX_PIXELS
from latentdm.data.decode import BLOCK, ImageFile, extremes, in_blocks, load, parts
from latentdm.data.skips import SampleError
from latentdm.errors import UserError

Indices = npt.NDArray[np.int64]

Pick = Callable[[Indices, Indices], npt.NDArray[Any]]
"""``pick(rows, columns)``: the levels where rows and columns of a picture meet, both in order."""

LOW_DEPTHS = {"2": 85, "4": 17}
"""Pillow spreads gray levels of 2 and 4 bits over 0…255; by these the 1 in such a file is multiplied."""

SENSORS: dict[float, int] = {1023: 10, 4095: 12, 16383: 14}
"""The highest levels of depths that cameras and scanners write into files of 16."""

NEARLY_GRAY = 16
"""The most by which the channels of a gray picture differ, after a JPEG."""

LUMINANCE = (0.299, 0.587, 0.114)
"""What a gray level takes of red, green and blue, as Pillow has it."""

MAX_PARTS = 1 << 26
"""The parts of which weights are counted: a level times two weights fits into 64 bits."""


def mask_image(file: ImageFile, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a mask, upright; its own transparency is ignored.

    A mask holds zeros and ones, or the levels from 0 to the most that its depth allows (1, 2, 4, 8, 16 or 32 bits, or
    floats in 0…1). A palette counts by its colours where these are gray, else by its numbers where they are 0 and 1.

    Returns:
        Of mode L, 255 = repaint.

    Raises:
        SampleError: the mask cannot be read, or is none: it has colours, or hardly any of the levels of its depth; the
            error names the file and says why.
    """
    return _read(file, name or "a mask", max_pixels, _mask)


def label_image(file: ImageFile, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a label map, upright: a number a pixel, which for a palette is that of its colour.

    Returns:
        Of mode L (8 bits), I;16 or I (32 bits).

    Raises:
        SampleError: it cannot be read, or holds colours or floats; the error names the file and says why.
    """
    return _read(file, name or "a label map", max_pixels, _labels)


def of_image(image: Image.Image) -> Pick:
    """The levels of an image."""

    def pick(rows: Indices, columns: Indices) -> npt.NDArray[Any]:
        left, right = int(columns[0]), int(columns[-1]) + 1
        height = max(BLOCK // (right - left), 1)
        picked, first = [], 0
        while first < len(rows):
            top = int(rows[first])
            last = int(np.searchsorted(rows, top + height))
            strip = image.crop((left, top, right, int(rows[last - 1]) + 1))
            picked.append(np.asarray(strip)[np.ix_(rows[first:last] - top, columns - left)])
            first = last
        return np.concatenate(picked)

    return pick


def resized(pick: Pick, size: tuple[int, int], new: tuple[int, int]) -> Pick:
    """Resize gray levels bilinearly, without antialias, as the inpainting encoders resize a mask.

    Gray levels stay, because rounding comes later. A level half-way between two integers goes down: the mean of 0 and
    255 is exactly 0.5, which later rounds to 0, and 128 would round to 1.

    Args:
        pick: uint8 levels.
        size: their width and height.
        new: those of the result.
    """

    def bilinear(rows: Indices, columns: Indices) -> npt.NDArray[Any]:
        x, left, right, across, width = _between(size[0], new[0], columns)
        y, upper, lower, down, height = _between(size[1], new[1], rows)
        levels = pick(y, x).astype(np.int64)
        levels = levels[:, left] * (width - across) + levels[:, right] * across
        levels = levels[upper] * (height - down)[:, None] + levels[lower] * down[:, None]
        whole = width * height
        kept: npt.NDArray[Any] = -((whole - 2 * levels) // (2 * whole))  # a half goes down
        return kept.astype(np.uint8)

    return pick if size == new else bilinear


def nearest(pick: Pick, size: tuple[int, int], new: tuple[int, int]) -> Pick:
    """Resize labels: each pixel takes the one that its centre falls into, as Pillow does it."""
    (width, height), (new_width, new_height) = size, new
    return lambda rows, columns: pick(
        (2 * rows + 1) * height // (2 * new_height), (2 * columns + 1) * width // (2 * new_width)
    )


def _read(
    file: ImageFile, name: str, max_pixels: int, convert: Callable[[Image.Image, str], Image.Image]
) -> Image.Image:
    image, layout = load(file, name, max_pixels)
    try:
        return convert(image, layout)
    except UserError as error:
        raise SampleError(f"cannot read {name if isinstance(file, bytes) else file}: {error}") from error


def _mask(image: Image.Image, layout: str) -> Image.Image:
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "F":
        low, high = extremes(image)
        if not 0 <= low <= high <= 1:  # what is not a number is in no range
            raise UserError(f"as a mask of floats it must be in 0…1, and spans {low:g}…{high:g}; save it with 8 bits")
        return in_blocks(image, lambda levels: np.round(levels * 255))
    if image.mode.startswith("I"):
        return _deep_mask(image, layout)
    if image.mode in ("P", "PA"):
        return _palette_mask(image)
    return _ones(_gray(image), LOW_DEPTHS.get(_bits(layout), 1))


def _deep_mask(image: Image.Image, layout: str) -> Image.Image:
    """A mask of 16 or 32 bits."""
    signed, wide = "S" in layout, image.mode == "I" and "16" not in layout
    period = 2**32 if wide and not signed else 0  # Pillow knows signed levels alone
    low, high = extremes(image)
    if low < 0 and period:
        low, high = 0, period - 1
    top = (2**32 if wide else 2**16) // (2 if signed else 1) - 1
    if wide and high <= 65535:
        top = 65535
    if low < 0:
        raise UserError(f"a mask has no levels below 0, and it has {low}; save it with 8 bits, white to repaint")
    if high <= 1:
        return in_blocks(image, lambda levels: levels * 255)
    if top == 65535 and high in SENSORS:
        raise UserError(
            f"its highest level, {high}, is white in {SENSORS[high]} bits and black in 16; save it with 8 bits, white "
            "to repaint"
        )
    if high * 255 < 1.5 * top:
        raise UserError(
            f"its highest level, {high} of {top}, would be black: save a mask with 0 and 1 or with 8 bits, and use "
            "masks=segmentation for a label map"
        )

    def levels_of(strip: npt.NDArray[Any]) -> npt.NDArray[Any]:
        levels = strip.astype(np.int64)
        rounded: npt.NDArray[Any] = np.floor((levels % period if period else levels) * (255 / top) + 0.5)
        return rounded

    return in_blocks(image, levels_of)


def _palette_mask(image: Image.Image) -> Image.Image:
    """A palette of grays by its colours, one of any colours by its numbers if these are 0 and 1."""
    numbers = image if image.mode == "P" else image.getchannel("P")
    used = [number for number, count in enumerate(numbers.histogram()) if count]
    colours = np.zeros((256, 3), dtype=np.int64)
    palette = np.array(image.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
    colours[: len(palette)] = palette
    if np.ptp(colours[used], axis=1).max() <= NEARLY_GRAY:
        return _ones(numbers.point(np.round(colours @ LUMINANCE).astype(int).tolist(), "L"))
    if used[-1] > 1:
        raise UserError(
            f"its palette has colours, and its numbers are {', '.join(map(str, used[:6]))}{', …' * (len(used) > 6)}: a "
            "mask is black and white, or has the numbers 0 and 1; use masks=segmentation for a label map"
        )
    return numbers.point([255 * (number == 1) for number in range(256)], "L")


def _gray(image: Image.Image) -> Image.Image:
    """The levels of an 8-bit picture without colours."""
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    coloured = image.mode.startswith("RGB")
    if coloured and any(_has_colours(part) for _, part in parts(image)):
        raise UserError(
            "it has colours, and a mask is black and white; save it as gray levels, white to repaint (a label map: by "
            "its numbers, for masks=segmentation)"
        )
    gray = image.convert("L") if coloured else image.getchannel("L")
    if image.mode.endswith("A") and _is_flat(gray) and not _is_flat(image.getchannel("A")):
        raise UserError("nothing but its transparency varies; save it as gray levels, white to repaint")
    return gray


def _has_colours(image: Image.Image) -> bool:
    red, *others = (image.getchannel(channel) for channel in "RGB")
    return any(extremes(ImageChops.difference(red, other))[1] > NEARLY_GRAY for other in others)


def _is_flat(channel: Image.Image) -> bool:
    low, high = extremes(channel)
    return low == high


def _ones(gray: Image.Image, one: int = 1) -> Image.Image:
    """A mask whose highest level is 1 holds zeros and ones."""
    high = extremes(gray)[1]
    return gray.point([255 * (level == one) for level in range(256)]) if high == one else gray


def _labels(image: Image.Image, layout: str) -> Image.Image:
    if image.format in ("JPEG", "MPO"):
        raise UserError("it is a JPEG, which changes the numbers of a label map; save it as PNG")
    if image.mode == "1":
        return image.convert("L").point([min(level, 1) for level in range(256)])
    if image.mode == "F":
        raise UserError("its levels are floats, and a label map holds integers; save it with 8 or 16 bits")
    if image.mode in ("P", "PA"):
        return (image if image.mode == "P" else image.getchannel("P")).point(list(range(256)), "L")
    if image.mode.startswith("I"):
        return image
    gray = _gray(image)
    spread = LOW_DEPTHS.get(_bits(layout), 1)
    return gray if spread == 1 else gray.point([level // spread for level in range(256)])


def _bits(layout: str) -> str:
    """The depth in Pillow's name of a gray layout, such as L;4 or L;2IR."""
    kind, _, depth = layout.partition(";")
    return depth[:1] if kind == "L" else ""


def _between(side: int, new: int, positions: Indices) -> tuple[Indices, Indices, Indices, Indices, int]:
    """Of positions along a resized side: which pixels they need; among these the one before and the one after each.

    And the latter's weight, in parts of a whole.

    In integers, and so exact: in floats a half would be more or less than that, by the processor.
    """
    parts = 2 * new
    place = np.maximum((2 * positions + 1) * side - new, 0)
    before, weight = place // parts, place % parts
    if parts > MAX_PARTS:
        weight, parts = weight * (MAX_PARTS / parts) // 1, MAX_PARTS
    needed, at = np.unique(np.concatenate([before, np.minimum(before + 1, side - 1)]), return_inverse=True)
    return needed, at[: len(positions)], at[len(positions) :], weight.astype(np.int64), parts
