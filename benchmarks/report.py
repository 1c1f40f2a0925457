"""Writes what was measured into ``docs/benchmarks.md``, with a plot beside it."""

import json
import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

DOCS = Path(__file__).parents[1] / "docs"
TIMES = "times"
NOT_MEASURED = """## On a GPU

Not measured: no CUDA device was at hand. The same command measures it, there with larger batches, and
`benchmarks/gpu.py` adds what only a GPU shows (correctness against float32, 512² and 1024², eager and compiled,
memory, the share of the matrix peak). CUDA graphs (`compile: reduce-overhead`) are untested there as well.
"""


def device() -> str:
    """What the benchmarks ran on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    features = ", ".join(
        name for name, there in torch.cpu.get_capabilities().items() if there is True and "bf16" in name
    )
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads ({features or 'no bfloat16'})"


def write(lines: Sequence[str], command: str) -> None:
    """Write the table and the plot of a run.

    Args:
        lines: the rows, as JSON.
        command: that measured them.
    """
    rows = [json.loads(line) for line in lines]
    load = os.getloadavg()[0]
    text = [
        "# Benchmarks",
        "",
        f"`{command}` on {device()}, torch {torch.__version__}; load of the machine at the end {load:.1f}.",
        "",
        "Ways that are compared encode the same photographs, each in a process of its own, and take turns; a number is",
        "the median of at least five rounds, a ratio the median of the rounds' ratios. Peers are written as the public",
        "scripts do it, in `benchmarks/peers.py`.",
        "",
        "![How many times faster](benchmarks.svg)",
        "",
        "| row | value | unit | against |",
        "|---|---:|---|---|",
        *(f"| `{row['name']}` | {row['value']:g} | {row['unit']} | {row['versus']} |" for row in rows),
        "",
    ]
    if not torch.cuda.is_available():
        text.append(NOT_MEASURED)
    (DOCS / "benchmarks.md").write_text("\n".join(text), encoding="utf-8")
    (DOCS / "benchmarks.svg").write_text(_plot(rows), encoding="utf-8")


def _plot(rows: Sequence[dict[str, object]]) -> str:
    """A bar for each row that says how many times faster something is, up to ten."""
    bars = [row for row in rows if row["unit"] == TIMES and str(row["name"]).startswith("encode_vs")]
    step, left, unit = 28, 300, 90
    shapes = []
    longest = max((float(str(row["value"])) for row in bars), default=1.0)
    for number, row in enumerate(bars):
        value, y = float(str(row["value"])), 34 + number * step
        width = unit * value * min(1, 4.5 / longest)
        shapes.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(str(row["name"]))}</text>')
        shapes.append(f'<rect x="{left}" y="{y}" width="{width:.0f}" height="20" fill="#4a7ab5"/>')
        shapes.append(f'<text x="{left + width + 6:.0f}" y="{y + 14}">{value:.2f}×</text>')
    peer = left + unit * min(1, 4.5 / longest)
    bottom = 40 + len(bars) * step
    shapes.append(f'<line x1="{peer:.0f}" y1="28" x2="{peer:.0f}" y2="{bottom}" stroke="#888" stroke-dasharray="4 3"/>')
    shapes.append(f'<text x="{peer:.0f}" y="20" text-anchor="middle">the peer</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {bottom + 10}" font-family="sans-serif" '
    return head + 'font-size="13"><rect width="100%" height="100%" fill="white"/>' + "\n".join(shapes) + "</svg>\n"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
