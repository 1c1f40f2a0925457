"""How much memory a picture may take: known from its head, before any is taken.

A file of a kilobyte can declare a hundred million pixels, and be right: they are all black. What a picture takes
depends on its decoder and on its mode; both were measured (``tests/slow/test_data_memory.py`` does it again).
"""

from PIL import Image

from latentdm.errors import UserError

MAX_PIXELS = 178_956_970
"""The largest image that is decoded unless a user says otherwise: Pillow's own limit against decompression bombs."""

MIB = 1 << 20

BYTES_PER_BYTE = 448
"""How many bytes of memory a file may take for each of its own, and for each of a MiB where it has fewer."""

STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes that Pillow keeps for a pixel of a mode; of all others four."""


def check_memory(image: Image.Image, file_bytes: int, max_pixels: int, lying: bool = False) -> None:
    """Raise UserError where an image would take more memory than a file of its size may.

    Args:
        image: opened, and reduced if it is to be; not decoded.
        lying: it has to be turned upright.
        file_bytes: the size of its file.
        max_pixels: a user's limit; one above `MAX_PIXELS` allows for more memory as well.
    """
    rows = 4 * STORED.get(image.mode, 4) * image.width  # two of them, of 16 bits: all of a picture of one row
    needed = image.width * image.height * bytes_per_pixel(image, lying) + rows
    allowed = BYTES_PER_BYTE * max(file_bytes, MIB) * max(max_pixels / MAX_PIXELS, 1)
    if needed > allowed:
        raise UserError(
            f"its {image.width} × {image.height} pixels of mode {image.mode} take {needed / MIB:.0f} MiB, and a file "
            f"of {file_bytes} bytes may take {allowed / MIB:.0f} (set max_pixels above {MAX_PIXELS} to allow for more)"
        )


def bytes_per_pixel(image: Image.Image, lying: bool = False) -> float:
    """What a pixel takes at the peak: the decoder, the image, and its conversion to 8 bits of gray or RGB."""
    return _decoder(image) + _converted(image, lying)


def _converted(image: Image.Image, lying: bool) -> float:
    """The image as it is decoded, beside what it is turned into."""
    stored = STORED.get(image.mode, 4)
    transparent, profile = image.has_transparency_data, bool(image.info.get("icc_profile"))
    peak = 2 * stored if lying else stored
    if image.mode in ("1", "L") and not transparent:
        return max(peak, stored + (4 if profile else 1))
    if image.mode == "RGB" and not transparent:
        return max(peak, stored + 1)  # as a mask it becomes gray
    if image.mode.startswith(("I", "F")):
        return max(peak, stored + 1, 5 if profile else 0)
    if image.mode in ("RGBA", "LA"):
        return max(peak, stored + 2 + (4 if profile else 0))  # a channel after another; with a profile the colours
    # Turned into RGB or RGBA; alpha, and the colours without it for a profile, are copies as well.
    return max(peak, stored + 4 + 1 + transparent * (4 if profile else 0))


def _decoder(image: Image.Image) -> float:
    """What the decoder of a format keeps for itself."""
    if image.format in ("JPEG", "MPO"):
        # A file of several passes keeps all coefficients, of two bytes, of the whole image however far it is reduced;
        # whether it has several is known at its end.
        layers = getattr(image, "layer", ())
        reduction = max(getattr(image, "decoderconfig", ())[:1] or (1,))
        widest = max((across for _, across, *_ in layers), default=1) * max((layer[2] for layer in layers), default=1)
        return float(2 * sum(across * down for _, across, down, *_ in layers) / widest * reduction**2)
    if image.format in ("TIFF", "PPM"):
        return 2 * STORED.get(image.mode, 4)  # a strip of 16 bits may be all of it
    return {"WEBP": 12.5, "AVIF": 16.0, "GIF": 1.0, "BMP": 3.0}.get(str(image.format), 0.0)
