"""What others do, in our own words: the ways that the rows compare with."""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class InpaintScript:
    """Diffusers' inpainting training scripts: float images, NCHW, one call for each of two views, eagerly.

    Their data sets make the floats on the CPU's workers; here they are made beforehand and cost nothing.

    Args:
        autoencoder: whose weights they cast; it stays as it is.
        batch: ``pixels`` ``b 3 h w`` uint8 and ``mask`` ``b 1 h w``.
        dtype: of weights and images: float32, or what the option ``--mixed_precision`` names.
    """

    def __init__(self, autoencoder: Any, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.vae = autoencoder if dtype == torch.float32 else deepcopy(autoencoder).to(dtype=dtype)
        self.dtype = dtype
        device = next(autoencoder.parameters()).device
        self.pixels = (batch["pixels"].float() / 127.5 - 1).to(device)
        self.mask = batch["mask"].float().to(device)
        self.masked = self.pixels * (self.mask < 0.5)

    def plain(self) -> Tensor:
        """The images' latents, as their text-to-image scripts make them."""
        return self._encode(self.pixels)

    def inpaint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, masked latents and the mask in their size."""
        latents, masked = self.plain(), self._encode(self.masked)
        return latents, masked, F.interpolate(self.mask, size=latents.shape[-2:])

    def _encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.dtype)).latent_dist.sample() * self.vae.config.scaling_factor


class Sliced(InpaintScript):
    """The same with slicing: one image at a time."""

    def plain(self) -> Tensor:
        """The images' latents."""
        self.vae.enable_slicing()
        try:
            return super().plain()
        finally:
            self.vae.disable_slicing()

    def inpaint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, masked latents and the mask in their size."""
        self.vae.enable_slicing()
        try:
            return super().inpaint()
        finally:
            self.vae.disable_slicing()


def convolved(mask: Tensor, grow_mask_by: int) -> Tensor:
    """A mask grown as the original nodes do it: a convolution with a window of ones."""
    window = torch.ones(1, 1, grow_mask_by, grow_mask_by)
    margin = -(-(grow_mask_by - 1) // 2)
    height, width = mask.shape[-2:]
    return F.conv2d(mask.round(), window, padding=margin).clamp(0, 1)[..., :height, :width]
