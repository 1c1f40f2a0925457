"""Memory and start-up, each measured in a process of its own."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.rows import row

ROOT = Path(__file__).parents[1]
PEAK = """
import sys, torch
from benchmarks import models
from latentdm import FrozenVAE, PlainEncoder
images, batch, side = int(sys.argv[1]), int(sys.argv[2]), 256
encoder = PlainEncoder(FrozenVAE(models.demo()), per_batch=8)
batches = models.images(8, side).repeat(images // 8, 1, 1, 1).split(batch)
on_gpu = models.DEVICE.type == "cuda"
encoder.setup(models.DEVICE)
encoder({"pixels": batches[0][:1, :, :64, :64]})  # libraries and their buffers
def memory(field):
    if on_gpu:
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024
if not on_gpu:
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = memory("VmRSS")
for pixels in batches:
    latents = encoder({"pixels": pixels})["latents"]
print(memory("VmHWM") - before - latents.nbytes)
"""
START = "import latentdm.demo_vae, latentdm; latentdm.FrozenVAE.from_pretrained('pkg://latentdm.demo_vae').to('cpu')"


def run(code: str, *arguments: str) -> str:
    """What a program prints, run by a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


@row(
    "peak_memory_64_over_8",
    unit="times",
    versus="the same 64 images in batches of 8; per_batch=8, demo VAE at 256², without inputs and outputs; aim: 1.1",
)
def peak_memory_64_over_8(quick: bool) -> float:
    """Peak memory is set by per_batch, not by the batch."""
    return _peak(64, 64, quick) / _peak(64, 8, quick)


@row(
    "peak_memory_64_over_first_8",
    unit="times",
    versus="the first batch of 8 in a fresh process, when the C allocator keeps nothing from a chunk before",
)
def peak_memory_64_over_first_8(quick: bool) -> float:
    """What one chunk of several holds beyond the first: freed blocks that glibc does not give back at once."""
    return _peak(64, 64, quick) / _peak(8, 8, quick)


@cache
def _peak(images: int, batch: int, quick: bool) -> float:
    return median(float(run(PEAK, str(images), str(batch))) for _ in range(3 if quick else 5))


@row(
    "start_up_s",
    unit="s",
    versus="python with `import torch, diffusers.AutoencoderKL` alone; until an image can be encoded",
)
def start_up_s(quick: bool) -> float:
    """Import, weights and the move to the device, beyond what torch and diffusers take."""

    def seconds(code: str) -> float:
        began = perf_counter()
        run(code)
        return perf_counter() - began

    bare = "import torch; from diffusers import AutoencoderKL"
    return median(seconds(START) - seconds(bare) for _ in range(3 if quick else 5))
