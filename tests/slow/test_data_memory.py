"""What a small file may take at the default limits: each kind, in sizes up to the largest, in a process of its own."""

import json
import subprocess
import sys

import pytest
from running import ROOT

MEASURE = """
import io, json, sys
from PIL import Image
from latentdm.data import SampleError
from latentdm.data.decode import read_image
from latentdm.data.geometry import Record, ResizeCrop, square

kind, mode, side, role, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
Image.MAX_IMAGE_PIXELS = None

def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) / 1024

def content(mode, size):
    if (kind, mode) == ("PPM", "text"):
        return b"P2 %d %d 255 " % size + b"1 " * 250_000
    file = io.BytesIO()
    extra = dict(options)
    if extra.pop("icc", False):
        from PIL import ImageCms
        extra["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    if orientation := extra.pop("orientation", 0):
        extra["exif"] = Image.Exif()
        extra["exif"][0x0112] = orientation
    Image.new(mode, size).save(file, kind, **extra)
    return file.getvalue()

small = content("L" if mode == "text" else mode, (40, 30))
def sample(file):
    picture, other = (file, None) if role == "image" else (small, file)
    return ResizeCrop(square(512), alpha=True)(Record("", 0, picture, other if role == "mask" else None), 0)
try:
    sample(small)
except SampleError:
    pass
try:
    made = content(mode, (side, side))
except (ValueError, OSError):  # more than the format can hold
    print("null")
    sys.exit()
if len(made) >= 1e6:
    print("null")
    sys.exit()
open("/proc/self/clear_refs", "w").write("5")
before, result = memory("VmRSS"), "read"
try:
    sample(made)
except SampleError as error:
    result = str(error)
print(json.dumps([memory("VmHWM") - before, result]))
"""

LIMIT_MIB = 512

CASES = [
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "LA", {}), ("PNG", "P", {}), ("PNG", "1", {}),
    ("PNG", "I;16", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "RGB", {"orientation": 6}),
    ("TIFF", "RGB", {"compression": "tiff_deflate"}), ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    ("TIFF", "I;16", {"compression": "tiff_deflate"}), ("TIFF", "CMYK", {"compression": "tiff_deflate"}),
    ("TIFF", "I", {"compression": "tiff_deflate"}), ("TIFF", "F", {"compression": "tiff_deflate"}),
    ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGB", {"quality": 1}),
    ("GIF", "P", {}), ("JPEG", "RGB", {"quality": 1, "progressive": True}), ("JPEG", "L", {"quality": 1}),
    ("JPEG", "RGB", {"quality": 1, "subsampling": 0, "progressive": True}), ("AVIF", "RGB", {"speed": 10}),
]  # fmt: skip


def peak(kind, mode, side, role, options):
    """What a sample takes, in MiB, and whether it was read; None where the file is no small one."""
    command = [sys.executable, "-c", MEASURE, kind, mode, str(side), role, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("role", ["image", "mask"])
@pytest.mark.parametrize(("kind", "mode", "options"), CASES, ids=[f"{k}-{m}-{'-'.join(o)}" for k, m, o in CASES])
def test_no_small_file_takes_more_than_half_a_gibibyte(kind, mode, options, role):
    sides = (4_000, 7_000, 10_000, 13_000)
    taken = {side: found for side in sides if (found := peak(kind, mode, side, role, options)) is not None}
    assert taken
    assert {side: found for side, found in taken.items() if found[0] >= LIMIT_MIB} == {}
