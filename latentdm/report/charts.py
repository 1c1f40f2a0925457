"""Charts as inline SVG: all are rows of a name, a bar and a number, which the page's template draws.

A chart is as wide as a phone, so that its letters are never scaled down; wider pages set several side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

BINS = 20
"""Bars of a histogram, about."""

MAX_ROWS = 24
"""Categories with a bar of their own."""


@dataclass(frozen=True)
class Bar:
    """A row.

    Attributes:
        name: what stands in front of it.
        start: where it begins, in 0…1.
        end: where it ends; without a bar the same.
        told: the number behind it.
    """

    name: str
    start: float
    end: float
    told: str


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        title: what it shows.
        summary: the same in numbers, for those who do not see it.
        bars: its rows.
        zero: where the number 0 lies, in 0…1.
    """

    title: str
    summary: str
    bars: list[Bar]
    zero: float = 0.0


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
    names = [f"{_number(start + n * step)} to {_number(start + (n + 1) * step)}{unit}" for n in range(count)]
    if cut:
        names.append(f"{_number(start + count * step)}{unit} and more")
    counts = [0] * len(names)
    for value in ordered:
        counts[min(int((value - start) / step + 1e-9), len(counts) - 1)] += 1
    summary = (
        f"{title}: {len(ordered)} values from {_number(ordered[0])} to {_number(ordered[-1])}{unit}, median "
        f"{_number(ordered[len(ordered) // 2])}{unit}; most are in {names[counts.index(max(counts))]}"
    )
    return _counted(title, summary, names, counts)


def rows(title: str, counts: Mapping[str, int]) -> Chart:
    """How often each of some categories is there: a bar in each row, in the order given; the rarest share the last."""
    shown = dict(counts)
    if len(shown) > MAX_ROWS:
        kept = sorted(counts, key=lambda name: -counts[name])[: MAX_ROWS - 1]
        shown = {name: count for name, count in counts.items() if name in kept}
        shown[f"{len(counts) - len(shown)} others"] = sum(counts.values()) - sum(shown.values())
    most = max(shown, key=lambda name: shown[name])
    summary = f"{title}: {len(counts)} of them, most in {most} ({shown[most]} of {sum(counts.values())})"
    return _counted(title, summary, list(shown), list(shown.values()))


def spread(title: str, mean: Sequence[float], std: Sequence[float]) -> Chart:
    """Of each channel a bar from mean − std to mean + std, around 0."""
    channels = list(zip(mean, std, strict=True))
    top = max([1.2, *(abs(m) + s for m, s in channels if isfinite(m) and isfinite(s))])
    summary = (
        f"{title}: {len(mean)} channels; means from {min(mean):.2f} to {max(mean):.2f}, standard deviations from "
        f"{min(std):.2f} to {max(std):.2f}"
    )
    bars = []
    for n, (m, s) in enumerate(channels):
        ends = (m - s, m + s) if isfinite(m) and isfinite(s) else (0.0, 0.0)
        start, end = (0.5 + value / top / 2 for value in ends)
        bars.append(Bar(f"channel {n}", start, end, f"{m:.2f} ± {s:.2f}".replace("-", "−")))
    return Chart(title, summary, bars, 0.5)


def _counted(title: str, summary: str, names: Sequence[str], counts: Sequence[int]) -> Chart:
    bars = [Bar(name, 0.0, count / max(counts), f"{count:,}") for name, count in zip(names, counts, strict=True)]
    return Chart(title, summary, bars)


def _step(least: float, whole: bool) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no smaller; an integer, if so wanted."""
    power = 10.0 ** floor(log10(least))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))
    return max(step, 1.0) if whole else step


def _number(value: float) -> str:
    """In few letters; minus as it is printed."""
    rounded = round(value, 4) + 0.0
    return (f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:g}").replace("-", "−")
