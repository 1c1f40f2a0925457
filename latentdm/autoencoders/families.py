"""What there is to know of each autoencoder class: its factors, what it encodes and how its latents are normalised.

One table, one place. Only `FrozenVAE` and the loader read it, and nothing else in the library scales a latent.

Shapes: ``b`` batch, ``f h w`` frames and pixels, ``z`` latent channels, ``r`` the spatial compression.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdm.autoencoders.posterior import Normalization, posterior_of
from latentdm.errors import UserError, UserTypeError
from latentdm.frozen.weights import config_value, first_weight, is_of_diffusers


@dataclass(frozen=True)
class Family:
    """What `FrozenVAE` asks of one autoencoder class. Each callable is given the autoencoder.

    Args:
        spatial_compression: ``r``, pixels a latent along one side of what models train on.
        latent_channels: channels of the normalised latents.
        normalization: how the pipeline of this family scales its latents.
        frame_axis: encode takes ``b c f h w``; an image is passed as one frame and the axis taken off again.
        temporal_compression: frames of a clip a latent frame; the first frame stands alone, so that ``t·n + 1``
            frames give ``n + 1``. None: images only.
        image_channels: 3, or 4: an opaque alpha is added before encode, and the decoder's is dropped.
        pixel_range: what encode takes and decode gives for black and white.
        patch: side of the squares of latents that models take as channels: ``b z h w`` → ``b p²z h/p w/p``.
        has_posterior: encode gives a distribution, so that a sample differs from the mode.
        decode: the autoencoder and unscaled latents → pixels in ``pixel_range``.
        decoder_parts: attributes that only decode needs.
    """

    spatial_compression: Callable[[Any], int]
    latent_channels: Callable[[Any], int]
    normalization: Callable[[Any], Normalization]
    frame_axis: bool = False
    temporal_compression: Callable[[Any], int] | None = None
    image_channels: Callable[[Any], int] = lambda _: 3
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    patch: Callable[[Any], int] = lambda _: 1
    has_posterior: bool = True
    decode: Callable[[Any, Tensor], Tensor] = lambda autoencoder, z: autoencoder.decode(z).sample
    decoder_parts: tuple[str, ...] = ("decoder", "post_quant_conv")


# ---------------------------------------------------------------- the table


def _halvings(blocks: Sequence[int]) -> int:
    """A factor of two for each block but the last."""
    return int(2 ** (len(blocks) - 1))


def _latent_channels(autoencoder: Any) -> int:
    return int(autoencoder.config.latent_channels)


def _scaled(autoencoder: Any) -> Normalization:
    return Normalization(scale=autoencoder.config.scaling_factor)


def _shifted(autoencoder: Any) -> Normalization:
    return Normalization(mean=autoencoder.config.shift_factor, scale=autoencoder.config.scaling_factor)


def _kl_normalization(autoencoder: Any) -> Normalization:
    """SDXL's finetunes (Playground) give statistics, and then the shift of SD 3 and FLUX has no place."""
    config = autoencoder.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return Normalization(mean=tuple(mean), scale=config.scaling_factor, std=tuple(std))
    return _shifted(autoencoder)


def _standardized(autoencoder: Any) -> Normalization:
    config = autoencoder.config
    return Normalization(mean=tuple(config.latents_mean), std=tuple(config.latents_std))


def _flux2_patch(autoencoder: Any) -> int:
    across, down = autoencoder.config.patch_size
    if across != down:
        raise UserError(f"FrozenVAE: AutoencoderKLFlux2 with patches of {across}×{down}; only squares are supported")
    return int(across)


def _flux2_normalization(autoencoder: Any) -> Normalization:
    """The running statistics of a batch norm that its forward never calls, over the patchified channels."""
    statistics = autoencoder.bn
    std = torch.sqrt(statistics.running_var.float() + autoencoder.config.batch_norm_eps)
    return Normalization(mean=statistics.running_mean.float(), std=std)


