"""The page about the cache: its figures are those of what is written, and its lists those of the code."""

import re
from pathlib import Path

import pytest
import torch

from latentdm.cache.store import Store
from latentdm.cache.writer import Writer

PAGE = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")

ROW = re.compile(
    r"^\| (?P<family>[^|]*\(`z` (?P<z>\d+), `r` (?P<r>\d+)[^|]*) \|(?P<sizes>(?: [\d.]+ [KM]iB \|)+)$", re.M
)

SIDES = (256, 512, 1024)

ROWS = [found.groupdict() for found in ROW.finditer(PAGE)]


def written_bytes(folder, fields, count=16):
    """Bytes an entry of a shard of so many."""
    writer = Writer()
    writer.put(Store(folder), [bytes([row] * 16) for row in range(count)], fields)
    writer.flush()
    return writer.bytes / count


def shown(size):
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def test_all_families_are_there():
    assert len(ROWS) == 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["family"].split(" (")[0])
def test_bytes_an_image_are_those_of_a_shard(tmp_path, row):
    z, r = int(row["z"]), int(row["r"])
    parts = 1 if "no variance" in row["family"] else 2
    sizes = [size.strip() for size in row["sizes"].split("|")[:-1]]
    assert sizes == [shown(parts * z * (side // r) ** 2 * 2) for side in SIDES]
    moments = torch.zeros(16, parts, z, SIDES[0] // r, SIDES[0] // r, dtype=torch.bfloat16)
    told = parts * z * (SIDES[0] // r) ** 2 * 2
    measured = written_bytes(tmp_path, {"moments": moments, "sizes": torch.zeros(16, 6, dtype=torch.int32)})
    assert told < measured < told + 4096 / 16 + 64  # a head, keys, sums and sizes


@pytest.mark.parametrize(
    ("text", "numbers"), [("116 KiB", 77 * 768), ("310 KiB", 77 * 2048 + 1280), ("4.0 MiB", 512 * 4096 + 768)]
)
def test_bytes_a_caption(text, numbers):
    size = 2 * numbers
    assert text == (f"{size / 2**20:.1f} MiB" if size > 2**20 else f"{size / 2**10:.0f} KiB")
    assert text in PAGE
