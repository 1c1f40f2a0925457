"""`Network`: an autoencoder of any family behind one pair of functions, prepared images → moments and latents → images.

Shapes: ``n`` images of a chunk, ``f h w`` frames and pixels (``h w`` multiples of ``r``), ``z`` latent channels, ``r``
the spatial compression.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdm.autoencoders.families import Family, family_of
from latentdm.autoencoders.images import Images, prepare
from latentdm.autoencoders.posterior import Posterior, posterior_of
from latentdm.frozen.contexts import NOTHING, no_autocast
from latentdm.frozen.weights import Weights


class Network:
    """Runs the weights, and hides what sets the families apart: a frame axis, a fourth channel, patches, the range.

    Args:
        autoencoder: as it came, whose config sets the shapes.
        family: of its class.
        weights: its weights, where and as they compute.
    """

    def __init__(self, autoencoder: nn.Module, family: Family, weights: Weights) -> None:
        self._family = family
        self._weights = weights
        self._patch = family.patch(autoencoder)
        self._image_channels = family.image_channels(autoencoder)
        convolutions = (weight for weight in autoencoder.parameters() if weight.ndim in (4, 5))
        self._first_channels = len(next(convolutions, ()))

    def __getstate__(self) -> dict[str, Any]:
        """Without the family, whose functions have no names to be pickled by."""
        return {name: value for name, value in vars(self).items() if name != "_family"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._family = family_of(self._weights.original)

    def moments(
        self, sets: Sequence[Images], rows: slice, size: int, tiled: bool = False, full: bool = False
    ) -> Posterior:
        """Encode some rows of sets of images that lie one behind the other, inside of `untracked`.

        Args:
            sets: images of one size.
            rows: which of theirs.
            size: images that the autoencoder is given, at least as many as there are rows; the rest is zero.
            tiled: encode in tiles.
            full: in float32, from the weights as they came, and never compiled.

        Returns:
            ``n z h/r w/r`` (clips ``n z f' h/r w/r``), before normalisation, in the dtype of the weights.
        """
        family, weights, n = self._family, self._weights, rows.stop - rows.start
        module: Any = weights.full if full else weights.module
        device, dtype = weights.device, torch.float32 if full else weights.first.dtype
        compilation = None if full else weights.compilation
        layout = weights.layout(dtype)
        images = prepare(sets, rows, size, family.pixel_range, self._image_channels, device, dtype, layout)
        one_frame = family.frame_axis and images.ndim == 4
        if one_frame:
            images = images.unsqueeze(2)
        with _tiling(module) if tiled else NOTHING, no_autocast(images.device):
            output = module.encode(images) if compilation is None else compilation.encode(module, images)
        posterior = posterior_of(output)
        if size > n:
            posterior = posterior.map(lambda moment: moment[:n])
        if compilation is not None and compilation.replays:
            posterior = posterior.map(torch.clone)  # the next chunk writes where these lie
        if one_frame:
            posterior = posterior.map(lambda moment: moment.squeeze(2))
        if self._patch != 1:
            posterior = posterior.map(lambda moment: F.pixel_unshuffle(moment, self._patch))
        return posterior

    def activation_bytes(self, size: Sequence[int]) -> int:
        """Of the first convolution's output for one image ``h w`` (or ``f h w``): nothing later is larger by far.

        Twice that in the contiguous layout, of which a CPU's convolutions make a copy in one of their own.
        """
        weights, first = self._weights, self._weights.first
        copies = 2 if weights.layout(first.dtype) == torch.contiguous_format else 1
        return copies * self._first_channels * prod(size) * first.element_size()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """``n z h/r w/r`` (clips ``n z f' h/r w/r``) without normalisation → ``n 3 h w`` float32 in 0…1, clamped."""
        family, weights, (low, high) = self._family, self._weights, self._family.pixel_range
        dtype = weights.first.dtype
        z = z if self._patch == 1 else F.pixel_shuffle(z, self._patch)
        one_frame = family.frame_axis and z.ndim == 4
        if one_frame:
            z = z.unsqueeze(2)
        with no_autocast(z.device):
            ranged = family.decode(weights.module, z.to(dtype, memory_format=weights.layout(dtype)))
        ranged = (ranged.squeeze(2) if one_frame else ranged)[:, :3].float()
        return ((ranged - low) / (high - low)).clamp_(0, 1)


@contextmanager
def _tiling(module: Any) -> Iterator[None]:
    """Encode in tiles, for now."""
    before = module.use_tiling
    module.use_tiling = True
    try:
        yield
    finally:
        module.use_tiling = before
