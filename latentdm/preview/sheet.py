"""Sheets of pictures: one row a sample, a tile under each column header. Drawn with Pillow alone.

Shapes: ``b`` batch, ``h w`` pixels, ``z`` latent channels. Images are float in 0…1.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MAX_TILE, MIN_TILE = 256, 96
"""Longer sides of tiles in pixels: larger images shrink, smaller ones grow by a whole factor."""

GAP, MARGIN, LINE_HEIGHT = 6, 14, 17
"""In pixels."""

INK, FAINT, PAPER = (25, 25, 25), (110, 110, 110), (255, 255, 255)
RED = (1.0, 0.15, 0.1)
ORANGE = (1.0, 0.55, 0.0)


@dataclass(frozen=True)
class Sheet:
    r"""Where everything lies on a sheet, and how it is drawn.

    Args:
        columns: headers, of one or more lines each.
        size: ``(width, height)`` of the images. Tiles have that size wherever it is in 96…256.

    Example:
        >>> sheet = Sheet(["image", "decoded\nlatents"], size=(128, 128))
        >>> sheet.box(row=0, column=1)
        (148, 76, 276, 204)
    """

    columns: Sequence[str]
    size: tuple[int, int]

    @property
    def tile(self) -> tuple[int, int]:
        """``(width, height)`` of a tile."""
        longer = max(self.size)
        if longer > MAX_TILE:
            width, height = (max(1, round(side * MAX_TILE / longer)) for side in self.size)
        else:
            width, height = (side * max(1, -(-MIN_TILE // longer)) for side in self.size)
        return width, height

    @property
    def _header(self) -> int:
        """The height of the headers."""
        return LINE_HEIGHT * max(column.count("\n") + 1 for column in self.columns)

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of a tile, as Pillow's ``crop`` takes them."""
        width, height = self.tile
        left = MARGIN + column * (width + GAP)
        upper = MARGIN + self._header + row * (height + LINE_HEIGHT + 2 * GAP) + LINE_HEIGHT + GAP
        return left, upper, left + width, upper + height

    def draw(self, rows: Sequence[Sequence[Tensor]], titles: Sequence[str], notes: Sequence[str] = ()) -> Image.Image:
        """The sheet as a picture.

        Args:
            rows: for each sample one image a column, ``3 h w`` or ``1 h w`` in 0…1; an image of another size, such as
                one at latent resolution, is stretched to the tile, its pixels left sharp.
            titles: one a sample, written above its row. What does not fit is cut, in front of the first ``·`` if there
                is one: figures behind a long name stay.
            notes: sentences to go below the rows, wrapped to the width of the sheet.
        """
        *_, right, lower = self.box(len(rows) - 1, len(self.columns) - 1)
        font = ImageFont.load_default(13)
        lines = [line for note in notes for line in _wrapped(note, font, right - MARGIN)]
        footer = 2 * GAP + LINE_HEIGHT * len(lines) if lines else 0
        picture = Image.new("RGB", (right + MARGIN, lower + footer + MARGIN), PAPER)
        pen = ImageDraw.Draw(picture)
        for column, header in enumerate(self.columns):
            pen.multiline_text((self.box(0, column)[0], MARGIN), header, INK, font, spacing=2)
        for row, (tiles, title) in enumerate(zip(rows, titles, strict=True)):
            left, upper, *_ = self.box(row, 0)
            pen.text((left, upper - LINE_HEIGHT - 1), _shortened(title, font, right - left), FAINT, font)
            for column, tile in enumerate(tiles):
                picture.paste(self._scaled(to_image(tile)), self.box(row, column))
        for number, line in enumerate(lines):
            pen.text((MARGIN, lower + 2 * GAP + number * LINE_HEIGHT), line, INK, font)
        return picture

    def _scaled(self, image: Image.Image) -> Image.Image:
        if image.size == self.tile:
            return image
        shrinks = image.width > self.tile[0]
        return image.resize(self.tile, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)


def to_image(image: Tensor) -> Image.Image:
    """``3 h w`` or ``1 h w`` in 0…1 on any device → an RGB picture."""
    levels = image.detach().float().cpu().expand(3, -1, -1).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def tinted(image: Tensor, mask: Tensor, color: tuple[float, float, float] = RED, strength: float = 0.5) -> Tensor:
    """``b 3 h w`` images, coloured where ``b 1 h w`` masks (or one for all) are 1."""
    weight = mask.to(image.device, image.dtype) * strength
    return image * (1 - weight) + weight * image.new_tensor(color).view(1, 3, 1, 1)


def three_components(latents: Tensor) -> Tensor:
    """Latents as colour: red, green and blue are the first three principal components of their channels.

    Args:
        latents: ``b z h w``; the components are those of the whole batch, so that its pictures compare.

    Returns:
        ``b 3 h w`` float32 in 0…1 on the CPU; middle gray for components that fewer than three channels lack.
    """
    z = latents.detach().float().cpu()
    channels = z.movedim(1, -1).flatten(0, -2)
    centred = channels - channels.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :3]
    axes = axes * torch.gather(axes, 0, axes.abs().argmax(0, keepdim=True)).sign()  # a direction has no sign of its own
    values = centred @ axes
    low, high = torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.02, 0.98]), dim=0)
    colours = torch.full((len(values), 3), 0.5)
    colours[:, : values.shape[1]] = ((values - low) / (high - low).clamp_min(1e-6)).clamp_(0, 1)
    return colours.view(len(z), *z.shape[2:], 3).movedim(-1, 1)


def _shortened(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A title that fits; of what stands in front of its figures at least the beginning stays."""
    title = " ".join(title.split())
    name, separator, figures = title.partition(" · ")
    room = width - font.getlength(separator + figures)
    if room > font.getlength("…") * 3:
        title = _cut(name, font, int(room)) + separator + figures
    return _cut(title, font, width)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """One line that fits."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    # Names and captions may be of any length, and to measure one costs as much as its length.
    length = bisect_right(range(min(len(text), width)), width, key=lambda end: ceil(font.getlength(f"{text[:end]}…")))
    return f"{text[: max(length - 1, 0)]}…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
