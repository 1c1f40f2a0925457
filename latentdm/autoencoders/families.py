"""What there is to know of each autoencoder class: its spatial factor and how its latents are normalised.

One table, one place. Only `FrozenVAE` reads it, and nothing else in the library scales a latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normalization:
    """Latents as a model trains on them: ``(z − mean) · scale / std``, in float32; None leaves a step out.

    Args:
        mean: a number, or one a channel.
        scale: a number.
        std: one a channel.
    """

    mean: float | Sequence[float] | None = None
    scale: float | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class Family:
    """What `FrozenVAE` asks of one autoencoder class. Each field is a function of the autoencoder.

    Args:
        spatial_compression: pixels a latent, along one side.
        latent_channels: channels of the normalised latents.
        normalization: how the pipeline of this family scales its latents.
    """

    spatial_compression: Callable[[Any], int]
    latent_channels: Callable[[Any], int]
    normalization: Callable[[Any], Normalization]


def _halvings(block_out_channels: Sequence[int]) -> int:
    """A factor of two for each block but the last."""
    return int(2 ** (len(block_out_channels) - 1))


def _kl_normalization(autoencoder: Any) -> Normalization:
    config = autoencoder.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return Normalization(mean=tuple(mean), scale=config.scaling_factor, std=tuple(std))
    return Normalization(mean=config.get("shift_factor"), scale=config.scaling_factor)


_FAMILIES: dict[str, Family] = {
    "AutoencoderKL": Family(
        spatial_compression=lambda autoencoder: _halvings(autoencoder.config.block_out_channels),
        latent_channels=lambda autoencoder: int(autoencoder.config.latent_channels),
        normalization=_kl_normalization,
    ),
}


def families() -> Mapping[str, Family]:
    """Class name → what is known of it."""
    return dict(_FAMILIES)


def register_family(class_name: str, family: Family) -> None:
    """Teach `FrozenVAE` an autoencoder class of your own, or change what it knows of one."""
    _FAMILIES[class_name] = family


def family_of(autoencoder: nn.Module) -> Family:
    """The entry of the autoencoder's class or its nearest base; for a plain module, what a trial encode shows.

    Raises:
        ValueError: a diffusers model of a class that the table does not know.
        TypeError: no autoencoder at all.
    """
    for base in type(autoencoder).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    name = type(autoencoder).__name__
    if not callable(getattr(autoencoder, "encode", None)):
        raise TypeError(f"FrozenVAE: {name} has no encode method; pass a diffusers autoencoder or a module with encode(x)")
    if any(base.__module__.startswith("diffusers.") for base in type(autoencoder).__mro__):
        raise ValueError(
            f"FrozenVAE: the class {name} is not known; known are {', '.join(sorted(_FAMILIES))}. "
            "Teach it with latentdm.autoencoders.register_family"
        )
    return _plain_family(autoencoder)


def _plain_family(autoencoder: nn.Module) -> Family:
    """A module that somebody wrote: the factor and channels it names, else those that a trial shows; no scaling
    but what its config asks for.
    """
    config = getattr(autoencoder, "config", None)
    scaled = Normalization(mean=getattr(config, "shift_factor", None), scale=getattr(config, "scaling_factor", None))
    factor = getattr(autoencoder, "spatial_compression", None) or getattr(autoencoder, "spatial_compression_ratio", None)
    channels = getattr(autoencoder, "latent_channels", None)
    if factor is None or channels is None:
        size = 64
        parameter = next(autoencoder.parameters(), torch.empty(0))
        # A copy is tried, so that a module that counts or records its calls never hears of this one.
        from copy import deepcopy

        with torch.no_grad():
            trial = latent_of(deepcopy(autoencoder).eval().encode(parameter.new_zeros(1, 3, size, size))).mean
        factor, channels = factor or size // trial.shape[-1], channels or trial.shape[1]
    return Family(lambda _: int(factor), lambda _: int(channels), lambda _: scaled)


@dataclass(frozen=True)
class Posterior:
    """What an encoder gives for a batch, before normalisation: the seam at which moments can be cached.

    Args:
        mean: ``b z h w`` float32.
        std: ``b z h w`` float32, or None for a family that gives latents and no distribution.
    """

    mean: Tensor
    std: Tensor | None

    def draw(self, noise: Tensor) -> Tensor:
        """``b z h w`` float32: mean + std · noise."""
        return self.mean if self.std is None else self.mean + self.std * noise


def latent_of(output: Any) -> Posterior:
    """The posterior in an encoder's output: ``.latent_dist``, ``.latents`` or ``.latent``, as diffusers names them.

    Raises:
        TypeError: it has none of the three.
    """
    distribution = getattr(output, "latent_dist", None)
    if distribution is None:
        for name in ("latents", "latent"):
            if isinstance(getattr(output, name, None), Tensor):
                return Posterior(getattr(output, name).float(), None)
        raise TypeError(
            f"FrozenVAE: encode returned {type(output).__name__} with none of latent_dist, latents and latent"
        )
    if hasattr(distribution, "logvar") and not getattr(distribution, "deterministic", False):
        # exp in float32: a bf16 logvar loses nothing more on its way to a standard deviation
        return Posterior(distribution.mean.float(), torch.exp(0.5 * distribution.logvar.float()))
    if hasattr(distribution, "std"):
        return Posterior(distribution.mean.float(), distribution.std.float())
    return Posterior(distribution.mode().float(), None)
