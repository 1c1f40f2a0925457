"""Memory and start-up, each measured in a process of its own."""

import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.rows import row

ROOT = Path(__file__).parents[1]
PEAK = """
import sys, torch
from benchmarks import models
from latentdm import FrozenVAE, PlainEncoder
count, side = int(sys.argv[1]), 256
encoder = PlainEncoder(FrozenVAE(models.demo()), per_batch=8)
pixels = models.images(8, side).repeat(count // 8, 1, 1, 1)
on_gpu = models.DEVICE.type == "cuda"
encoder.setup(models.DEVICE)
latents = encoder({"pixels": pixels[:1, :, :64, :64]})  # libraries and their buffers
def memory(field):
    if on_gpu:
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024
if not on_gpu:
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = memory("VmRSS")
latents = encoder({"pixels": pixels})["latents"]
print(memory("VmHWM") - before - latents.nbytes)
"""
START = "import latentdm.demo_vae, latentdm; latentdm.FrozenVAE.from_pretrained('pkg://latentdm.demo_vae').to('cpu')"


def _run(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


@row(
    "peak_memory_64_over_8",
    unit="times",
    versus="a batch of 8; per_batch=8, demo VAE at 256², inputs and outputs aside",
)
def peak_memory_64_over_8(quick: bool) -> float:
    """Peak memory is set by per_batch, not by the batch."""
    rounds = 1 if quick else 5
    large, small = (median(float(_run(PEAK, count)) for _ in range(rounds)) for count in ("64", "8"))
    return large / small


@row(
    "start_up_s",
    unit="s",
    versus="python with `import torch, diffusers.AutoencoderKL` alone; until an image can be encoded",
)
def start_up_s(quick: bool) -> float:
    """Import, weights and the move to the device, beyond what torch and diffusers take."""

    def seconds(code: str) -> float:
        began = perf_counter()
        _run(code)
        return perf_counter() - began

    bare = "import torch; from diffusers import AutoencoderKL"
    return median(seconds(START) - seconds(bare) for _ in range(3 if quick else 5))
