"""The shapes of random masks: what each kind draws for a sample, and how it is painted for all samples at once.

Each kind is a field: how far its shapes must swell to reach a pixel. A mask is where its field is below a level, which
is read off the field such that the share asked for is covered. Upright shapes are painted from their rows and columns
alone; the others on a coarse field, which is then drawn out to the size of the image.

Shapes: ``b`` masks, ``n`` shapes a mask, ``k`` numbers a shape, ``H W`` pixels. Lengths are in units of the image's
short side; ``extent`` is its (width, height) in these.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.draws import Draws

MEASURED_SIDE = 64
"""Side of the grid, in pixels, on which the share of a mask is measured."""

FIELD_SIDE = 128
"""Short side of the coarse field, in pixels; smaller images have a field of their own size."""

Size = tuple[int, int]


class Shapes(ABC):
    """One kind of shapes: a subclass of `Upright`, which paints rectangles, or of `Freeform`, which paints a field."""

    @abstractmethod
    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """What places the shapes of each mask: ``b n k`` on the CPU, the same ``n`` for all of them (`_keep`)."""

    @abstractmethod
    def paint(self, shapes: Tensor, share: Tensor, size: Size) -> Tensor:
        """``b n k`` and the share of each mask, ``b``, on the device → ``b H W`` bool: never empty, never full."""


class Upright(Shapes):
    """Rectangles: centre x, y, one over the half width and over the half height."""

    def paint(self, shapes: Tensor, share: Tensor, size: Size) -> Tensor:
        """Where both the row and the column of a pixel lie in the same rectangle."""
        x, y = _axes(size, size, shapes.device)
        centre_x, centre_y, per_x, per_y = shapes[..., None].unbind(2)
        across, down = (x - centre_x).abs() * per_x, (y - centre_y).abs() * per_y  # b n W, b n H
        rows, columns = _measured(size)
        field = torch.maximum(down[:, :, rows, None], across[:, :, None, columns]).amin(1)
        level = _level(field, share)
        painted = torch.zeros(len(shapes) * size[0], size[1], dtype=torch.bool, device=shapes.device)
        outside = torch.zeros_like(painted[:1])
        own = torch.arange(1, len(shapes) + 1, device=shapes.device)[:, None]
        for row, column in zip((down <= level).unbind(1), (across <= level).unbind(1), strict=True):
            # Whole rows are copied, each an empty one or its mask's: several times as fast as `row & column`.
            painted |= torch.cat([outside, column]).index_select(0, (row * own).flatten())
        return painted.view(len(shapes), *size)


class Boxes(Upright):
    """low…high boxes anywhere."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b high 4``."""
        numbers = draws.uniform("boxes", 1 + 4 * self.high)
        centre, half = numbers[:, 1:].view(-1, self.high, 4).chunk(2, dim=-1)
        boxes = torch.cat([centre * extent, 1 / (half * 0.8 + 0.2)], dim=-1)
        return _keep(boxes, _count(numbers[:, 0], self.low, self.high))


class Borders(Upright):
    """What lies beyond low…high sides of a rectangle: to outpaint. Each side is a box as long as the image."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b 4 4``."""
        numbers = draws.uniform("borders", 9)
        width, height = extent.tolist()
        sides = torch.tensor([[0, 0, 1, 0], [width, 0, 1, 0], [0, 0, 0, 1], [0, height, 0, 1]], dtype=torch.float32)
        order = numbers[:, 1:5].argsort(dim=1)
        depth = (numbers[:, 5:] * 0.8 + 0.2)[..., None]
        borders = torch.cat([sides[order, :2], sides[order, 2:] / depth], dim=-1)
        return _keep(borders, _count(numbers[:, 0], self.low, self.high))


