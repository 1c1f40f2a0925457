"""Train the demo VAE that ships in latentdm/demo_vae.

The shipped weights come from this command, every option at its default (CPU only; about twelve minutes on two cores)::

    python scripts/train_demo_vae.py

The network sees only the left two thirds of each photograph; the reconstruction PSNR printed at the end is measured on
the right thirds, with the weights read back from disk.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import latentdm.demo_vae
from latentdm.data.photographs import photographs

AutoencoderKL: Any = diffusers.AutoencoderKL  # its annotations hide that it is a torch module

FOLDER = Path(latentdm.demo_vae.__path__[0])

WIDTHS = (32, 32, 64, 96)
"""Most of the time goes into the full-resolution layers, so that width is cheap only where the image is small."""

SCALES = {1.0: 0.7, 1.5: 0.15, 2.0: 0.15}
"""Downscaling of the photograph a crop is cut from → its share of the crops; most resemble the evaluation."""

CROP = 64
"""Side of a crop, in pixels."""

BATCH = 8
"""Few and small crops: on a CPU many cheap steps get further than few steady ones."""

SCHEDULE_STEPS = 6000
"""Length of the learning rate's half cosine, and so of a whole run."""

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
EMA_DECAY = 0.998
KL_WEIGHT = 1e-3
"""Small enough to cost hardly any PSNR, large enough to keep the latents from growing without bound."""


class Crops:
    """Random crops of the training parts, each photograph as often as any other.

    Args:
        seed: of the crops' own generator.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pyramids = [
            [F.interpolate(image, scale_factor=1 / s, mode="bilinear", antialias=True)[0] for s in SCALES]
            for image in map(to_tensor, photographs("train").values())
        ]
        self.shares = torch.tensor(list(SCALES.values()))

    def integer(self, end: int) -> int:
        """A random integer of [0, end)."""
        return int(torch.randint(end, (), generator=self.generator))

    def batch(self, side: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw crops.

        Args:
            side: height and width of a crop, in pixels.
            count: number of crops.

        Returns:
            Crops (``B 3 side side``, in [-1, 1]) and the index of the photograph each was cut from (``B``).
        """
        crops, sources = [], []
        for scale in torch.multinomial(self.shares, count, replacement=True, generator=self.generator).tolist():
            sources.append(self.integer(len(self.pyramids)))
            image = self.pyramids[sources[-1]][scale]
            top, left = (self.integer(length - side + 1) for length in image.shape[1:])
            flips = [axis for axis in (1, 2) if self.integer(2)]
            crops.append(image[:, top : top + side, left : left + side].flip(flips))
        return torch.stack(crops).contiguous(memory_format=torch.channels_last), torch.tensor(sources)


def to_tensor(image: npt.NDArray[np.uint8]) -> Tensor:
    """``H W 3`` uint8 → ``1 3 H W`` float in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def build() -> Any:
    """The untrained network."""
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    # Unit noise on latents that mean nothing yet would drown the signal; start with little of it.
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -8.0)
    return vae.to(memory_format=torch.channels_last)


def schedule(step: int) -> float:
    """Factor of the learning rate: a short linear warm-up, then a half cosine to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / SCHEDULE_STEPS)))


def train(steps: int, seed: int, output: Path, save_every: int) -> None:
    """Train, and write the running mean of the weights now and then and at the end.

    Args:
        steps: number of optimizer steps.
        seed: of the initial weights, of the crops and of the posterior's noise.
        output: folder to write.
        save_every: steps between two intermediate saves.
    """
    torch.manual_seed(seed)
    crops = Crops(seed)
    vae, mean = build(), build().requires_grad_(False)
    mean.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    typical = torch.full((len(crops.pyramids),), 0.1)
    for step in (progress := tqdm(range(steps), mininterval=2)):
        images, sources = crops.batch(CROP, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        squared = (decoded.float() - images).square().mean((1, 2, 3))
        # PSNR is a logarithm: an error counts relative to what is usual for its photograph. Otherwise the hardest
        # photographs would take the whole network.
        for source, error in zip(sources.tolist(), squared.tolist(), strict=True):
            typical[source] += 0.02 * (error - typical[source])
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (squared / typical[sources]).mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for average, parameter in zip(mean.parameters(), vae.parameters(), strict=True):
                average.lerp_(parameter, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 50 == 0:
            # Images span 2, so that the peak's square is 4.
            progress.set_postfix_str(f"training PSNR {(10 * torch.log10(4 / typical)).mean():.2f} dB, KL {kl:.2f}")
        if (step + 1) % save_every == 0:
            save(mean, crops, output)
    save(mean, crops, output)


@torch.no_grad()
def save(vae: Any, crops: Crops, output: Path) -> None:
    """Measure the scaling factor and write the network in half precision.

    Args:
        vae: the network; stays as it is.
        crops: where the crops come from that the scaling factor is measured on; its generator is left alone.
        output: folder to write.
    """
    state = crops.generator.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        latents = torch.cat([vae.encode(crops.batch(128, 8)[0]).latent_dist.sample() for _ in range(32)])
    crops.generator.set_state(state)
    print(f"\nlatents: mean {latents.mean():.4f}, standard deviation {latents.std():.4f}")
    stored = copy.deepcopy(vae).half()
    stored.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    stored.save_pretrained(output)


@torch.no_grad()
def evaluate(folder: Path) -> None:
    """Print the reconstruction PSNR on the held-out part of each photograph, whole but for a multiple of the ratio.

    Args:
        folder: what `train` wrote.
    """
    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    errors, sizes = [], []
    for name, part in photographs("val").items():
        image = part[: part.shape[0] // ratio * ratio, : part.shape[1] // ratio * ratio]
        decoded = vae.decode(vae.encode(to_tensor(image)).latent_dist.mode()).sample
        pixels = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        errors.append(float(np.mean((pixels.astype(np.float64) - image) ** 2)))
        sizes.append(image.size)
        print(f"{name:24}{psnr(errors[-1]):6.2f} dB")
    print(f"{'mean':24}{np.mean([psnr(error) for error in errors]):6.2f} dB")
    print(f"{'all pixels pooled':24}{psnr(float(np.average(errors, weights=sizes))):6.2f} dB")


def psnr(error: float) -> float:
    """Mean squared error of 8-bit values → PSNR in dB."""
    return 10 * math.log10(255**2 / error)


def main() -> None:
    """Train, write and evaluate."""
    parser = argparse.ArgumentParser(description="Train the demo VAE on the photographs inside scikit-image.")
    parser.add_argument("--steps", type=int, default=SCHEDULE_STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and noise")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between two saves")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.seed, arguments.output, arguments.save_every)
    evaluate(arguments.output)


if __name__ == "__main__":
    main()
