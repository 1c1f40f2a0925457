"""What one sample takes at its peak, by the kind and the shape of its file; each in a process of its own."""

from benchmarks.memory import run
from benchmarks.rows import row

SAMPLE = """
import ctypes, gc, io, sys
from PIL import Image
from latentdm.data.geometry import Record, ResizeCrop, square

def content(mode, size):
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, "PNG")
    return file.getvalue()

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

mode, width, height, with_mask = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "mask"
picture = lambda mode, size: Record("", 0, content(mode, size), content("L", size) if with_mask else None)
crops = ResizeCrop(square(512), random_crop=True, max_pixels=10**9)
crops(picture(mode, (700, 600)), 0)  # libraries and their buffers
record = picture(mode, (width, height))
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed would serve again, uncounted
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = peak()
crops(record, 0)
print(peak() - before)
"""


@row(
    "sample_peak_mib_thin", "MiB", "a picture of 2000 × 1 with a mask, at 512²; resized whole it has 524 million pixels"
)
def sample_peak_mib_thin(quick: bool) -> float:
    """Of a mask only what is kept is computed."""
    return _peak("RGB", 2000, 1, "mask")


@row("sample_peak_mib_16bit", "MiB", "a picture of 16 bits and 13 377² pixels, just under max_pixels: 341 MiB decoded")
def sample_peak_mib_16bit(quick: bool) -> float:
    """A picture of 16 bits and its 8 bits, and nothing else of its size."""
    return _peak("I;16", 13_377, 13_377, "")


def _peak(mode: str, width: int, height: int, mask: str) -> float:
    return float(run(SAMPLE, mode, str(width), str(height), mask))
