"""Images and masks → what an inpainting model trains on.

Shapes: ``b`` batch, ``H W`` pixels as they come, ``h w`` after the crop, ``z`` latent channels, ``r`` the VAE's factor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from latentdm.autoencoders.images import Images
from latentdm.autoencoders.vae import FrozenVAE
from latentdm.batch import (
    LATENT_MASK,
    LATENTS,
    MASK,
    MASKED_LATENTS,
    NOISE_MASK,
    PIXELS,
    SOURCE,
)
from latentdm.cache.rows import CACHED
from latentdm.encoders.base import Encoder
from latentdm.errors import UserError
from latentdm.masks.morphology import check_grow_mask_by, check_mask_offset, grow_mask, offset_mask, round_mask
from latentdm.tensors import describe, unit_mask
from latentdm.validation import Check

LATENT_MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "nearest": lambda mask, r: mask[..., ::r, ::r].contiguous(),  # the pixel that F.interpolate's nearest takes
    "area": lambda mask, r: F.avg_pool2d(mask, r),
    "max": lambda mask, r: F.max_pool2d(mask, r),
    "unshuffle": lambda mask, r: F.pixel_unshuffle(mask, r),
}
"""``b 1 h w`` and ``r`` → the mask at latent resolution: ``b 1 h/r w/r``, or for unshuffle ``b r² h/r w/r``."""


class InpaintEncoder(Encoder):
    """Adds ``latents`` and ``masked_latents`` ``b z h/r w/r``, ``noise_mask`` ``b 1 h w`` and ``latent_mask``.

    The mask is resized to the image, cropped with it and rounded. With ``grow_mask_by`` (``VAEEncodeForInpaint``) the
    rounded mask sets the image to mid-gray and ``noise_mask`` is that mask grown; with ``mask_offset``
    (``WAS_VAEEncodeForInpaint``) the moved mask does both. The clean and the masked image share one chunked pass.

    Where the batch holds ``source``, another picture of the same size, ``masked_latents`` are made of it: the model
    sees ``source`` and learns to give ``pixels`` (removal, from pairs of before and after).

    Args:
        vae: as for `Encoder`.
        grow_mask_by: window in pixels, 0…64. 6 where neither this nor ``mask_offset`` is given.
        mask_offset: pixels to grow (positive) or shrink (negative) the mask by, −128…128. Not with ``grow_mask_by``.
        per_batch: as for `Encoder`; clean and masked images count alike.
        posterior: as for `Encoder`.
        latent_mask: how ``noise_mask`` comes to latent resolution: ``"nearest"`` (as Stable Diffusion's inpainting
            models were trained), ``"area"`` (the share masked), ``"max"``, or ``"unshuffle"`` → ``b r² h/r w/r``
            (Flux Fill).
        progress: as for `Encoder`.
        fill: the level in 0…1 of the masked part of the masked image: 0.5, mid-gray, as inpainting models have it; 0,
            black, for ControlNet inpainting models.
        multiple: as for `Encoder`.

    Raises:
        ValueError: a value out of range, or both ``grow_mask_by`` and ``mask_offset``.

    Example:
        >>> encoder = InpaintEncoder(vae, grow_mask_by=12)  # doctest: +SKIP
        >>> encoder({"pixels": images, "mask": masks}).keys()  # doctest: +SKIP
        dict_keys(['latents', 'masked_latents', 'noise_mask', 'latent_mask'])
    """

    reads = (PIXELS, MASK)
    writes = (LATENTS, MASKED_LATENTS, NOISE_MASK, LATENT_MASK)
    drops = (PIXELS, MASK, SOURCE, CACHED)

    def __init__(
        self,
        vae: FrozenVAE | Callable[[], FrozenVAE],
        grow_mask_by: int | None = None,
        mask_offset: int | None = None,
        per_batch: int | None = None,
        posterior: str = "sample",
        latent_mask: str = "nearest",
        progress: bool = False,
        fill: float = 0.5,
        multiple: int | None = None,
    ) -> None:
        super().__init__(vae, per_batch=per_batch, posterior=posterior, progress=progress, multiple=multiple)
        check = Check("InpaintEncoder")
        if grow_mask_by is not None and mask_offset is not None:
            raise UserError(
                f"InpaintEncoder: grow_mask_by={grow_mask_by} and mask_offset={mask_offset} exclude each other; "
                "set one of them to null (encoder=inpaint has the one, encoder=inpaint_offset the other)"
            )
        if grow_mask_by is not None:
            check_grow_mask_by(grow_mask_by, "InpaintEncoder")
        if mask_offset is not None:
            check_mask_offset(mask_offset, "InpaintEncoder")
        self.grow_mask_by = 6 if grow_mask_by is None and mask_offset is None else grow_mask_by
        self.mask_offset = mask_offset
        self.latent_mask = check.choice("latent_mask", latent_mask, LATENT_MASKS)
        self.fill = check.number("fill", fill, 0, 1)

    @property
    def channels(self) -> dict[str, int]:
        """As `Encoder.channels`: with ``latent_mask`` and ``masked_latents``."""
        masks = self.vae.spatial_compression**2 if self.latent_mask == "unshuffle" else 1
        return {**super().channels, LATENT_MASK: masks, MASKED_LATENTS: self.vae.latent_channels}

    def _check(self, batch: Mapping[str, Any]) -> None:
        super()._check(batch)
        if batch[PIXELS].ndim == 5:
            raise UserError(
                f"{PIXELS}: clips ({describe(batch[PIXELS])}) have no masks with frames; use encoder=plain, or yield "
                "the frames as images b c h w"
            )
        if batch.get(MASK) is None:
            raise UserError(
                f"the batch has no {MASK!r}, only {', '.join(map(repr, batch))}; give one with the images, white = 1 = "
                "repaint"
            )

    def _prepare(self, batch: Mapping[str, Any]) -> tuple[dict[str, Images], dict[str, Tensor]]:
        pixels, source = self.crop(batch[PIXELS]), batch.get(SOURCE)
        mask = self.crop(unit_mask(batch[MASK], batch[PIXELS])).to(pixels.device)
        if self.mask_offset is not None:
            hidden = noise_mask = offset_mask(mask, self.mask_offset)
        else:
            assert self.grow_mask_by is not None
            hidden, noise_mask = round_mask(mask), grow_mask(mask, self.grow_mask_by)

        noise_mask = noise_mask.to(self.vae.device).expand(len(pixels), -1, -1, -1).contiguous()
        latent_mask = LATENT_MASKS[self.latent_mask](noise_mask, self.vae.spatial_compression)
        seen = pixels if source is None else self.crop(source)
        return {LATENTS: Images(pixels), MASKED_LATENTS: Images(seen, hidden.bool(), self.fill)}, {
            NOISE_MASK: noise_mask,
            LATENT_MASK: latent_mask,
        }
