"""What only a GPU shows: ``python benchmarks/gpu.py``, a line of JSON each, at 512² and 1024² with an SD-size encoder.

``--dry`` runs all of it small, in a minute on a CPU, to see that the script itself works; its figures mean nothing.
Nobody has run it on a GPU yet.
"""

import json
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import models, peers
from benchmarks.encoder import floor_gflop_256, hook, matrices, matrix_peak, timed, times_faster
from benchmarks.report import device
from benchmarks.rows import interleaved
from latentdm import FrozenVAE, LatentDataModule, PlainEncoder


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        autoencoder: makes it.
        counts: side of the images → images in a batch.
        settings: way → `FrozenVAE`'s settings beyond the defaults.
        rounds: of each comparison.
        steps: of each fit, besides five that warm up.
        channels: of the UNet that is trained, a block each.
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
    steps: int = 30
    channels: tuple[int, ...] = (128, 256, 512)


DRY = Sizes(models.demo, {64: 2}, {"eager": {}}, rounds=1, steps=2, channels=(32, 32))


def main() -> None:
    """The floor first; then correctness, images a second, memory; last what encoding ahead gains."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="small, and on a CPU")
    sizes = DRY if parser.parse_args().dry else Sizes()
    if sizes is not DRY and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: needs a CUDA device; --dry tries the script itself without one")
    peak = matrix_peak(median(interleaved({"": timed(matrices(torch.bfloat16))}, 5)[""]))
    say("matrix_peak", peak / 1e12, f"TFLOP/s, bfloat16, {device()}")
    operations = 0.0 if sizes is DRY else 1e9 * floor_gflop_256(quick=False)
    for side, count in sizes.counts.items():
        # attention adds to what convolutions take, which grows with the area
        encode(sizes, side, count, peak, operations * (side / 256) ** 2)
        ahead(sizes, side, count)


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
    script = peers.InpaintScript(deepcopy(sizes.autoencoder()).bfloat16(), data)
    script.pixels = script.pixels.bfloat16()
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


# ---------------------------------------------------------------- encode_ahead


def ahead(sizes: Sizes, side: int, count: int) -> None:
    """Steps of a real fit with and without a batch ahead, and whether their latents are the same to the bit."""
    latents: dict[str, list[Tensor]] = {}

    def fitted(name: str, encode_ahead: int) -> float:
        seconds, latents[name] = fit(sizes, side, count, encode_ahead)
        return seconds

    ways = {"without": lambda: fitted("without", 0), "ahead": lambda: fitted("ahead", 1)}
    seconds = interleaved(ways, sizes.rounds // 2 + 1)
    say(f"encode_ahead_{side}", times_faster(seconds, "without", "ahead"), "times as many steps a second")
    same = all(torch.equal(one, other) for one, other in zip(*latents.values(), strict=True))
    say(f"encode_ahead_{side}_same", float(same), "1: the same latents to the bit")


class Denoiser(LightningModule):
    """One UNet step a batch, timed once five have warmed up."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
        )
        self.latents: list[Tensor] = []
        self.began = self.seconds = 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Noise is zeros: what counts is the time."""
        if batch_idx == 5:
            timed(lambda: None)()
            self.began = perf_counter()
        if batch_idx in (3, 4):
            self.latents.append(batch["latents"].cpu())
        output = self.unet(batch["latents"], torch.zeros(len(batch["latents"]), device=self.device)).sample
        return F.mse_loss(output, torch.zeros_like(output))

    def on_train_end(self) -> None:
        """Before anything is torn down."""
        timed(lambda: None)()
        self.seconds = perf_counter() - self.began

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The usual one."""
        return torch.optim.AdamW(self.parameters())


class Photographs(LightningDataModule):
    """The same photographs in every batch, from pinned memory."""

    def __init__(self, side: int, count: int, steps: int) -> None:
        super().__init__()
        self.samples = [{"pixels": image, "index": number} for number, image in enumerate(models.images(count, side))]
        self.count, self.steps = count, steps

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of all of them."""
        dataset: Any = self.samples * self.steps
        return DataLoader(dataset, batch_size=self.count, pin_memory=torch.cuda.is_available())


def fit(sizes: Sizes, side: int, count: int, encode_ahead: int) -> tuple[float, list[Tensor]]:
    """Seconds of the steps, and the latents of two of them."""
    torch.manual_seed(0)
    model, steps = Denoiser(sizes.channels), sizes.steps + 5
    data = LatentDataModule(
        Photographs(side, count, steps),
        PlainEncoder(FrozenVAE(deepcopy(sizes.autoencoder()))),
        encode_ahead=encode_ahead,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_steps=steps,
            precision="bf16-mixed",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=data)
    return model.seconds, model.latents


def say(name: str, value: float, unit: str) -> None:
    """A row."""
    print(json.dumps({"name": name, "value": float(f"{value:.4g}"), "unit": unit}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
