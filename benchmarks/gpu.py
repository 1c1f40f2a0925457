"""What only a GPU shows: ``python benchmarks/gpu.py``. SD-size encoder, bfloat16, 512² and 1024²; a line of JSON each.

Untested: it was written without a GPU at hand.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import models, peers
from benchmarks.encoder import hook, timed
from benchmarks.rows import interleaved
from latentdm import FrozenVAE, PlainEncoder

COUNT = {512: 16, 1024: 4}


def main() -> None:
    """Correctness first, then images a second, the share of the matrix peak, and memory."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / median(interleaved({"peak": timed(lambda: a @ a)}, 10)["peak"])
    for side, count in COUNT.items():
        data = models.batch(count, side)
        pixels = data["pixels"] / 255
        settings: dict[str, dict[str, Any]] = {
            "eager": {},
            "compiled": {"compile": True},
            "cuda_graphs": {"compile": "reduce-overhead"},
        }
        vaes = {name: FrozenVAE(deepcopy(models.sd_size()), **more).to("cuda") for name, more in settings.items()}
        exact = FrozenVAE(deepcopy(models.sd_size()), dtype="float32").to("cuda").encode(pixels, posterior="mode")
        for name, vae in vaes.items():
            latents = vae.encode(pixels, posterior="mode")
            say(f"accuracy_{name}_{side}", float((latents - exact).norm() / exact.norm()), "relative error")
        script = peers.InpaintScript(deepcopy(models.sd_size()).bfloat16(), data)
        script.pixels = script.pixels.bfloat16()
        ways = {"peer": timed(script.plain)} | {
            name: timed(hook(PlainEncoder(vae), data)) for name, vae in vaes.items()
        }
        interleaved(ways, 2)
        operations = 270.6e9 * (side / 256) ** 2  # counted at 256² by the row floor_gflop_256; attention adds to it
        for name, seconds in interleaved(ways, 7).items():
            say(f"{name}_{side}", count / median(seconds), "images/s")
            say(f"{name}_{side}_share", 100 * operations * count / median(seconds) / peak, "% of the matrix peak")
            torch.cuda.reset_peak_memory_stats()
            ways[name]()
            say(f"{name}_{side}_memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def say(name: str, value: float, unit: str) -> None:
    """A row."""
    print(json.dumps({"name": name, "value": float(f"{value:.4g}"), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
