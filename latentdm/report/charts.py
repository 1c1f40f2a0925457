"""Charts as inline SVG: positions are computed here, and the page's template draws them.

A chart is as wide as a phone, so that its letters are never scaled down; wider pages set several side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 340, 180
"""In pixels."""

LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 24
"""Margins that hold the labels of the axes."""

BINS = 20
"""Bars of a histogram, about."""

MAX_ROWS = 24
"""Categories with a bar of their own."""


@dataclass(frozen=True)
class Bar:
    """A rectangle, and what a pointer on it is told."""

    x: float
    y: float
    width: float
    height: float
    told: str


@dataclass(frozen=True)
class Label:
    """A text at a place; ``anchor`` is SVG's: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        title: what it shows.
        summary: the same in numbers, for those who do not see it.
        height: of the drawing.
        bars: its rectangles.
        labels: its texts.
        lines: horizontal ones, from ``LEFT`` to the right, by their height.
        dots: places of dots, as (x, y).
    """

    title: str
    summary: str
    height: float = HEIGHT
    width: float = WIDTH
    bars: list[Bar] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    lines: list[float] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)
    left: float = LEFT
    right: float = WIDTH - RIGHT


def histogram(
    title: str, values: Sequence[float], unit: str = "", limits: tuple[float, float] | None = None, whole: bool = False
) -> Chart:
    """How often values lie in each of some ranges. Those far above nearly all others share the last bar.

    Args:
        title: what they are.
        values: at least one, finite.
        unit: behind numbers, as `` px`` or ``%``.
        limits: lowest and highest value that there may be; None: those that there are.
        whole: the values are integers.
    """
    ordered = sorted(values)
    low, high = limits or (ordered[0], ordered[-1])
    usual = ordered[ceil(0.95 * (len(ordered) - 1))]
    cut = limits is None and high - low > 3 * (usual - low) > 0
    step = _step(((usual if cut else high) - low) / BINS or abs(low) / BINS or 1.0, whole)
    start = floor(low / step + 1e-9) * step
    count = max(1, ceil(((usual if cut else high) - start) / step + (1e-9 if limits is None else -1e-9)))
    counts = [0] * (count + cut)
    for value in ordered:
        counts[min(int((value - start) / step + 1e-9), len(counts) - 1)] += 1
    names = [f"{_number(start + n * step)} to {_number(start + (n + 1) * step)}{unit}" for n in range(count)]
    if cut:
        names.append(f"{_number(start + count * step)}{unit} and more")
    middle = ordered[len(ordered) // 2]
    summary = (
        f"{title}: {len(ordered)} values from {_number(ordered[0])} to {_number(ordered[-1])}{unit}, median "
        f"{_number(middle)}{unit}; most are in {names[counts.index(max(counts))]}"
    )
    chart = Chart(title, summary)
    floor_y, slot = HEIGHT - BOTTOM, (WIDTH - LEFT - RIGHT) / len(counts)
    scale = (floor_y - TOP) / max(counts)
    for n, (found, name) in enumerate(zip(counts, names, strict=True)):
        if found:
            height = max(found * scale, 1.0)
            chart.bars.append(
                Bar(LEFT + n * slot + 0.5, floor_y - height, max(slot - 1, 0.5), height, f"{name}: {found}")
            )
    _count_axis(chart, max(counts), scale, floor_y)
    every = max(1, ceil(len(counts) / 5))
    for n in range(0, len(counts) + 1 - cut, every):
        anchor = "end" if n == len(counts) else "middle"
        chart.labels.append(Label(LEFT + n * slot, HEIGHT - 8, f"{_number(start + n * step)}{unit}", anchor))
    if cut:
        chart.labels.append(Label(WIDTH - RIGHT, TOP + 2, "last bar: and more", "end"))
    return chart


def rows(title: str, counts: Mapping[str, int]) -> Chart:
    """How often each of some categories is there: a bar in each row, in the order given; the rarest share the last."""
    shown = dict(counts)
    if len(shown) > MAX_ROWS:
        kept = sorted(counts, key=lambda name: -counts[name])[: MAX_ROWS - 1]
        shown = {name: count for name, count in counts.items() if name in kept}
        shown[f"{len(counts) - len(shown)} others"] = sum(counts.values()) - sum(shown.values())
    most = max(shown, key=lambda name: shown[name])
    summary = f"{title}: {len(counts)} of them, most in {most} ({shown[most]} of {sum(counts.values())})"
    left, row = 92, 22
    chart = Chart(title, summary, height=len(shown) * row + 8, left=left)
    scale = (WIDTH - left - 56) / shown[most]
    for n, (name, count) in enumerate(shown.items()):
        y, width = 4 + n * row, max(count * scale, 1.0)
        chart.bars.append(Bar(left, y + 3, width, row - 6, f"{name}: {count}"))
        chart.labels.append(Label(left - 6, y + row / 2 + 4, name, "end"))
        chart.labels.append(Label(left + width + 5, y + row / 2 + 4, f"{count:,}", "start"))
    return chart


def spread(title: str, mean: Sequence[float], std: Sequence[float]) -> Chart:
    """Of each channel a bar from mean − std to mean + std and a dot at the mean; lines lie at −1, 0 and 1."""
    pairs = [(m, s) for m, s in zip(mean, std, strict=True) if isfinite(m) and isfinite(s)]
    top = max([1.2, *(abs(m) + s for m, s in pairs)])
    summary = (
        f"{title}: {len(mean)} channels; means from {min(mean):.2f} to {max(mean):.2f}, standard deviations from "
        f"{min(std):.2f} to {max(std):.2f}"
    )
    chart = Chart(title, summary)
    middle, scale = (TOP + HEIGHT - BOTTOM) / 2, (HEIGHT - BOTTOM - TOP) / 2 / top
    slot = (WIDTH - LEFT - RIGHT) / len(mean)
    width = min(max(slot * 0.5, 0.8), 14)
    for n, (m, s) in enumerate(zip(mean, std, strict=True)):
        if isfinite(m) and isfinite(s):
            x = LEFT + (n + 0.5) * slot
            told = f"channel {n}: mean {m:.2f}, std {s:.2f}"
            chart.bars.append(Bar(x - width / 2, middle - (m + s) * scale, width, max(2 * s * scale, 0.5), told))
            chart.dots.append((x, middle - m * scale))
    for value in (-1, 0, 1) if top < 4 else (-round(top), 0, round(top)):
        y = middle - value * scale
        chart.lines.append(y)
        chart.labels.append(Label(LEFT - 5, y + 4, str(value).replace("-", "−"), "end"))
    for n in range(0, len(mean), max(1, ceil(len(mean) / 8))):
        chart.labels.append(Label(LEFT + (n + 0.5) * slot, HEIGHT - 8, str(n)))
    return chart


def _count_axis(chart: Chart, most: int, scale: float, floor_y: float) -> None:
    """Lines at nothing, and at a round number near the top."""
    step = _step(most / 3, whole=True)
    for n in range(int(most // step) + 1):
        y = floor_y - n * step * scale
        chart.lines.append(y)
        chart.labels.append(Label(LEFT - 5, y + 4, _number(n * step), "end"))


def _step(least: float, whole: bool) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no smaller; an integer, if so wanted."""
    power = 10.0 ** floor(log10(least))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))
    return max(step, 1.0) if whole else step


def _number(value: float) -> str:
    """In few letters; minus as it is printed."""
    rounded = round(value, 4) + 0.0
    return (f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:g}").replace("-", "−")