def _decode_vq(autoencoder: Any, z: Tensor) -> Tensor:
    """Kandinsky's MoVQ (spatial norm) decodes latents as they are; LDM's VQ-VAE snaps them to its codebook first."""
    movq = autoencoder.config.norm_type == "spatial"
    decoded: Tensor = autoencoder.decode(z, force_not_quantize=movq).sample
    return decoded


FAMILIES: dict[str, Family] = {
    "AutoencoderKL": Family(
        spatial_compression=lambda autoencoder: _halvings(autoencoder.config.block_out_channels),
        latent_channels=_latent_channels,
        normalization=_kl_normalization,
    ),
    "AsymmetricAutoencoderKL": Family(
        spatial_compression=lambda autoencoder: _halvings(autoencoder.config.down_block_out_channels),
        latent_channels=_latent_channels,
        normalization=_scaled,
    ),
    "AutoencoderTiny": Family(
        spatial_compression=lambda autoencoder: _halvings(autoencoder.config.encoder_block_out_channels),
        latent_channels=_latent_channels,
        normalization=_shifted,
        has_posterior=False,
    ),
    "AutoencoderDC": Family(
        spatial_compression=lambda autoencoder: int(autoencoder.spatial_compression_ratio),
        latent_channels=_latent_channels,
        normalization=_scaled,
        has_posterior=False,
    ),
    "AutoencoderKLFlux2": Family(
        spatial_compression=lambda autoencoder: (
            _halvings(autoencoder.config.block_out_channels) * _flux2_patch(autoencoder)
        ),
        latent_channels=lambda autoencoder: _latent_channels(autoencoder) * _flux2_patch(autoencoder) ** 2,
        normalization=_flux2_normalization,
        patch=_flux2_patch,
    ),
    "AutoencoderKLQwenImage": Family(
        spatial_compression=lambda autoencoder: int(2 ** len(autoencoder.config.temperal_downsample)),
        latent_channels=lambda autoencoder: int(autoencoder.config.z_dim),
        normalization=_standardized,
        frame_axis=True,
        temporal_compression=lambda autoencoder: int(2 ** sum(autoencoder.config.temperal_downsample)),
        image_channels=lambda autoencoder: int(autoencoder.config.get("input_channels", 3)),  # 4: Qwen-Image-Layered
    ),
    "AutoencoderKLQwenImage21": Family(
        spatial_compression=lambda autoencoder: int(autoencoder.config.scale_factor_spatial),
        latent_channels=lambda autoencoder: int(autoencoder.config.z_dim),
        normalization=_standardized,
        frame_axis=True,  # but its convolutions take a single frame
        image_channels=lambda autoencoder: int(autoencoder.config.in_channels),
    ),
    "AutoencoderKLWan": Family(
        spatial_compression=lambda autoencoder: int(autoencoder.config.scale_factor_spatial),
        latent_channels=lambda autoencoder: int(autoencoder.config.z_dim),
        normalization=_standardized,
        frame_axis=True,
        temporal_compression=lambda autoencoder: int(autoencoder.config.scale_factor_temporal),
    ),
    "AutoencoderKLHunyuanImage": Family(
        spatial_compression=lambda autoencoder: int(autoencoder.config.spatial_compression_ratio),
        latent_channels=_latent_channels,
        normalization=_scaled,
    ),
    "VQModel": Family(
        spatial_compression=lambda autoencoder: _halvings(autoencoder.config.block_out_channels),
        latent_channels=lambda autoencoder: int(autoencoder.config.vq_embed_dim or autoencoder.config.latent_channels),
        normalization=lambda _: Normalization(),  # MoVQ's pipelines read no scaling_factor
        has_posterior=False,
        decode=_decode_vq,
        decoder_parts=("decoder", "post_quant_conv", "quantize"),
    ),
}
CLASSES: dict[str, type] = {}
"""Classes registered by users, which the loader cannot find in diffusers."""


# ---------------------------------------------------------------- asking and teaching it


