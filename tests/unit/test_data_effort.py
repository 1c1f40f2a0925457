"""Small files that would keep a decoder busy for minutes: made by hand, and refused before they are decoded."""

import io
import struct
import zlib

import pytest
from pictures import read_image
from PIL import Image, ImageCms

from latentdm.data import SampleError
from latentdm.data.effort import MAX_COMMENTS, MAX_SCANS
from latentdm.data.levels import mask_image

SCAN = b"\xff\xda"


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode="RGB", side=64):
    return Image.new("RGB", (side, side), (200, 90, 30)).convert(mode)


def colour(content):
    image, _ = read_image(content)
    return image.getpixel((0, 0))


def near(found, expected):
    return all(abs(a - b) <= 3 for a, b in zip(found, expected, strict=True))


# JPEG


def with_scans(content, count):
    """A JPEG whose last scan is there so many times."""
    start = content.rindex(SCAN)
    return content[:start] + content[start:-2] * count + content[-2:]


def baseline_in_parts(side=64):
    """A baseline JPEG with a scan for each channel, as nobody writes them any more: of one channel, made of three."""
    gray = saved(flat("L", side), "JPEG", quality=100)
    start = gray.index(SCAN)
    frame = gray.index(b"\xff\xc0")
    (length,) = struct.unpack(">H", gray[frame + 2 : frame + 4])
    head = gray[frame + 4 : frame + 9] + bytes([3]) + b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    frame_segment = b"\xff\xc0" + struct.pack(">H", len(head) + 2) + head
    data = gray[start + 2 + 8 : -2]
    scans = b"".join(SCAN + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0) + data for number in (1, 2, 3))
    return gray[:frame] + frame_segment + gray[frame + 2 + length : start] + scans + gray[-2:]


@pytest.mark.parametrize("content", [saved(flat(), "JPEG", progressive=True, quality=100), baseline_in_parts()])
@pytest.mark.parametrize("read", [read_image, mask_image])
def test_a_jpeg_of_thousands_of_scans_is_refused(content, read):
    with pytest.raises(
        SampleError, match=r"^cannot read an? \w+: it goes over its pixels more than 100 times; save it"
    ):
        read(with_scans(content, 5000))


@pytest.mark.parametrize("content", [saved(flat("L"), "JPEG", progressive=True, quality=100), baseline_in_parts()])
def test_a_jpeg_of_many_scans_is_read(content):
    once = colour(content)
    assert near(colour(with_scans(content, MAX_SCANS - 10)), once)


def test_what_looks_like_scans_is_counted_as_none():
    picture = saved(flat(), "JPEG", progressive=True, quality=100, comment=SCAN * 1000)
    assert near(colour(picture), (200, 90, 30))
    behind = saved(flat(), "JPEG") + (SCAN + b"\0\2") * 1000  # as phones append pictures and films
    assert near(colour(picture + behind), (200, 90, 30))


def test_scans_that_hide_behind_an_end_in_a_comment_are_counted():
    content = saved(flat(), "JPEG", progressive=True, quality=100)
    start = content.rindex(SCAN)
    hidden = content[:start] + b"\xff\xfe\x00\x04\xff\xd9" + with_scans(content, 5000)[start:]
    with pytest.raises(SampleError, match="goes over its pixels"):
        read_image(hidden)


# TIFF


def tiff(rows, offset, length, compression=8, lengths=True):
    """A gray TIFF of strips of one row, of which all are the same."""
    entries = [
        (256, 4, 1, 8), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1), (277, 3, 1, 1),
        (278, 4, 1, 1),
    ]  # fmt: skip
    data = zlib.compress(bytes(8))
    data += bytes(max(offset + length - len(data), 0))
    arrays = {273: struct.pack(f"<{rows}I", *[8] * rows), 279: struct.pack(f"<{rows}I", *[length] * rows)}
    place, body = 8 + len(data), data
    for tag, values in arrays.items():
        if tag == 273 or lengths:
            entries.append((tag, 4, rows, place))
            body += values
            place += len(values)
    entries.sort()
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


@pytest.mark.parametrize("settings", [{"length": 50_000}, {"length": 0}, {"length": 50_000, "lengths": False}])
def test_strips_that_overlap_are_refused(settings):
    with pytest.raises(SampleError, match=r"its 1000 strips take \d+ bytes, and the file has \d+; save it anew"):
        read_image(tiff(1000, 0, **settings))


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_deflate"}, {"compression": "tiff_lzw"}])
def test_strips_side_by_side_are_read(options):
    content = saved(flat(side=300), "TIFF", strip_size=900, **options)
    assert colour(content) == (200, 90, 30)


# PPM


@pytest.mark.parametrize(("kind", "pixels"), [("P1", b"0"), ("P2", b"7"), ("P3", b"7 7 7")])
def test_a_ppm_of_endless_comments_is_refused(kind, pixels):
    head = b"%s 1 1 %s" % (kind.encode(), b"" if kind == "P1" else b"7 ")
    assert colour(head + b"#\n" * MAX_COMMENTS + pixels) == (255, 255, 255)
    with pytest.raises(SampleError, match="it has 10001 comments, more than 10000; save it without them"):
        read_image(head + b"#\n" * (MAX_COMMENTS + 1) + pixels)


# Colour profiles


def profile(steps):
    """One whose way to the connection space is made of as many steps, all of them the same matrix."""
    matrix = b"matf" + bytes(4) + struct.pack(">HH", 3, 3) + struct.pack(">12f", *[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])
    place = 16 + 8 * steps
    elements = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, steps)
    elements += struct.pack(">II", place, len(matrix)) * steps + matrix
    known = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    known = known.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))  # or there is nothing to convert
    (count,) = struct.unpack(">I", known[128:132])
    table = known[132 : 132 + 12 * count]
    moved = b"".join(
        tag + struct.pack(">I", place + 12) + size
        for tag, (place,), size in (
            (table[at : at + 4], struct.unpack(">I", table[at + 4 : at + 8]), table[at + 8 : at + 12])
            for at in range(0, len(table), 12)
        )
    )
    body = known[132 + 12 * count :]
    body += bytes(-len(body) % 4)
    start = 132 + 12 * (count + 1) + len(body)
    tag = b"D2B0" + struct.pack(">II", start, len(elements))
    head = struct.pack(">I", start + len(elements)) + known[4:128]
    return head + struct.pack(">I", count + 1) + moved + tag + body + elements


def test_a_profile_of_thousands_of_steps_is_passed_over(monkeypatch):
    picture = Image.new("RGB", (4, 4), (200, 90, 30))
    assert not near(colour(saved(picture, "TIFF", icc_profile=profile(5))), (200, 90, 30))  # it is converted
    monkeypatch.delattr(ImageCms, "buildTransform")
    assert colour(saved(picture, "TIFF", icc_profile=profile(20_000))) == (200, 90, 30)


def test_a_profile_leaves_transparency_as_it_is():
    pixels = Image.new("RGBA", (2, 1), (200, 90, 30, 0))
    pixels.putpixel((1, 0), (200, 90, 30, 77))
    image, _ = read_image(saved(pixels, "PNG", icc_profile=profile(5)))
    assert [image.getpixel((x, 0))[3] for x in range(2)] == [0, 77]
    assert not near(image.getpixel((1, 0))[:3], (200, 90, 30))  # it is converted
