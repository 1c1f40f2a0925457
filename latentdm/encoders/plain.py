"""Images → latents, and nothing else: ``VAEEncode`` and, with ``per_batch``, ``VHS_VAEEncodeBatched``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentdm.autoencoders.views import View
from latentdm.batch import LATENTS, PIXELS, crop
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

    def _views(self, batch: Mapping[str, Any]) -> tuple[dict[str, View], dict[str, Tensor]]:
        return {LATENTS: View(crop(batch[PIXELS], self.vae.spatial_compression))}, {}
