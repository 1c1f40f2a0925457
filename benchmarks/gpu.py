"""What only a GPU shows: ``python benchmarks/gpu.py``, a line of JSON each, at 512² and 1024² with an SD-size encoder.

``--dry`` runs all of it small, in a minute on a CPU, to see that the script itself works; its figures mean nothing.
Nobody has run it on a GPU yet.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import models, peers
from benchmarks.encoder import floor_gflop_256, hook, matrices, matrix_peak, timed
from benchmarks.report import device
from benchmarks.rows import interleaved
from latentdm import FrozenVAE, PlainEncoder
from latentdm.frozen.weights import computes_bfloat16


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        autoencoder: makes it.
        counts: side of the images → images in a batch.
        settings: way → `FrozenVAE`'s settings beyond the defaults.
        rounds: of each comparison.
    """

    autoencoder: Callable[[], nn.Module] = models.sd_size
    counts: dict[int, int] = field(default_factory=lambda: {512: 16, 1024: 4})
    settings: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "eager": {},
            "compiled": {"compile": True},
            "cuda_graphs": {"compile": "reduce-overhead"},
        }
    )
    rounds: int = 7


DRY = Sizes(models.demo, {64: 2}, {"eager": {}}, rounds=1)


def main() -> None:
    """The floor first; then correctness, images a second, memory."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="small, and on a CPU")
    sizes = DRY if parser.parse_args().dry else Sizes()
    if sizes is not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device; --dry tries the script itself without one")
    dtype = torch.bfloat16 if computes_bfloat16(models.DEVICE) else torch.float32  # emulated, it takes minutes
    peak = matrix_peak(median(interleaved({"": timed(matrices(dtype))}, sizes.rounds)[""]))
    say("matrix_peak", peak / 1e12, f"TFLOP/s, {str(dtype).removeprefix('torch.')}, {device()}")
    operations = 0.0 if sizes is DRY else 1e9 * floor_gflop_256(quick=False)
    for side, count in sizes.counts.items():
        # attention adds to what convolutions take, which grows with the area
        encode(sizes, side, count, peak, operations * (side / 256) ** 2)


def encode(sizes: Sizes, side: int, count: int, peak: float, operations: float) -> None:
    """Each way to encode a batch, against a script's: bfloat16, NCHW, eager."""
    data = models.batch(count, side)
    pixels = data["pixels"] / 255

    def frozen(**settings: Any) -> FrozenVAE:
        return FrozenVAE(deepcopy(sizes.autoencoder()), **settings).to(models.DEVICE)

    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    exact = frozen(dtype="float32").encode(pixels, posterior="mode")
    torch.backends.cudnn.allow_tf32 = allowed
    vaes = {name: frozen(**settings) for name, settings in sizes.settings.items()}
    for name, vae in vaes.items():
        latents = vae.encode(pixels, posterior="mode")
        say(f"accuracy_{name}_{side}", float((latents - exact).norm() / exact.norm()), "relative error")
    script = peers.InpaintScript(sizes.autoencoder(), data, torch.bfloat16)
    ways = {"peer": timed(script.plain)} | {name: timed(hook(PlainEncoder(vae), data)) for name, vae in vaes.items()}
    memory = {name: first_call(way) for name, way in ways.items()}
    interleaved(ways, 1)
    for name, seconds in interleaved(ways, sizes.rounds).items():
        say(f"{name}_{side}", count / median(seconds), "images/s")
        say(f"{name}_{side}_share", 100 * operations * count / median(seconds) / peak, "% of the matrix peak")
        say(f"{name}_{side}_memory", memory[name] / 2**30, "GiB beyond the weights")


def first_call(way: Callable[[], Any]) -> int:
    """Bytes at the peak of a way's first call, which compiles and records graphs; 0 without a GPU."""
    if not torch.cuda.is_available():
        way()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return torch.cuda.max_memory_allocated() - before


def say(name: str, value: float, unit: str) -> None:
    """A row."""
    print(json.dumps({"name": name, "value": float(f"{value:.4g}"), "unit": unit}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
