"""How long a picture may take: what its file makes the decoder do again and again, counted before it is decoded.

A decoder's time is in proportion to the pixels and to the file, but for a few things that a small file may ask for
without end: passes over all pixels, parts that overlap, comments. Whole files that people have are far below these
limits (``tests/unit/test_data_effort.py`` makes some that are not).
"""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from PIL.ImageFile import ImageFile

from latentdm.errors import UserError

MAX_SCANS = 100
"""Passes of a JPEG over its pixels; ten are usual, and libtiff has the same limit."""

MAX_COMMENTS = 10_000
"""Comments in a PPM of digits: Pillow copies what follows each of them."""

MAX_PROFILE_WORK = 1 << 20
"""The steps of a colour profile times its bytes: each is made for a quarter of a million colours, and may read all."""

PARTS = {"strips": (273, 279), "tiles": (324, 325)}
"""The tags of a TIFF that say where its parts lie, and how long each is."""

HEAD_BYTES = 1 << 18
"""Bytes of a JPEG that are looked at first; most often its first scan begins there."""

MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
"""Of a JPEG: what stands between its segments, and behind the data of a scan."""

FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
SCAN, END, BARE = 0xDA, 0xD9, frozenset({0x01, *range(0xD0, 0xD9)})


def check_effort(image: ImageFile, file_bytes: int) -> None:
    """Raise UserError where a picture would take long to be decoded.

    Args:
        image: opened, not decoded.
        file_bytes: the size of its file.
    """
    stream: Any = image.fp
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(stream)
    elif image.format == "TIFF":
        _check_tiff(image, file_bytes)
    elif image.format == "PPM":
        _check_ppm(stream)


def takes_long(profile: bytes) -> bool:
    """Whether a colour profile has more steps than any that people have; they may all be one that is there once."""
    steps = (int.from_bytes(profile[at.start() + 12 : at.start() + 16], "big") for at in re.finditer(b"mpet", profile))
    return any(count * len(profile) > MAX_PROFILE_WORK for count in steps)


def _check_jpeg(stream: BinaryIO) -> None:
    """Count the scans, unless the first one holds all of the picture."""
    stream.seek(0)
    content = stream.read(HEAD_BYTES)
    if _holds_all(content):
        return
    content += stream.read()
    if content.count(bytes([0xFF, SCAN])) > MAX_SCANS and not _holds_all(content):
        scans = (marker for marker, _ in _segments(content) if marker == SCAN)
        if any(True for _ in islice(scans, MAX_SCANS, None)):
            raise UserError(f"it goes over its pixels more than {MAX_SCANS} times; save it anew")


def _holds_all(content: bytes) -> bool:
    """Whether the first scan of a JPEG, or of its beginning, holds all of the picture."""
    progressive, channels = False, b""
    for marker, head in _segments(content):
        if marker in FRAMES:
            progressive, channels = marker not in (0xC0, 0xC1, 0xC9), head[5:]
        elif marker == SCAN:
            return not progressive and head[:1] == channels != b""
    return False


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and beginning of each segment of a JPEG; libjpeg and Pillow skip what lies between them."""
    place = 2
    while (marker := MARKER.search(content, place)) and marker[1][0] != END:
        code, place = marker[1][0], marker.end()
        if code not in BARE:
            length = int.from_bytes(content[place : place + 2], "big")
            yield code, content[place + 2 : place + min(length, 8)]
            place += max(length, 2)


def _check_tiff(image: ImageFile, file_bytes: int) -> None:
    """Whether its compressed parts take more than the file holds: then they overlap."""
    tags = getattr(image, "tag_v2", {})
    for parts, (offsets, counts) in PARTS.items():
        where, lengths = (_numbers(tags.get(tag)) for tag in (offsets, counts))
        # libtiff takes a part without a length for all that follows.
        lengths += (0,) * (len(where) - len(lengths))
        total = sum(length or file_bytes for place, length in zip(where, lengths, strict=False) if place)
        if len(where) > 1 and total > 2 * file_bytes:
            raise UserError(f"its {len(where)} {parts} take {total} bytes, and the file has {file_bytes}; save it anew")


def _numbers(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(number for number in values if isinstance(number, int))


def _check_ppm(stream: BinaryIO) -> None:
    stream.seek(0)
    if stream.read(2) in (b"P1", b"P2", b"P3"):
        comments = 0
        while piece := stream.read(1 << 20):
            comments += piece.count(b"#")
        if comments > MAX_COMMENTS:
            raise UserError(f"it has {comments} comments, more than {MAX_COMMENTS}; save it without them")
