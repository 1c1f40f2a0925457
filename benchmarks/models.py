"""What the benchmarks encode, and with what: real photographs; an encoder of Stable Diffusion's size, the demo VAE."""

from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentdm.autoencoders.loading import load_autoencoder
from latentdm.data.photographs import photographs
from latentdm.draws import Draws
from latentdm.masks import RandomMask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def sd_size() -> AutoencoderKL:
    """Stable Diffusion's autoencoder in its real architecture, with random weights and without its decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    autoencoder.decoder = nn.Module()
    return autoencoder.eval().requires_grad_(False).to(DEVICE)


def demo() -> nn.Module:
    """The package's small trained autoencoder."""
    return load_autoencoder("pkg://latentdm.demo_vae").eval().requires_grad_(False).to(DEVICE)


class Trivial(nn.Module):
    """An autoencoder that costs next to nothing: what remains is the hook."""

    spatial_compression = 8
    latent_channels = 3

    def encode(self, x: Tensor) -> SimpleNamespace:
        """``b 3 h w`` → ``b 3 h/8 w/8``."""
        return SimpleNamespace(latents=x[..., ::8, ::8])


def images(count: int, side: int) -> Tensor:
    """``count 3 side side`` uint8: squares of real photographs, which no part of the demo VAE was trained on."""
    squares = []
    for photo in photographs("val").values():
        shorter = min(photo.shape[:2])
        square = torch.from_numpy(photo)[:shorter, :shorter].movedim(-1, 0)[None].float()
        squares.append(F.interpolate(square, size=(side, side), mode="bilinear", antialias=True).round().byte())
    return torch.cat([squares[number % len(squares)] for number in range(count)])


def batch(count: int, side: int) -> dict[str, Tensor]:
    """A batch as the data modules of this package yield it."""
    pixels = images(count, side)
    mask = RandomMask()({"pixels": pixels}, Draws(0, 0, range(count)))
    return {"pixels": pixels, **mask, "index": torch.arange(count)}
