"""Aspect-ratio buckets: which sizes images are cropped to, so that little is lost and a batch has one size.

Sizes are (width, height) in pixels, as Pillow gives them.
"""

import math

import numpy as np
import numpy.typing as npt

from latentdm.errors import UserError
from latentdm.validation import Check

Size = tuple[int, int]


class Buckets:
    """The sizes of buckets: all multiples of ``step`` between the limits, of about the same area.

    For each width the height is the largest multiple of ``step`` that keeps within ``area``, and each size is there
    lying and standing. An image goes to the bucket whose aspect ratio is nearest to its own.

    Args:
        area: the most pixels of an image after the crop: 1048576 is 1024².
        step: sides are multiples of it, which should be a multiple of the autoencoder's spatial compression.
        min_side: the smallest side; None: half the side of a square of ``area``.
        max_side: the largest side; None: twice the side of a square of ``area``.
        min_images: buckets with fewer images are merged into the nearest ones, the smallest first; 1 keeps all.

    Raises:
        ValueError: a setting is out of range, or no size lies within the limits.

    Example:
        >>> Buckets(area=512 * 512, step=128).shapes
        [(256, 1024), (256, 896), (256, 768), (384, 640), (512, 512), (640, 384), (768, 256), (896, 256), (1024, 256)]
    """

    def __init__(
        self,
        area: int = 1024 * 1024,
        step: int = 64,
        min_side: int | None = None,
        max_side: int | None = None,
        min_images: int = 1,
    ) -> None:
        check = Check("Buckets")
        self.area = check.integer("area", area, 1)
        self.step = check.integer("step", step, 1)
        self.min_side = math.isqrt(area) // 2 if min_side is None else check.integer("min_side", min_side, 1)
        self.max_side = math.isqrt(area) * 2 if max_side is None else check.integer("max_side", max_side, 1)
        self.min_images = check.integer("min_images", min_images, 1)
        self.shapes = self._shapes()
        if not self.shapes:
            raise UserError(
                f"Buckets: no multiple of step={step} lies in min_side={self.min_side}…max_side={self.max_side} with "
                f"an area of at most {area}; widen the limits or use a smaller step"
            )

    def _shapes(self) -> list[Size]:
        shapes: set[Size] = set()
        first = -(-self.min_side // self.step) * self.step
        for width in range(first, self.max_side + 1, self.step):
            height = min(self.area // width, self.max_side) // self.step * self.step
            if height >= first:
                shapes |= {(width, height), (height, width)}
        # Of two sizes with one aspect ratio, the smaller would only lose pixels.
        largest: dict[float, Size] = {}
        for shape in sorted(shapes):
            largest[shape[0] / shape[1]] = shape
        return [largest[aspect] for aspect in sorted(largest)]

    def plan(self, sizes: npt.ArrayLike) -> "BucketPlan":
        """Assign images to buckets, and merge those that have too few.

        Args:
            sizes: ``n 2`` integers above 0, the width and the height of each image as a person sees it (after its EXIF
                orientation).

        Raises:
            ValueError: no images, or sizes of another shape.
        """
        sides = np.asarray(sizes)
        if sides.ndim != 2 or sides.shape[1] != 2 or len(sides) == 0 or sides.min() < 1:
            raise UserError(f"Buckets: expected a width and a height above 0 for each image, got {sides.shape}")
        shapes = self.shapes
        merged: list[tuple[Size, int]] = []
        while True:
            plan = BucketPlan(shapes, sides, tuple(merged))
            counts = plan.counts
            smallest = int(np.where(counts > 0, counts, len(sides) + 1).argmin())
            if counts[smallest] >= self.min_images or (counts > 0).sum() == 1:
                return plan
            merged.append((shapes[smallest], int(counts[smallest])))
            shapes = [shape for bucket, shape in enumerate(shapes) if counts[bucket] and bucket != smallest]


class BucketPlan:
    """Which image is in which bucket.

    Args:
        shapes: the sizes of the buckets, by aspect ratio.
        sizes: ``n 2``, as `Buckets.plan` takes them.
        merged: the buckets that were given up, and how many images each had.

    Attributes:
        bucket_of: ``n``: each image's bucket, an index into ``shapes``, as uint8 if that has room for it.
        counts: the number of images of each bucket.
    """

    def __init__(
        self, shapes: list[Size], sizes: npt.NDArray[np.integer], merged: tuple[tuple[Size, int], ...]
    ) -> None:
        self.shapes = shapes
        self.merged = merged
        aspects = np.log([width / height for width, height in shapes])
        self._between = (aspects[1:] + aspects[:-1]) / 2
        self.bucket_of = self.buckets(sizes)
        self.counts = np.bincount(self.bucket_of, minlength=len(shapes))

    def shape(self, width: int, height: int) -> Size:
        """The size to which an image of this size is cropped."""
        return self.shapes[int(self.buckets(np.array([[width, height]]))[0])]

    def buckets(self, sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """The bucket of each of some images, given their sizes ``n 2``: ``n`` indexes into ``shapes``."""
        return np.searchsorted(self._between, np.log(sizes[:, 0] / sizes[:, 1])).astype(
            np.min_scalar_type(len(self.shapes))
        )

    def table(self) -> str:
        """The number of images of each bucket, for a person to read."""
        used = [(shape, count) for shape, count in zip(self.shapes, self.counts, strict=True) if count]
        lines = [f"{int(self.counts.sum())} images in {len(used)} buckets", "    width × height    images"]
        for (width, height), count in used:
            lines.append(f"    {width:>5} × {height:<6}  {count:>8}")
        for (width, height), count in self.merged:
            lines.append(f"    {width:>5} × {height:<6}  {count:>8} too few: merged into the nearest bucket")
        return "\n".join(lines)
