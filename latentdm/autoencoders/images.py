"""What an autoencoder is given: images, some with a part hidden, prepared a chunk at a time.

Shapes: ``b`` batch, ``n`` images of a chunk, ``c`` channels, ``h w`` pixels; clips have an axis ``f`` before ``h w``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass  # not frozen: that triples the time to make one, which a small batch feels
class Images:
    """Images as they lie in the batch, and what is to be hidden of them. Nothing is computed until it is written.

    Args:
        pixels: ``b c h w`` or ``b c f h w``, uint8 0…255 or float 0…1. Gray (c = 1) is repeated, alpha (c = 4) dropped.
        hole: ``b 1 h w`` or ``1 1 h w`` bool, what is hidden.
        fill: by which level in 0…1 (black … white).
    """

    pixels: Tensor
    hole: Tensor | None = None
    fill: float = 0.5

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def unit(self) -> Tensor:
        """All of it, ``b 3 h w`` float32 in 0…1, for people to look at."""
        out = torch.empty((len(self), 3, *self.pixels.shape[2:]), dtype=torch.float32, device=self.pixels.device)
        self.write(slice(0, len(self)), out, 0.0, 1.0)
        return out

    def write(self, rows: slice, out: Tensor, low: float, high: float) -> None:
        """Write some rows into ``out``, ``n 3 h w`` float32, black as ``low`` and white as ``high``.

        One pass casts, repeats gray, lays out and may cross to the device; one multiply-add makes the range.
        """
        pixels = _rows(self.pixels, rows)
        out.copy_(pixels[:, :3] if pixels.shape[1] == 4 else pixels, non_blocking=True)
        if self.pixels.dtype == torch.uint8:
            # Not folded into the factor below, which would round differently from the pipelines.
            torch.div(out, _scalar(255.0, out.device), out=out)
        torch.add(_scalar(low, out.device), out, alpha=high - low, out=out)
        if self.hole is not None:
            hole = self.hole if len(self.hole) == 1 else _rows(self.hole, rows)
            out.masked_fill_(hole.to(out.device), low + self.fill * (high - low))


def prepare(
    sets: Sequence[Images],
    rows: slice,
    size: int,
    pixel_range: tuple[float, float],
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Tensor:
    """Some rows of several sets of images, one set behind the other, as the autoencoder takes them.

    Args:
        sets: all of one image size.
        rows: which of theirs.
        size: images in the result, at least as many as there are rows; those beyond are zero.
        pixel_range: black and white.
        channels: 3, or 4 for an opaque alpha.
        device: where to.
        dtype: to what; the arithmetic is float32 in any case.
        layout: of images; clips are contiguous.

    Returns:
        ``size channels h w`` (or ``size channels f h w``).
    """
    low, high = pixel_range
    n = rows.stop - rows.start
    shape = (size, channels, *sets[0].pixels.shape[2:])
    prepared = torch.empty(shape, dtype=torch.float32, device=device, memory_format=layout)
    color = prepared[:, :3] if channels == 4 else prepared
    if len(sets) == 1:  # without the search, which a small batch feels
        sets[0].write(rows, _rows(color, slice(0, n)), low, high)
    else:
        for images, theirs, ours in _overlaps(sets, rows):
            images.write(theirs, _rows(color, ours), low, high)
    if channels == 4:
        prepared[:n, 3].fill_(high)
    if size > n:
        prepared[n:].zero_()
    return prepared if dtype == torch.float32 else prepared.to(dtype)


def _overlaps(sets: Sequence[Images], rows: slice) -> Iterator[tuple[Images, slice, slice]]:
    """The sets that some rows come from, with the rows in the set and in the result."""
    start = 0
    for images in sets:
        first, last = max(rows.start, start), min(rows.stop, start + len(images))
        if first < last:
            yield images, slice(first - start, last - start), slice(first - rows.start, last - rows.start)
        start += len(images)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """``tensor[rows]``, without the cost of a view where that is all of it: small batches feel every call."""
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    """On the device: by a number from the CPU, CUDA would not divide but multiply by its rounded reciprocal."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)
