"""What every encoder shares: its autoencoder, its chunks and its random draws."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentdm.autoencoders.images import Images
from latentdm.autoencoders.limits import POSTERIORS, check_clip
from latentdm.autoencoders.posterior import Posterior
from latentdm.autoencoders.vae import FrozenVAE
from latentdm.batch import INDEX, LATENTS, MASK, PIXELS, SOURCE, sample_ids
from latentdm.cache.rows import CACHED, CachedRows, Sink
from latentdm.containers import MAPPINGS, fields_of
from latentdm.draws import Draws, FreshDraws
from latentdm.errors import UserError, attributed
from latentdm.shown import one_line
from latentdm.stages import Stage
from latentdm.tensors import check_pixels, crop, describe, how_to_convert, unit_mask
from latentdm.validation import Check


class Encoder(Stage):
    """A stage that turns pixels into latents. It knows nothing of Lightning and works in a notebook.

    Args:
        vae: the frozen autoencoder, or a function that makes it (as Hydra's ``_partial_: true`` gives), which is then
            called in `setup`: in a trainer, once on every rank.
        per_batch: images that go through the autoencoder at once; None takes as many as are best on this device (the
            whole batch on a GPU, a few on a CPU). It bounds memory and does not change the result beyond the arithmetic
            of the batch shape.
        posterior: ``"sample"``, or ``"mode"`` for its mean. Autoencoders without a posterior give the same for both,
            and ``"mode"``, which only a person can have set, warns that it changes nothing.
        progress: show a progress bar where a single call lasts longer than two seconds.
        multiple: what sides are cropped to, a multiple of the autoencoder's factor ``r``; None: ``r``. 16 for models
            that pack 2×2 latents into a token (FLUX, Qwen-Image, Chroma).

    Raises:
        UserError: a value out of range.
    """

    reads: tuple[str, ...] = (PIXELS,)
    drops: tuple[str, ...] = (PIXELS, SOURCE, CACHED)
    cache: Sink | None = None
    """Where the moments of samples with a key go; a data module with a cache sets it."""

    def __init__(
        self,
        vae: FrozenVAE | Callable[[], FrozenVAE],
        per_batch: int | None = None,
        posterior: str = "sample",
        progress: bool = False,
        multiple: int | None = None,
    ) -> None:
        check = Check(type(self).__name__)
        if per_batch is not None:
            check.integer("per_batch", per_batch, 1, hint="leave it out (null) for what is best on this device")
        if multiple is not None:
            check.integer("multiple", multiple, 1)
        if isinstance(vae, nn.Module) or not callable(vae):  # a module can be called, and makes no FrozenVAE
            _check_vae(vae, check.owner)
        self._vae = vae
        self.per_batch = per_batch
        self.posterior = check.choice("posterior", posterior, POSTERIORS)
        self.progress = progress
        self.multiple = multiple
        self._fresh = FreshDraws()
        self._attributed = attributed(check.owner)
        self._check_made()

    def _check_made(self) -> None:
        """What depends on the autoencoder, as soon as it is there."""
        if not isinstance(self._vae, FrozenVAE):
            return
        name, vae = type(self).__name__, self._vae
        if self.multiple is not None and self.multiple % vae.spatial_compression:
            raise UserError(
                f"{name}: multiple must be a multiple of {vae.class_name}'s factor {vae.spatial_compression}, got "
                f"{self.multiple}; leave it out (null) unless the model packs latents"
            )
        if self.posterior == "mode" and not vae.has_posterior:
            warnings.warn(
                f"{name}: posterior=mode has no effect: {vae.class_name} gives latents and no distribution to sample "
                "from",
                stacklevel=4,
            )

    def __repr__(self) -> str:
        return one_line(self, vae=self._vae)

    @property
    def vae(self) -> FrozenVAE:
        """The frozen autoencoder; made now if it was not yet."""
        if not isinstance(self._vae, FrozenVAE):
            self._vae = _check_vae(self._vae(), type(self).__name__)
            self._check_made()
        return self._vae

    @property
    def channels(self) -> dict[str, int]:
        """Output key → channels, of those at latent resolution: what a model may concatenate."""
        return {LATENTS: self.vae.latent_channels}

    def setup(self, device: torch.device | str) -> None:
        """Make the autoencoder and move it to ``device``, with a cache when something is first missing there.

        Outside a trainer this is optional.
        """
        self.vae.to(device, rest=self.cache is not None)

    def crop(self, image: Tensor) -> Tensor:
        """The centred part of ``… H W`` that is encoded: ``… h w``, a view."""
        return crop(image, self.multiple or self.vae.spatial_compression)

    def __call__(self, batch: Mapping[str, Any], draws: Draws | None = None) -> dict[str, Any]:
        """Encode a batch, on the autoencoder's device.

        Args:
            batch: ``pixels`` ``b c H W`` (c ∈ {1, 3, 4}; uint8 0…255 or float 0…1), an inpainting encoder's ``mask``,
                perhaps ``source`` (like ``pixels``) and ``index``, and anything else.
            draws: the random numbers of its samples. None: a call by hand, as in a notebook, which draws for itself,
                from ``index`` where there is one.

        Returns:
            What this stage writes, in float32. By hand: the whole batch, without pixels, source and mask.

        Raises:
            UserError: pixels or mask of a wrong shape, dtype or range; the message names what would be right.
        """
        with self._attributed:
            if not isinstance(batch, MAPPINGS):
                named = fields_of(batch)
                if named is None:
                    advice = how_to_convert(batch)
                    raise UserError(f"expected a dict, as in {{'pixels': images}}, got {describe(batch)}{advice}")
                batch = named
            cached = batch.get(CACHED)
            if isinstance(cached, CachedRows) and cached.masks is not None:
                batch = {**batch, MASK: cached.with_masks(batch.get(MASK))}
            self._check(batch)
            if draws is not None:
                return self._encode(batch, draws)
            count = len(batch[PIXELS])
            mine = Draws(0, 0, sample_ids(batch[INDEX], count)) if INDEX in batch else self._fresh(count)
            return {key: value for key, value in batch.items() if key not in self.drops} | self._encode(batch, mine)

    def images(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the autoencoder is given for each of its outputs, for people to look at.

        Args:
            batch: as for a call.

        Returns:
            Output key → ``b 3 h w`` (clips ``b 3 f h w``) float32 in 0…1.
        """
        with self._attributed:
            self._check(batch)
            to_encode, _ = self._prepare(batch)
            return {key: images.unit() for key, images in to_encode.items()}

    def _check(self, batch: Mapping[str, Any]) -> None:
        check_pixels(batch.get(PIXELS), self.multiple or self.vae.spatial_compression)
        pixels, source = batch[PIXELS], batch.get(SOURCE)
        if pixels.ndim == 5:
            check_clip(pixels.shape[2], self.vae)
        if source is not None:
            check_pixels(source, 1, SOURCE)
            if len(source) != len(pixels) or source.shape[2:] != pixels.shape[2:]:
                raise UserError(
                    f"{SOURCE}: expected the size of {PIXELS} ({describe(pixels)}), got {describe(source)}; crop and "
                    "resize both alike"
                )

    @abstractmethod
    def _prepare(self, batch: Mapping[str, Any]) -> tuple[dict[str, Images], dict[str, Tensor]]:
        """The images to encode, by output key, and the outputs that need no autoencoder; for a checked batch."""

    def _encode(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Encode all images of a checked batch in one chunked pass; the output key is the purpose of their noise."""
        to_encode, ready = self._prepare(batch)
        vae, b, keys, cached = self.vae, len(draws.ids), list(to_encode), batch.get(CACHED)

        def encode(sets: Sequence[Images], order: Sequence[tuple[str, int]] | None = None) -> Posterior:
            def name(row: int) -> str:
                key, own = (keys[row // b], row % b) if order is None else order[row]
                return f"sample {draws.ids[own]} ({key})"

            return vae.moments(sets, self.per_batch, self.progress, name)

        if isinstance(cached, CachedRows):  # only what the cache lacks is encoded

            def hidden() -> Tensor:
                mask = unit_mask(batch[MASK], batch[PIXELS]).round() == 1
                return mask.expand(b, -1, -1, -1)

            completed = cached.complete(to_encode, encode, self.cache, hidden)
            keys, whole = list(completed), list(completed.values())
            moments = Posterior.unstacked(whole[0] if len(whole) == 1 else torch.cat(whole))
        else:
            moments = encode(list(to_encode.values()))
        noise = None
        if self.posterior == "sample" and vae.has_posterior:
            parts = [draws.normal(key, moments.mean.shape[1:], moments.mean.device) for key in keys]
            noise = parts[0] if len(parts) == 1 else torch.cat(parts)
        latents = vae.draw(moments, noise)
        return dict(zip(keys, torch.split(latents, b) if len(keys) > 1 else [latents], strict=True)) | ready


def _check_vae(vae: object, owner: str) -> FrozenVAE:
    if not isinstance(vae, FrozenVAE):
        raise UserError(f"{owner}: vae must be a FrozenVAE, got {type(vae).__name__}; wrap it: FrozenVAE(autoencoder)")
    return vae
