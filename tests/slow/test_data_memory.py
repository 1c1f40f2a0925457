"""What a small file may take at the default limits, measured: each kind, as large as is just let pass."""

import json
import subprocess
import sys

from running import ROOT

MEASURE = """
import ctypes, gc, io, json, os, sys
from PIL import Image
from latentdm.data import SampleError
from latentdm.data.budget import bytes_per_pixel
from latentdm.data.geometry import Record, ResizeCrop, square

def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) / 1024

def measure(kind, mode, options):
    Image.MAX_IMAGE_PIXELS = None
    orientation = options.pop("orientation", 0)

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

    def memory_of(role):
        image = Image.open(io.BytesIO(content(kind, mode, 1000, **options)))
        if role == "image":
            image.draft(None, (100, 100))
        return bytes_per_pixel(image, lying=bool(orientation)) * image.width * image.height / 1e6

    for role in ("image", "mask"):
        sample(role, content(kind, mode, 40, **options))  # libraries and their buffers
    lowest = min(memory_of(role) for role in ("image", "mask"))
    side = min(int((448 * 2**20 / lowest) ** 0.5) - 1, 13_377)
    made = content(kind, mode, side, **options)
    for role in ("image", "mask"):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
        before = memory("VmRSS")
        told = sample(role, made)
        print(json.dumps([kind, mode, side, len(made), role, memory("VmHWM") - before, told]), flush=True)

for case in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:  # what one case leaves behind is not there in the next
        measure(*case)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""

LIMIT_MIB = 512

CASES = [
    ("PNG", "RGB", {"compress_level": 1}), ("PNG", "RGBA", {"compress_level": 1}), ("PNG", "L", {}),
    ("PNG", "LA", {"compress_level": 1}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "I;16", {}),
    ("PNG", "P", {"transparency": 0}), ("PNG", "RGB", {"orientation": 6}),
    ("TIFF", "RGB", {"compression": "tiff_deflate", "strip_size": 10**9}),
    ("TIFF", "I;16", {"compression": "tiff_deflate", "strip_size": 10**9}),
    ("TIFF", "CMYK", {"compression": "tiff_deflate"}), ("TIFF", "F", {"compression": "tiff_deflate"}),
    ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {"quality": 1}),
    ("AVIF", "RGB", {"speed": 10}), ("GIF", "P", {}),
    ("JPEG", "RGB", {"quality": 1, "progressive": True}),
    ("JPEG", "RGB", {"quality": 1, "subsampling": 0, "progressive": True}),
]  # fmt: skip


def test_no_small_file_takes_more_than_half_a_gibibyte():
    command = [sys.executable, "-c", MEASURE, json.dumps(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(taken) == 2 * len(CASES)
    assert [found for found in taken if found[5] >= LIMIT_MIB] == []
