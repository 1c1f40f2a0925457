"""What an encoder gives before anything is scaled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdm.errors import UserTypeError


@dataclass(frozen=True)
class Posterior:
    """What an encoder gives for a batch, before normalisation: the seam at which moments can be cached.

    Args:
        mean: ``b z h w`` float32, for clips ``b z f h w``.
        std: the same shape, or None for a family that gives latents and no distribution.
    """

    mean: Tensor
    std: Tensor | None

    def draw(self, noise: Tensor) -> Tensor:
        """``b z h w`` float32: mean + std · noise."""
        return self.mean if self.std is None else self.mean + self.std * noise

    def map(self, change: Callable[[Tensor], Tensor]) -> "Posterior":
        """The same change of shape for both moments."""
        return Posterior(change(self.mean), None if self.std is None else change(self.std))


def latent_of(output: Any) -> Posterior:
    """The posterior in an encoder's output: ``.latent_dist``, ``.latents`` or ``.latent``, as diffusers names them.

    Raises:
        TypeError: it has none of the three.
    """
    distribution = getattr(output, "latent_dist", None)
    if distribution is None:
        for name in ("latents", "latent"):
            if isinstance(getattr(output, name, None), Tensor):
                return Posterior(getattr(output, name).float(), None)
        raise UserTypeError(
            f"FrozenVAE: encode returned {type(output).__name__} with none of latent_dist, latents and latent"
        )
    if hasattr(distribution, "logvar") and not getattr(distribution, "deterministic", False):
        # exp in float32: a bf16 logvar loses nothing more on its way to a standard deviation
        return Posterior(distribution.mean.float(), torch.exp(0.5 * distribution.logvar.float()))
    if hasattr(distribution, "std"):
        return Posterior(distribution.mean.float(), distribution.std.float())
    return Posterior(distribution.mode().float(), None)
