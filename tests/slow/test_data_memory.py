"""What a small file may take at the default limits, measured: each kind, in sizes up to the largest."""

import json
import subprocess
import sys

import pytest
from running import ROOT

MEASURE = """
import ctypes, gc, io, json, sys
from PIL import Image
from latentdm.data import SampleError
from latentdm.data.geometry import Record, ResizeCrop, square

kind, mode, options, sides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
Image.MAX_IMAGE_PIXELS = None
orientation = options.pop("orientation", 0)

def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) / 1024

def content(kind, mode, side, **options):
    file = io.BytesIO()
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()

small = content("PNG", "L", 40)

def sample(role, file):
    picture, mask = (file, None) if role == "image" else (small, file)
    try:
        ResizeCrop(square(512 if role == "image" else 30), alpha=True)(Record("", 0, picture, mask), 0)
    except SampleError as error:
        return str(error)
    return "read"

for role in ("image", "mask"):
    sample(role, content(kind, mode, 40, **options))  # libraries and their buffers
for side in sides:
    made = content(kind, mode, side, **options)
    if len(made) >= 1e6:
        break
    for role in ("image", "mask"):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
        before = memory("VmRSS")
        told = sample(role, made)
        print(json.dumps([side, role, memory("VmHWM") - before, told]))
"""

LIMIT_MIB = 512

SIDES = [6_000, 8_000, 10_000, 13_000]

CASES = [
    ("PNG", "RGB", {}, SIDES), ("PNG", "RGBA", {}, SIDES), ("PNG", "L", {}, SIDES), ("PNG", "LA", {}, SIDES),
    ("PNG", "P", {}, SIDES), ("PNG", "1", {}, SIDES), ("PNG", "I;16", {}, SIDES),
    ("PNG", "P", {"transparency": 0}, SIDES), ("PNG", "RGB", {"orientation": 6}, SIDES),
    ("TIFF", "RGB", {"compression": "tiff_deflate", "strip_size": 10**9}, SIDES),
    ("TIFF", "I;16", {"compression": "tiff_deflate", "strip_size": 10**9}, SIDES),
    ("TIFF", "CMYK", {"compression": "tiff_deflate"}, SIDES), ("TIFF", "F", {"compression": "tiff_deflate"}, SIDES),
    ("WEBP", "RGB", {"lossless": True}, [5_000, 6_000]), ("WEBP", "RGBA", {"quality": 1}, [5_000]),
    ("AVIF", "RGB", {"speed": 10}, [5_000]), ("GIF", "P", {}, SIDES),
    ("JPEG", "RGB", {"quality": 1, "progressive": True}, SIDES),
    ("JPEG", "RGB", {"quality": 1, "subsampling": 0, "progressive": True}, SIDES),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mode", "options", "sides"), CASES, ids=[f"{kind}-{mode}-{'-'.join(o)}" for kind, mode, o, _ in CASES]
)
def test_no_small_file_takes_more_than_half_a_gibibyte(kind, mode, options, sides):
    command = [sys.executable, "-c", MEASURE, kind, mode, json.dumps(options), json.dumps(sides)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken = [json.loads(line) for line in done.stdout.splitlines()]
    assert taken
    assert [found for found in taken if found[2] >= LIMIT_MIB] == []
