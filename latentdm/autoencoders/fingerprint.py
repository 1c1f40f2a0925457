"""What the moments of an autoencoder depend on beside the images: for keys of what is kept of them."""

from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from latentdm.autoencoders.families import family_of
from latentdm.tensors import dtype_name

APPLIED_LATER = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Of a config: what moments are normalised by, once they are drawn from."""

STATISTICS = ("bn.",)
"""Of the weights: the same."""


def fingerprint(autoencoder: nn.Module, dtype: torch.dtype, tiling: str) -> dict[str, Any]:
    """All that the moments depend on, as JSON.

    Args:
        autoencoder: as it came, with or without its decoder.
        dtype: that it computes in.
        tiling: of `latentdm.FrozenVAE`.
    """
    family, kind = family_of(autoencoder), type(autoencoder)
    config = dict(getattr(autoencoder, "config", None) or {})
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config": {
            name: value if isinstance(value, bool | int | float | str | None) else repr(value)
            for name, value in sorted(config.items())
            if not name.startswith("_") and name not in APPLIED_LATER
        },
        "pixel_range": list(family.pixel_range),
        "patch": family.patch(autoencoder),
        "weights": weights_hash(autoencoder, family.decoder_parts),
        "dtype": dtype_name(dtype),
        "tiling": tiling,
    }


def weights_hash(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """A hash of all weights and buffers by name, in their own dtypes, wherever and however they are laid out.

    Args:
        module: whose they are.
        without: attributes whose weights are left out.
    """
    left_out = (*(f"{name}." for name in without), *STATISTICS)
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(left_out) or not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        plain = tensor.detach().to("cpu").contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
