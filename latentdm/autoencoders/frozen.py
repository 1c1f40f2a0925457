"""`FrozenVAE`: an autoencoder that only encodes and decodes, in a dtype of its own, and never trains.

Shapes: ``b`` batch, ``h w`` pixels (multiples of ``r``), ``z`` latent channels, ``r`` the spatial compression.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from itertools import count
from os import PathLike
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdm.autoencoders.families import Posterior, family_of, latent_of
from latentdm.randomness import Draws

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POSTERIORS = ("sample", "mode")

Rows = Callable[[slice], Tensor]
"""Gives some rows of a batch: the images ``n 3 h w`` in 0…1, or noise ``n z h/r w/r``. Called a chunk at a time."""


class FrozenVAE:
    """A frozen autoencoder between pixels in 0…1 and latents as the model's family normalises them.

    It is no ``nn.Module`` on purpose: a model or a data module may hold one without training, wrapping, synchronising
    or saving its weights.

    Args:
        autoencoder: a diffusers autoencoder, or any module with ``encode(x)`` for ``x`` ``b 3 h w`` in −1…1 that
            returns ``.latent_dist``, ``.latents`` or ``.latent``. It is put in eval mode and frozen.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the device computes in it
            natively, else float32 (a module that is no diffusers class keeps the dtype it has). Autocast never
            changes it; latents and their statistics are float32 always.

    Raises:
        ValueError: an unknown dtype, or a diffusers class that the table of families does not know.
        TypeError: the module has no ``encode``.

    Example:
        >>> vae = FrozenVAE.from_pretrained("stabilityai/sdxl-vae", dtype="float32")  # doctest: +SKIP
        >>> vae.encode(images, posterior="mode").shape  # images: 2 3 512 512 in 0…1  # doctest: +SKIP
        torch.Size([2, 4, 64, 64])
    """

    def __init__(self, autoencoder: nn.Module, dtype: str = "auto") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"FrozenVAE: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._family = family_of(autoencoder)
        self._original = autoencoder.requires_grad_(False).eval()
        self._dtype_name = dtype
        self._module: nn.Module | None = None  # made for a device and dtype by `to`
        self._calls = count()
        self.spatial_compression: int = self._family.spatial_compression(autoencoder)
        """``r``: pixels a latent along one side."""
        self.latent_channels: int = self._family.latent_channels(autoencoder)
        """``z``."""
        scaling = self._family.normalization(autoencoder)
        self._mean, self._std = _per_channel(scaling.mean), _per_channel(scaling.std)
        self._scale = scaling.scale

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
    ) -> Self:
        """Load an autoencoder: see `latentdm.autoencoders.loading.load_autoencoder` for what ``source`` may be."""
        from latentdm.autoencoders.loading import load_autoencoder

        return cls(load_autoencoder(source, subfolder=subfolder, revision=revision), dtype=dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | PathLike[str], seed: int = 0, dtype: str = "auto") -> Self:
        """Build an autoencoder with random weights, for tests and dry runs.

        Args:
            config: a diffusers config with its ``_class_name``, or a folder or JSON file that holds one.
            seed: of the weights; the global generator is left as it was.
            dtype: as for the class.
        """
        from latentdm.autoencoders.loading import build_autoencoder

        return cls(build_autoencoder(config, seed=seed), dtype=dtype)

    # ---------------------------------------------------------------- where it lies

    @property
    def module(self) -> nn.Module:
        """The autoencoder as it computes: on its device, in its dtype, channels-last."""
        if self._module is None:
            self.to(next(self._original.parameters(), torch.empty(0)).device)
        assert self._module is not None
        return self._module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in. ``"auto"`` is settled by the first device that it is put on, and stays."""
        return next(self.module.parameters(), torch.empty(0)).dtype

    def to(self, device: torch.device | str) -> Self:
        """Move it to a device; the first time, settle its dtype there."""
        device = torch.device(device)
        if self._module is None:
            dtype = self._settle_dtype(device)
            held = {parameter.dtype for parameter in self._original.parameters()}
            # A cast that rounds is made on a copy: the weights as they came stay at hand.
            module = self._original if held <= {dtype} else deepcopy(self._original).to(dtype=dtype)
            self._module = module.to(memory_format=torch.channels_last)
        self._module = self._module.to(device)
        self._mean, self._std = (None if s is None else s.to(device) for s in (self._mean, self._std))
        return self

    def _settle_dtype(self, device: torch.device) -> torch.dtype:
        wanted = DTYPES[self._dtype_name]
        if wanted is not None:
            return wanted
        if not hasattr(self._original, "config"):
            return next(self._original.parameters(), torch.empty(0)).dtype
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32

    # ---------------------------------------------------------------- pixels → latents

    def encode(self, pixels: Tensor, posterior: Literal["sample", "mode"] = "sample", noise: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: ``b 3 h w`` float in 0…1, sides multiples of ``r``.
            posterior: ``"sample"`` draws from the posterior, ``"mode"`` takes its mean.
            noise: ``b z h/r w/r`` float32 standard normal for ``"sample"``; by default every call draws its own,
                reproducibly and without touching the global generator.

        Returns:
            ``b z h/r w/r`` float32 latents, normalised as the family's models expect them.

        Raises:
            ValueError: a wrong shape or posterior.
        """
        check_posterior(posterior, "FrozenVAE.encode")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"FrozenVAE.encode: expected pixels of shape b 3 h w, got {tuple(pixels.shape)}")
        r = self.spatial_compression
        if pixels.shape[-2] % r or pixels.shape[-1] % r or not pixels.numel():
            raise ValueError(
                f"FrozenVAE.encode: {pixels.shape[-2]}×{pixels.shape[-1]} is no multiple of the factor {r}; "
                "crop the images first, as latentdm.batch.crop does"
            )
        b, _, h, w = pixels.shape
        noise_rows: Rows | None = None
        if posterior == "sample":
            if noise is None:
                draws = Draws(0, 0, [f"call{next(self._calls)}.{i}" for i in range(b)])
                noise = draws.normal("posterior", (self.latent_channels, h // r, w // r), self.device)
            noise_rows = noise.__getitem__
        return self.encode_rows(pixels.__getitem__, b, noise=noise_rows)

    def encode_rows(
        self, pixels: Rows, rows: int, noise: Rows | None, per_batch: int | None = None, progress: bool = False
    ) -> Tensor:
        """Encode images that are made a chunk at a time: the one place of the library that encodes.

        Args:
            pixels: gives the rows of a slice, ``n 3 h w`` in 0…1; asked once for each chunk, so that no more than a
                chunk is ever prepared.
            rows: how many images there are.
            noise: gives the rows of a slice, ``n z h/r w/r`` float32; None takes the posterior's mean.
            per_batch: images in a chunk; None takes all at once. The last chunk may be smaller.
            progress: show a bar when the call lasts longer than two seconds.

        Returns:
            ``rows z h/r w/r`` float32 normalised latents.
        """
        size = per_batch or rows
        chunks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        latents = []
        for chunk in tqdm(chunks, desc="encode", unit="chunk", delay=2, leave=False, disable=not progress or len(chunks) < 2):
            posterior = self.posterior(pixels(chunk))
            drawn = posterior.mean if noise is None or posterior.std is None else posterior.draw(noise(chunk))
            latents.append(self.normalize(drawn))
        return latents[0] if len(latents) == 1 else torch.cat(latents)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """The distribution of the latents before normalisation, for ``b 3 h w`` images in 0…1."""
        module = self.module
        signed = pixels.to(self.device).mul(2).sub_(1)
        signed = signed.to(self.dtype, memory_format=torch.channels_last)
        with _no_autocast(signed.device):
            return latent_of(module.encode(signed))

    # ---------------------------------------------------------------- latents → pixels

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``b z h/r w/r`` normalised latents → ``b 3 h w`` float32 images in 0…1, clamped."""
        z = self.denormalize(latents.to(self.device)).to(self.dtype, memory_format=torch.channels_last)
        with _no_autocast(z.device):
            signed = self.module.decode(z).sample
        return signed.float().div_(2).add_(0.5).clamp_(0, 1)

    def normalize(self, z: Tensor) -> Tensor:
        """What the encoder gives → what the family's models train on: ``(z − mean) · scale / std`` in float32."""
        z = z.float()
        z = z if self._mean is None else z - self._mean
        z = z if self._scale is None else z * self._scale
        return z if self._std is None else z / self._std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`, in float32."""
        z = latents.float()
        z = z if self._std is None else z * self._std
        z = z if self._scale is None else z / self._scale
        return z if self._mean is None else z + self._mean


def check_posterior(posterior: str, owner: str) -> None:
    """Raise ValueError unless ``posterior`` is ``"sample"`` or ``"mode"``."""
    if posterior not in POSTERIORS:
        raise ValueError(f"{owner}: posterior must be one of {', '.join(POSTERIORS)}, got {posterior!r}")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def _no_autocast(device: torch.device) -> Any:
    """The trainer's autocast must not override the autoencoder's own dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _per_channel(statistic: Any) -> Tensor | None:
    """A number or one a channel → float32, shaped to broadcast over ``b z h w``."""
    return None if statistic is None else torch.as_tensor(statistic, dtype=torch.float32).reshape(1, -1, 1, 1)
