"""What an autoencoder can encode: sizes, clips, dtypes.

Shapes: ``f h w`` frames and pixels, ``r`` and ``t`` the spatial and the temporal factor.
"""

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn

from latentdm.errors import UserError
from latentdm.frozen.weights import config_value
from latentdm.tensors import check_pixels, describe, how_to_convert

if TYPE_CHECKING:
    from latentdm.autoencoders.vae import FrozenVAE

POSTERIORS = ("sample", "mode")


def check_encodable(pixels: Tensor, vae: "FrozenVAE") -> None:
    """Raise UserError unless pixels are ``b 3 h w`` or ``b 3 f h w`` in 0…1, of whole latents and latent frames."""
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5) or pixels.shape[1] != 3:
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else describe(pixels)
        raise UserError(f"expected pixels of shape b 3 h w, got {got}{how_to_convert(pixels)}")
    if pixels.ndim == 5:
        check_clip(pixels.shape[2], vae)
    r = vae.spatial_compression
    if pixels.shape[-2] % r or pixels.shape[-1] % r:
        raise UserError(
            f"{pixels.shape[-2]}×{pixels.shape[-1]} is no multiple of the factor {r}; crop the images first, as "
            "latentdm.tensors.crop does"
        )
    check_pixels(pixels, r)


def check_clip(frames: int, vae: "FrozenVAE") -> None:
    """Raise UserError unless clips of so many frames can be encoded whole."""
    t = vae.temporal_compression
    if t is None:
        raise UserError(
            f"{vae.class_name} encodes images, not clips of {frames} frames; use a video autoencoder (vae=wan, "
            "vae=qwen_image), or yield the frames as images b c h w"
        )
    if frames % t != 1 % t:
        raise UserError(
            f"a clip of {frames} frames: {vae.class_name} takes 1 + {t}·n of them, such as "
            f"{(frames - 1) // t * t + 1}; it would drop the rest in silence"
        )


def warn_of_overflow(autoencoder: nn.Module) -> None:
    """Warn where a config says that float16 is too narrow for its activations."""
    if config_value(autoencoder, "force_upcast"):
        warnings.warn(
            f"FrozenVAE: dtype=float16, but the config of this {type(autoencoder).__name__} sets force_upcast: its "
            "activations may overflow. Samples that do are encoded again in float32, which is slow; "
            "use bfloat16 or auto",
            stacklevel=4,
        )
