"""Images → latents, and nothing else: ``VAEEncode`` and, with ``per_batch``, ``VHS_VAEEncodeBatched``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentdm.autoencoders.frozen import Rows
from latentdm.batch import LATENTS, PIXELS, crop, unit_rgb
from latentdm.encoders.base import Encoder


class PlainEncoder(Encoder):
    """Adds ``latents`` ``b z h/r w/r``: the image's first three channels, cropped to the VAE's multiple and encoded.

    Video autoencoders also take clips ``b c f h w``, which give ``b z f' h/r w/r``.

    Arguments are those of `Encoder`.

    Example:
        >>> encoder = PlainEncoder(vae, per_batch=4)  # doctest: +SKIP
        >>> encoder({"pixels": images, "caption": captions}).keys()  # doctest: +SKIP
        dict_keys(['caption', 'latents'])
    """

    def _views(self, batch: Mapping[str, Any]) -> tuple[dict[str, Rows], dict[str, Tensor]]:
        pixels = crop(batch[PIXELS], self.vae.spatial_compression)
        return {LATENTS: lambda rows: unit_rgb(pixels[rows])}, {}
