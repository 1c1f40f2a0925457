"""Images → latents, and nothing else: ``VAEEncode`` and, with ``per_batch``, ``VHS_VAEEncodeBatched``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentdm.autoencoders.images import Images
from latentdm.batch import LATENTS, PIXELS, SOURCE, SOURCE_LATENTS
from latentdm.encoders.base import Encoder


class PlainEncoder(Encoder):
    """Adds ``latents`` ``b z h/r w/r``: the image's first three channels, cropped to the VAE's multiple and encoded.

    Where the batch holds ``source``, another picture of the same size, ``source_latents`` are made of it alike: what an
    editing model is shown. Video autoencoders also take clips ``b c f h w``, which give ``b z f' h/r w/r``.

    Arguments are those of `Encoder`.

    Example:
        >>> encoder = PlainEncoder(vae, per_batch=4)  # doctest: +SKIP
        >>> encoder({"pixels": images, "caption": captions}).keys()  # doctest: +SKIP
        dict_keys(['caption', 'latents'])
    """

    writes = (LATENTS, SOURCE_LATENTS)

    def _prepare(self, batch: Mapping[str, Any]) -> tuple[dict[str, Images], dict[str, Tensor]]:
        to_encode = {LATENTS: Images(self.crop(batch[PIXELS]))}
        if batch.get(SOURCE) is not None:
            to_encode[SOURCE_LATENTS] = Images(self.crop(batch[SOURCE]))
        return to_encode, {}