class Freeform(Shapes):
    """Shapes with a field that is smooth enough to be drawn out from a coarse one."""

    @abstractmethod
    def field(self, shapes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """``b n k``, ``w`` and ``h 1`` → ``b h w``, in any unit: the lowest part is masked, as much as the share asks.

        Pixels of the same value are masked together, so a field of few values misses its share, or masks nothing.
        """

    def paint(self, shapes: Tensor, share: Tensor, size: Size) -> Tensor:
        """The coarse field, drawn out bilinearly, below its level."""
        step = max(min(size) // FIELD_SIDE, 1)
        x, y = _axes(size, (-(-size[0] // step), -(-size[1] // step)), shapes.device)
        field = self.field(shapes, x, y[:, None])
        if step > 1:
            field = F.interpolate(field[None], size=size, mode="bilinear")[0]
        rows, columns = _measured(size)
        return field <= _level(field[:, rows, columns], share)


class Strokes(Freeform):
    """A chain of low…high round strokes: start x, y, step x, y, one over the squared length and squared width."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b high 6``."""
        numbers = draws.uniform("strokes", 3 + 3 * self.high)
        strokes = numbers[:, 3:].view(-1, self.high, 3)
        points = [numbers[:, 1:3] * extent]
        for number in range(self.high):
            step = (strokes[:, number, :2] - 0.5) * 1.5
            points.append((points[-1] + step).clamp_min(0).minimum(extent))
        ends = torch.stack(points, dim=1)
        step = ends[:, 1:] - ends[:, :-1]
        per_length = 1 / (step * step).sum(-1, keepdim=True).clamp_min(1e-6)
        width = strokes[..., 2:] * 0.5 + 0.5
        chain = torch.cat([ends[:, :-1], step, per_length, 1 / (width * width)], dim=-1)
        return _keep(chain, _count(numbers[:, 0], self.low, self.high))

    def field(self, shapes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The least squared distance to a stroke, in its width."""
        nearest: Tensor | None = None
        for start_x, start_y, step_x, step_y, per_length, per_width in _each(shapes):
            from_x, from_y = x - start_x, y - start_y
            along = (from_x * (step_x * per_length) + from_y * (step_y * per_length)).clamp_(0, 1)
            off_x = (along * step_x).sub_(from_x)
            off_y = along.mul_(step_y).sub_(from_y)
            away = off_x.mul_(off_x).add_(off_y.mul_(off_y)).mul_(per_width)
            nearest = away if nearest is None else torch.minimum(nearest, away, out=nearest)
        assert nearest is not None
        return nearest


class Polygons(Freeform):
    """low…high polygons around a centre, of 3…``corners`` corners: for each edge centre x, y and a 2×2 matrix.

    The matrix takes a point to its coordinates in the edge's two corners: where neither is below zero the point lies in
    the triangle's sector, and their sum is how far the polygon must swell to reach it.
    """

    def __init__(self, low: int, high: int, corners: int = 7) -> None:
        self.low = low
        self.high = high
        self.corners = corners

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b high·corners 6``."""
        k = self.corners
        numbers = draws.uniform("polygons", 1 + self.high * (4 + 2 * k))
        polygon = numbers[:, 1:].view(-1, self.high, 4 + 2 * k)
        centre, count, turn = polygon[..., :2] * extent, 3 + (polygon[..., 2:3] * (k - 2)).long(), polygon[..., 3:4]
        corner = torch.arange(k)
        # Jittered by less than half a step, so that no two neighbours are half a turn apart.
        angle = ((corner + polygon[..., 4 : 4 + k] * 0.45) / count + turn) * (2 * math.pi)
        radius = polygon[..., 4 + k :] * 0.7 + 0.3
        corners = radius[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        # Corners to spare lie on the last edge, where they change nothing.
        last = corners.gather(2, (count - 1)[..., None].expand(-1, -1, -1, 2))
        past = ((corner - count + 1) / (k - count + 1)).clamp_min(0)[..., None]
        corners = torch.where(past > 0, last + (corners[:, :, :1] - last) * past, corners)
        following = corners.roll(-1, dims=2)
        cross = corners[..., 0] * following[..., 1] - corners[..., 1] * following[..., 0]
        matrix = torch.stack([following[..., 1], -following[..., 0], -corners[..., 1], corners[..., 0]], dim=-1)
        edges = torch.cat([centre[:, :, None].expand(-1, -1, k, -1), matrix / cross[..., None]], dim=-1)
        return _keep(edges.flatten(2), _count(numbers[:, 0], self.low, self.high)).view(-1, self.high * k, 6)

    def field(self, shapes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The least factor by which a polygon must swell."""
        nearest: Tensor | None = None
        for centre_x, centre_y, ax, ay, bx, by in _each(shapes):
            from_x, from_y = x - centre_x, y - centre_y
            first, second = from_x * ax + from_y * ay, from_x * bx + from_y * by
            # A little tolerance, so that no crack opens between two sectors.
            outside = torch.minimum(first, second) < -1e-4
            away = first.add_(second).masked_fill_(outside, torch.inf)
            nearest = away if nearest is None else torch.minimum(nearest, away, out=nearest)
        assert nearest is not None
        return nearest


class Blobs(Freeform):
    """Smooth noise of two sizes, mixed: low-resolution random numbers, drawn out bicubically."""

    CELLS = (3, 6)

    def draw(self, draws: Draws, extent: Tensor) -> Tensor:
        """``b 1 k``: the two grids, weighted and flattened."""
        grids = [self._grid(cells, extent) for cells in self.CELLS]
        numbers = draws.uniform("blobs", 1 + sum(height * width for height, width in grids))
        weight = numbers[:, :1]
        large, small = torch.split(numbers[:, 1:], [height * width for height, width in grids], dim=1)
        return torch.cat([large * weight.clamp_min(0.3), small * (1 - weight)], dim=1)[:, None]

    def field(self, shapes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The sum of both noises."""
        extent = torch.tensor([len(x), len(y)]) / min(len(x), len(y))
        grids = [self._grid(cells, extent) for cells in self.CELLS]
        parts = torch.split(shapes[:, 0], [height * width for height, width in grids], dim=1)
        noises = [
            F.interpolate(part.view(1, -1, *grid), size=(len(y), len(x)), mode="bicubic")[0]
            for part, grid in zip(parts, grids, strict=True)
        ]
        return noises[0] + noises[1]

    def _grid(self, cells: int, extent: Tensor) -> Size:
        width, height = (max(round(cells * side), 2) for side in extent.tolist())
        return height, width


def _axes(size: Size, steps: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The centres of ``steps`` (rows, columns) equal parts of an image: x of the columns, y of the rows."""
    short = min(size)
    y, x = (
        (torch.arange(count, device=device) + 0.5) * (side / (count * short))
        for side, count in zip(size, steps, strict=True)
    )
    return x, y


def _measured(size: Size) -> tuple[slice, slice]:
    """The rows and the columns of pixels on which the share is measured."""
    rows, columns = (slice((step := -(-side // MEASURED_SIDE)) // 2, None, step) for side in size)
    return rows, columns


def _level(field: Tensor, share: Tensor) -> Tensor:
    """The level up to which a field covers the share asked for.

    Sorting 64² pixels of 512² costs nothing, and what holds for them holds for the image: at least one is in, and the
    highest one is out.

    Args:
        field: ``b h w`` float32.
        share: ``b`` float32, above 0 and at most 1.

    Returns:
        ``b 1 1`` float32.
    """
    levels = field.flatten(1).sort(dim=1).values
    rank = (share[:, None] * levels.shape[1]).ceil().long() - 1
    below_all = levels[:, -1:].nextafter(torch.full_like(share[:, None], -torch.inf))
    return levels.gather(1, rank).minimum(below_all)[..., None]


def _count(choice: Tensor, low: int, high: int) -> Tensor:
    return low + (choice * (high - low + 1)).long()


def _keep(shapes: Tensor, count: Tensor) -> Tensor:
    """The first ``count`` shapes of each mask; the others become copies of the first, which paint nothing new."""
    kept = torch.arange(shapes.shape[1]) < count[:, None]
    return torch.where(kept[..., None], shapes, shapes[:, :1])


def _each(shapes: Tensor) -> list[tuple[Tensor, ...]]:
    """The numbers of one shape after another, each ``b 1 1``."""
    return [shape[..., None, None].unbind(1) for shape in shapes.unbind(1)]