def known_families() -> Mapping[str, Family]:
    """Class name → what is known of it."""
    return dict(FAMILIES)


def register_family(autoencoder: type | str, family: Family) -> None:
    """Teach `FrozenVAE` an autoencoder class of your own, or change what it knows of one.

    Args:
        autoencoder: the class, which ``from_pretrained`` then finds as well; for a class of diffusers its name is
            enough.
        family: what is to be known of it; its subclasses inherit it.

    Example:
        >>> register_family(  # doctest: +SKIP
        ...     MyAutoencoder,
        ...     Family(
        ...         spatial_compression=lambda autoencoder: 8,
        ...         latent_channels=lambda autoencoder: autoencoder.config.latent_channels,
        ...         normalization=lambda autoencoder: Normalization(scale=autoencoder.config.scaling_factor),
        ...     ),
        ... )
    """
    name = autoencoder if isinstance(autoencoder, str) else autoencoder.__name__
    FAMILIES[name] = family
    if not isinstance(autoencoder, str):
        CLASSES[name] = autoencoder


def class_named(name: object, owner: str) -> Any:
    """The known class of a name, as a config's ``_class_name`` gives it.

    Raises:
        ValueError: it is not known, or is not in the installed diffusers.
    """
    if name not in FAMILIES:
        raise _unknown(owner, name)
    import diffusers

    found = CLASSES.get(name) or getattr(diffusers, name, None)
    if found is None:
        raise UserError(
            f"{owner} names the class {name!r}, which diffusers {diffusers.__version__} does not have; install a newer "
            "one, or for a class of your own pass it to latentdm.register_family itself, not its name"
        )
    return found


def family_of(autoencoder: nn.Module) -> Family:
    """The entry of the autoencoder's class or its nearest base; for a plain module, what a trial encode shows.

    Raises:
        ValueError: a diffusers model of a class that the table does not know.
        TypeError: no autoencoder at all.
    """
    for base in type(autoencoder).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    name = type(autoencoder).__name__
    if not isinstance(autoencoder, nn.Module) or not callable(getattr(autoencoder, "encode", None)):
        lacks = "has no encode method" if isinstance(autoencoder, nn.Module) else "is no torch.nn.Module"
        raise UserTypeError(
            f"FrozenVAE: {name} {lacks}; pass a diffusers autoencoder or a module with encode(x), or name a hub id or "
            "a folder with FrozenVAE.from_pretrained"
        )
    if is_of_diffusers(autoencoder):
        raise _unknown("FrozenVAE", name)
    return _plain_family(autoencoder)


def _unknown(owner: str, name: object) -> UserError:
    return UserError(
        f"{owner}: the class {name!r} is not known; known are {', '.join(sorted(FAMILIES))}. Teach it with "
        "latentdm.register_family"
    )


def _plain_family(autoencoder: Any) -> Family:
    """A module that somebody wrote: the factor and channels that it names, else what a trial shows.

    Its latents are scaled by nothing but its config's scaling_factor and shift_factor, if it has them, as attributes or
    as keys of a dict.
    """
    scaled = Normalization(
        mean=config_value(autoencoder, "shift_factor"), scale=config_value(autoencoder, "scaling_factor")
    )
    factor = getattr(autoencoder, "spatial_compression", getattr(autoencoder, "spatial_compression_ratio", None))
    channels = getattr(autoencoder, "latent_channels", None)
    has_posterior = True
    if factor is None or channels is None:
        size = 64
        parameter = first_weight(autoencoder)
        # A copy is tried, so that a module that counts or records its calls never hears of this one.
        with torch.no_grad():
            trial = posterior_of(deepcopy(autoencoder).eval().encode(parameter.new_zeros(1, 3, size, size)))
        factor, channels = factor or size // trial.mean.shape[-1], channels or trial.mean.shape[1]
        has_posterior = trial.logvar is not None
    return Family(lambda _: int(factor), lambda _: int(channels), lambda _: scaled, has_posterior=has_posterior)
