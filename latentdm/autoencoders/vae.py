"""`FrozenVAE`: an autoencoder that only encodes and decodes, in a dtype of its own, and never trains.

Shapes: ``b`` batch, ``f h w`` frames and pixels (``h w`` multiples of ``r``), ``z`` latent channels, ``r`` the spatial
and ``t`` the temporal compression.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from latentdm.autoencoders.families import family_of
from latentdm.autoencoders.fingerprint import fingerprint
from latentdm.autoencoders.images import Images
from latentdm.autoencoders.limits import POSTERIORS, check_encodable, warn_of_overflow
from latentdm.autoencoders.network import Network
from latentdm.autoencoders.posterior import Posterior
from latentdm.draws import FreshDraws
from latentdm.errors import UserError, attributed
from latentdm.frozen.chunks import Chunks
from latentdm.frozen.compilation import compile_mode
from latentdm.frozen.contexts import untracked
from latentdm.frozen.weights import DTYPES, Weights, shown_source
from latentdm.shown import one_line
from latentdm.tensors import dtype_name
from latentdm.validation import Check


class FrozenVAE:
    """A frozen autoencoder between pixels in 0…1 and latents as the model's family normalises them.

    It is no ``nn.Module`` on purpose: a model or a data module may hold one without training, wrapping, synchronising
    or saving its weights.

    In float32 it gives the bits of the family's own pipeline. In bfloat16 and float16 it computes channels-last. A
    cast that rounds is made on a copy, one tensor at a time and straight to the device; the weights as they came stay
    where they were. With them a sample whose latents are not finite is encoded again in float32, by itself: see
    `moments`.

    Args:
        autoencoder: a diffusers autoencoder, or any module with ``encode(x)`` for ``x`` ``b 3 h w`` in −1…1 that
            returns ``.latent_dist``, ``.latents`` or ``.latent``. It is put in eval mode and frozen.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the device computes in it
            natively, else float32 (a module that is no diffusers class keeps the dtype it has). Autocast never
            changes it; latents and their statistics are float32 always. ``"float16"`` warns where the autoencoder's
            config sets ``force_upcast``.
        encoder_only: drop the decoder, about half of the weights. It is taken from the ``autoencoder`` itself.
        compile: compile the encoder (its own ``.compile()``), once for each shape of a chunk; chunks then have one
            size for each size of image, and the last is padded. True, or one of torch.compile's modes, of which
            ``"reduce-overhead"`` replays CUDA graphs. Warns and runs eagerly where it cannot.
        tiling: when memory runs out, chunks are halved, retried, and the limit is remembered. ``"last_resort"`` then
            encodes single images that do not fit in tiles, which changes their latents; ``"always"`` does so from the
            start, ``"never"`` raises.

    Raises:
        ValueError: an unknown dtype, compile mode or tiling, an autoencoder without tiling, or a diffusers class that
            the table of families does not know.
        TypeError: the module has no ``encode``.

    Example:
        >>> vae = FrozenVAE.from_pretrained("stabilityai/sdxl-vae", dtype="float32")  # doctest: +SKIP
        >>> vae.encode(images, posterior="mode").shape  # images: 2 3 512 512 in 0…1  # doctest: +SKIP
        torch.Size([2, 4, 64, 64])
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        dtype: str = "auto",
        encoder_only: bool = False,
        compile: bool | str = False,
        tiling: str = "never",
    ) -> None:
        Check("FrozenVAE").choice("dtype", dtype, DTYPES)
        family = family_of(autoencoder)
        mode = compile_mode(compile, autoencoder, family.frame_axis, tiling)
        if tiling != "never" and not hasattr(autoencoder, "use_tiling"):
            raise UserError(f"FrozenVAE: tiling={tiling}, but {type(autoencoder).__name__} has none; set never")
        autoencoder.requires_grad_(False).eval()
        self._weights = Weights(autoencoder, dtype, channels_last=not family.frame_axis, mode=mode)
        self._encoder_only = encoder_only
        self._fresh = FreshDraws()
        self.class_name: str = type(autoencoder).__name__
        """Of the autoencoder."""
        self.spatial_compression: int = family.spatial_compression(autoencoder)
        """``r``: pixels a latent along one side."""
        self.temporal_compression: int | None = family.temporal_compression and family.temporal_compression(autoencoder)
        """``t``: frames a latent frame, or None for a family that takes no clips."""
        self.latent_channels: int = family.latent_channels(autoencoder)
        """``z``."""
        self.has_posterior: bool = family.has_posterior
        """Whether a posterior sample differs from the mode."""
        self.reencoded = 0
        """How many samples were encoded again in float32 so far."""
        self._normalization = family.normalization(autoencoder).to("cpu")
        self._chunks = Chunks(tiling, fixed=mode is not None, owner=self.class_name)
        self._network = Network(autoencoder, family, self._weights)
        if encoder_only:
            for part in family.decoder_parts:
                if isinstance(getattr(autoencoder, part, None), nn.Module):
                    setattr(autoencoder, part, nn.Module())  # empty, not None: QwenImage walks its decoder to encode
        if dtype == "float16":
            warn_of_overflow(autoencoder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        encoder_only: bool = False,
        config: str | PathLike[str] | None = None,
        use_safetensors: bool = True,
        compile: bool | str = False,
        tiling: str = "never",
        variant: str | None = None,
    ) -> Self:
        """Load an autoencoder: always the class that its config names, and only with weights that fit it key by key.

        Args:
            source: a hub id, a local folder written by ``save_pretrained``, a whole pipeline (its ``vae`` is taken),
                or a single ``.safetensors`` file.
            subfolder: where in the repository or folder it lies. A local folder without it that holds an autoencoder
                itself is taken as it is, so that a preset can be pointed at one.
            revision: of a hub repository.
            dtype: as for the class.
            encoder_only: as for the class.
            config: for a single file, the folder or JSON file of its config; by default ``config.json`` beside it.
            use_safetensors: False loads pickled weights (``.bin``) instead.
            compile: as for the class.
            tiling: as for the class.
            variant: of the weights' files, such as ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``.

        Raises:
            ValueError: nothing is there, or its weights do not fit the class that the config names.
        """
        from latentdm.autoencoders.loading import load_autoencoder

        autoencoder = load_autoencoder(source, subfolder, revision, config, use_safetensors, variant)
        return cls(autoencoder, dtype=dtype, encoder_only=encoder_only, compile=compile, tiling=tiling)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | PathLike[str],
        seed: int = 0,
        dtype: str = "auto",
        compile: bool | str = False,
        tiling: str = "never",
    ) -> Self:
        """Build an autoencoder with random weights, for tests and dry runs.

        Args:
            config: a diffusers config with its ``_class_name``, or a folder or JSON file that holds one.
            seed: of the weights; the global generator is left as it was.
            dtype: as for the class.
            compile: as for the class.
            tiling: as for the class.
        """
        from latentdm.autoencoders.loading import build_autoencoder

        return cls(build_autoencoder(config, seed=seed), dtype=dtype, compile=compile, tiling=tiling)

    @property
    def module(self) -> nn.Module:
        """The autoencoder as it computes: on its device, in its dtype and layout."""
        return self._weights.module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._weights.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in. ``"auto"`` is settled by the first device that it is put on, and stays."""
        return self._weights.first.dtype

    @property
    def can_decode(self) -> bool:
        """Whether the decoder is there."""
        return not self._encoder_only and callable(getattr(self._weights.original, "decode", None))

    @property
    def chunks(self) -> int:
        """How many chunks went through the autoencoder so far."""
        return self._chunks.count

    @property
    def retries(self) -> int:
        """How often a chunk was run again, smaller or tiled, because memory ran out."""
        return self._chunks.retries

    def fingerprint(self) -> dict[str, Any]:
        """All that its moments depend on beside the images, as JSON; the encoder's weights by a hash."""
        return fingerprint(self._weights.original, self.dtype, self._chunks.tiling)

    def to(self, device: torch.device | str, rest: bool = False) -> Self:
        """Move it to a device; the first time, settle its dtype there. At ``rest`` it goes when it is first needed."""
        self._weights.to(torch.device(device), rest)
        self._normalization = self._normalization.to(device)
        return self

    def __repr__(self) -> str:
        kind = shown_source(self._weights.original)
        settings = {"compile": self._weights.mode or False, "tiling": self._chunks.tiling}
        return one_line(self, kind, str(self._weights), encoder_only=self._encoder_only, **settings)

    # ---------------------------------------------------------------- pixels → latents

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """``h w`` or ``f h w`` of pixels → ``z h/r w/r`` or ``z (f−1)/t+1 h/r w/r``, a sample's shape."""
        frames = [(size[0] - 1) // (self.temporal_compression or 1) + 1] if len(size) == 3 else []
        return (self.latent_channels, *frames, *(side // self.spatial_compression for side in size[-2:]))

    def best_chunk(self, size: Sequence[int]) -> int | None:
        """How many images ``h w`` or clips ``f h w`` are encoded at once where nobody says; None: all of a batch."""
        return self._chunks.best(self.device, self._network.activation_bytes(size))

    def encode(
        self, pixels: Tensor, posterior: Literal["sample", "mode"] = "sample", noise: Tensor | None = None
    ) -> Tensor:
        """Encode images or clips.

        Args:
            pixels: ``b 3 h w`` float in 0…1, sides multiples of ``r``; video families take ``b 3 f h w`` too.
            posterior: ``"sample"`` draws from the posterior, ``"mode"`` takes its mean. Without effect for a family
                that has none (`has_posterior`).
            noise: standard normal, float32, of the latents' shape, for ``"sample"``; by default every call draws its
                own, reproducibly and without touching the global generator.

        Returns:
            ``b z h/r w/r`` (clips ``b z f' h/r w/r``) float32 latents, normalised as the family's models expect them.

        Raises:
            ValueError: a wrong shape, range or posterior, or latents that are not finite even in float32.
        """
        Check("FrozenVAE.encode").choice("posterior", posterior, POSTERIORS)
        with attributed("FrozenVAE.encode"):
            check_encodable(pixels, self)
        if posterior == "mode":
            noise = None
        elif noise is None and self.has_posterior:
            shape = self.latent_shape(pixels.shape[2:])
            noise = self._fresh(len(pixels)).normal("posterior", shape, self.device)
        return self.draw(self.moments([Images(pixels)]), noise)

    def moments(
        self,
        sets: Sequence[Images],
        per_batch: int | None = None,
        progress: bool = False,
        name: Callable[[int], str] = "row {}".format,
    ) -> Posterior:
        """Encode images that are prepared a chunk at a time: the one method of the library that encodes.

        Where memory runs out, the chunk is run again with half as many images, and the limit is remembered for this
        size of image. The bits of what was encoded before stay.

        The only wait for the device is a look whether all moments are finite. Each row that is not is encoded again
        alone in float32, from the weights as they came, with a warning that names it; `reencoded` counts them. The bits
        of all other rows stay. The float32 copy that this takes is kept for the next time.

        Args:
            sets: images of one size, one set behind the other; no more than a chunk is ever prepared.
            per_batch: images in a chunk; None takes `best_chunk`. The last chunk may be smaller, or padded if compiled.
            progress: show a bar when the call lasts longer than two seconds.
            name: what to call a row in a warning or an error.

        Returns:
            Of all ``rows``, ``rows z h/r w/r``, before normalisation.

        Raises:
            UserError: the moments of a row are not finite even in float32.
            torch.OutOfMemoryError: not even one image fits; it names the resolution, the need and the remedies.
        """
        encode = partial(self._network.moments, sets)
        count, shape = sum(map(len, sets)), sets[0].pixels.shape[2:]
        with untracked():
            size = self._chunks.size(count, shape, per_batch, self.device, self._network.activation_bytes)
            moments = Posterior.cat(self._chunks.run(encode, count, size, shape, self.dtype, progress))
            return moments if moments.is_finite() else self._mend(moments, sets, name)

    def draw(self, moments: Posterior, noise: Tensor | None) -> Tensor:
        """Latents of a posterior.

        Args:
            moments: ``b z h/r w/r``, as `moments` gives them.
            noise: standard normal, float32, alike; None takes the mean.

        Returns:
            ``b z h/r w/r`` float32, normalised as the family's models expect them.
        """
        with untracked():
            return self._normalization.apply(moments.draw(noise)).contiguous()

    def _mend(self, moments: Posterior, sets: Sequence[Images], name: Callable[[int], str]) -> Posterior:
        """Encode rows that are not finite again, each alone in float32."""
        for row in (~moments.finite_rows()).nonzero().flatten().tolist():
            again = None
            if self.dtype != torch.float32:
                again = self._network.moments(sets, slice(row, row + 1), 1, full=True)
            if again is None or not again.finite_rows().all():
                raise UserError(
                    f"FrozenVAE: the latents of {name(row)} are not finite in float32 either; look at that image, and "
                    f"whether the autoencoder's weights ({self.class_name}) are finite"
                )
            moments = moments.replace(row, again)
            self.reencoded += 1
            found = f"the latents of {name(row)} are not finite in {dtype_name(self.dtype)}"
            warnings.warn(f"FrozenVAE: {found}; encoded again in float32", stacklevel=4)
        return moments

    def posterior(self, pixels: Tensor) -> Posterior:
        """The moments of ``b 3 h w`` or ``b 3 f h w`` in 0…1, in one pass whatever it takes: for measuring."""
        with untracked():
            return self._network.moments([Images(pixels)], slice(0, len(pixels)), len(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode, for previews.

        Args:
            latents: ``b z h/r w/r`` (clips ``b z f' h/r w/r``) normalised latents.

        Returns:
            ``b 3 h w`` (``b 3 f h w``) float32 images in 0…1, clamped.

        Raises:
            ValueError: the decoder was dropped.
        """
        if self._encoder_only:
            raise UserError("FrozenVAE.decode: the decoder was dropped; set encoder_only: false to keep it")
        return self._network.decode(self.denormalize(latents.to(self.device)))

    def normalize(self, z: Tensor) -> Tensor:
        """What `posterior` gives → what the family's models train on: ``(z − mean) · scale / std`` in float32."""
        return self._normalization.apply(z)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`, in float32."""
        return self._normalization.undo(latents)
