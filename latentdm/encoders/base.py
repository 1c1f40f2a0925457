"""What every encoder shares: its autoencoder, its chunks and its random draws."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentdm.autoencoders.frozen import FrozenVAE, check_posterior
from latentdm.autoencoders.views import View, spans
from latentdm.batch import INDEX, LATENTS, MAPPINGS, PIXELS, check_pixels, describe, sample_ids
from latentdm.draws import Draws
from latentdm.errors import UserError


class Encoder(ABC):
    """A callable from a batch of pixels to a batch of latents. It knows nothing of Lightning and works in a notebook.

    Args:
        vae: the frozen autoencoder, or a function that makes it (as Hydra's ``_partial_: true`` gives), which is then
            called in `setup`: in a trainer, once on every rank.
        per_batch: images that go through the autoencoder at once; None takes the whole batch. It bounds memory and
            does not change the result beyond the arithmetic of the batch shape.
        posterior: ``"sample"``, or ``"mode"`` for its mean. Autoencoders without a posterior give the same for both,
            and ``"mode"``, which only a person can have set, warns that it changes nothing.
        progress: show a progress bar where a single call lasts longer than two seconds.

    Raises:
        ValueError: a value out of range.
    """

    consumes: ClassVar[tuple[str, ...]] = (PIXELS,)
    """The keys that an encoded batch no longer holds."""

    def __init__(
        self,
        vae: FrozenVAE | Callable[[], FrozenVAE],
        per_batch: int | None = None,
        posterior: str = "sample",
        progress: bool = False,
    ) -> None:
        name = type(self).__name__
        if per_batch is not None and (isinstance(per_batch, bool) or not isinstance(per_batch, int) or per_batch < 1):
            raise UserError(
                f"{name}: per_batch must be an integer of at least 1, got {per_batch!r}; "
                "leave it out (null) to encode the whole batch at once"
            )
        if isinstance(vae, nn.Module) or not callable(vae):  # a module can be called, and makes no FrozenVAE
            _check_vae(vae, name)
        check_posterior(posterior, name)
        self._vae = vae
        self.per_batch = per_batch
        self.posterior = posterior
        self.progress = progress
        self._calls = count()
        self._warn_of_mode()

    def _warn_of_mode(self) -> None:
        if self.posterior == "mode" and isinstance(self._vae, FrozenVAE) and not self._vae.has_posterior:
            warnings.warn(
                f"{type(self).__name__}: posterior=mode has no effect: {self._vae.class_name} gives latents "
                "and no distribution to sample from",
                stacklevel=3,
            )

    @property
    def vae(self) -> FrozenVAE:
        """The frozen autoencoder; made now if it was not yet."""
        if not isinstance(self._vae, FrozenVAE):
            self._vae = _check_vae(self._vae(), type(self).__name__)
            self._warn_of_mode()
        return self._vae

    @property
    def channels(self) -> dict[str, int]:
        """Output key → channels, of those at latent resolution: what a model may concatenate."""
        return {LATENTS: self.vae.latent_channels}

    def setup(self, device: torch.device | str) -> None:
        """Make the autoencoder and move it to ``device``. Outside a trainer this is optional."""
        self.vae.to(device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a batch by itself, as in a notebook.

        Args:
            batch: ``pixels`` ``b c H W`` (c ∈ {1, 3, 4}; uint8 0…255 or float 0…1), an inpainting encoder's ``mask``,
                optionally ``index``, and anything else.

        Returns:
            What the batch held besides pixels and mask, untouched, and what `encode` gives.

        Raises:
            ValueError: pixels or mask of a wrong shape, dtype or range; the message names what would be right.
        """
        self._check(batch)
        count = len(batch[PIXELS])
        if INDEX in batch:
            ids = sample_ids(batch[INDEX], count, type(self).__name__)
        else:  # a count of calls, so that no two batches share their noise
            ids = [f"call{next(self._calls)}.{place}" for place in range(count)]
        encoded = self._encode(batch, Draws(0, 0, ids))
        return {key: value for key, value in batch.items() if key not in self.consumes} | encoded

    def encode(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """The encoder's own keys for a batch, on the autoencoder's device, in float32.

        Args:
            batch: as for a call.
            draws: the batch's random numbers.
        """
        self._check(batch)
        return self._encode(batch, draws)

    def _check(self, batch: Mapping[str, Any]) -> None:
        owner, vae = type(self).__name__, self.vae
        if not isinstance(batch, MAPPINGS):
            raise UserError(f"{owner}: expected a dict, as in {{'pixels': images}}, got {describe(batch)}")
        check_pixels(batch.get(PIXELS), vae.spatial_compression, owner)
        if batch[PIXELS].ndim == 5:
            vae.check_clip(batch[PIXELS].shape[2], owner)

    def images(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the autoencoder is given for each of its outputs, for people to look at.

        Args:
            batch: as for a call.

        Returns:
            Output key → ``b 3 h w`` (clips ``b 3 f h w``) float32 in 0…1.
        """
        self._check(batch)
        views, _ = self._views(batch)
        return {key: view.unit() for key, view in views.items()}

    @abstractmethod
    def _views(self, batch: Mapping[str, Any]) -> tuple[dict[str, View], dict[str, Tensor]]:
        """The images to encode, by output key, and the outputs that need no autoencoder; for checked pixels."""

    def _encode(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Encode a checked batch, all views of its ``b`` samples in one chunked pass.

        The noise of each view is drawn for its output key: that is its purpose.
        """
        views, ready = self._views(batch)
        vae, b, keys = self.vae, len(draws.ids), list(views)
        size = next(iter(views.values())).pixels.shape[2:]

        def noise(chunk: slice) -> Tensor:
            shape = vae.latent_shape(size)
            parts = [
                draws[rows].normal(keys[view], shape, vae.device)
                for view, rows, _ in spans([draws.ids] * len(keys), chunk)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        latents = vae.encode_rows(
            list(views.values()),
            noise=noise if self.posterior == "sample" and vae.has_posterior else None,
            per_batch=self.per_batch,
            progress=self.progress,
            name=lambda row: f"sample {draws.ids[row % b]} ({keys[row // b]})",
        )

        return dict(zip(keys, torch.split(latents, b) if len(keys) > 1 else [latents], strict=True)) | ready


def _check_vae(vae: object, owner: str) -> FrozenVAE:
    if not isinstance(vae, FrozenVAE):
        raise UserError(f"{owner}: vae must be a FrozenVAE, got {type(vae).__name__}; wrap it: FrozenVAE(autoencoder)")
    return vae
