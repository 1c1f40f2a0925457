"""What an encoder gives before anything is scaled, and how latents are scaled before a model trains on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from latentdm.errors import UserTypeError


@dataclass  # not frozen: that triples the time to make one, which a small batch feels
class Posterior:
    """The moments that an encoder gives for a batch, before normalisation: the seam at which they can be cached.

    Args:
        mean: ``b z h w``, for clips ``b z f h w``, in the dtype that the encoder computes in.
        logvar: the logarithm of the variance, alike; None for a family that gives latents and no distribution.
    """

    mean: Tensor
    logvar: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, noise: Tensor | None) -> Tensor:
        """``b z h w`` float32: mean + std · noise, the mean alone for None. Takes noise of the mean's shape."""
        mean = self.mean if self.mean.dtype == torch.float32 else self.mean.float()  # asking is faster
        if noise is None or self.logvar is None:
            return mean
        # exp in float32: a bf16 logvar loses nothing more on its way to a standard deviation
        return mean + torch.exp(0.5 * self.logvar.float()) * noise

    def stacked(self) -> Tensor:
        """``b k z h w``: the mean and, where there is one, the logvar."""
        return torch.stack([self.mean] if self.logvar is None else [self.mean, self.logvar], dim=1)

    @staticmethod
    def unstacked(moments: Tensor) -> "Posterior":
        """The same back."""
        return Posterior(moments[:, 0], moments[:, 1] if moments.shape[1] > 1 else None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Posterior":
        """The same change for both moments."""
        return Posterior(change(self.mean), None if self.logvar is None else change(self.logvar))

    def is_finite(self) -> bool:
        """Whether all moments are finite. The host waits for the device here, once.

        A sum is half the cost of ``isfinite``: what is not finite makes the sum so. (So may finite moments above 1e38.)
        """
        total = self.mean.sum(dtype=torch.float32)
        if self.logvar is not None:
            total = total + self.logvar.sum(dtype=torch.float32)
        return isfinite(total.item())

    def finite_rows(self) -> Tensor:
        """``b`` bool."""
        finite = self.mean.isfinite().flatten(1).all(1)
        return finite if self.logvar is None else finite & self.logvar.isfinite().flatten(1).all(1)

    def replace(self, row: int, other: "Posterior") -> "Posterior":
        """With another's only row in one row; in float32 where the other one is, so that nothing of it is lost."""
        replaced = self if self.mean.dtype == other.mean.dtype else self.map(Tensor.float)
        replaced.mean[row] = other.mean[0]
        if replaced.logvar is not None and other.logvar is not None:
            replaced.logvar[row] = other.logvar[0]
        return replaced

    @staticmethod
    def cat(parts: Sequence["Posterior"]) -> "Posterior":
        """Some posteriors, joined on the batch axis."""
        if len(parts) == 1:
            return parts[0]
        logvars = [part.logvar for part in parts if part.logvar is not None]
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat(logvars) if logvars else None)


def posterior_of(output: Any) -> Posterior:
    """The posterior in an encoder's output: ``.latent_dist``, ``.latents`` or ``.latent``, as diffusers names them.

    Raises:
        UserTypeError: it has none of the three.
    """
    distribution = getattr(output, "latent_dist", None)
    if distribution is None:
        for name in ("latents", "latent"):
            if isinstance(getattr(output, name, None), Tensor):
                return Posterior(getattr(output, name), None)
        raise UserTypeError(
            f"FrozenVAE: encode returned {type(output).__name__} with none of latent_dist, latents and latent"
        )
    if hasattr(distribution, "logvar") and not getattr(distribution, "deterministic", False):
        return Posterior(distribution.mean, distribution.logvar)
    if hasattr(distribution, "std"):
        smallest = torch.finfo(torch.float32).tiny  # a std of 0 has no logarithm; this one draws nothing either
        return Posterior(distribution.mean, 2 * distribution.std.float().clamp_min(smallest).log())
    return Posterior(distribution.mode(), None)


@dataclass(frozen=True)
class Normalization:
    """Latents as a model trains on them: ``(z − mean) · scale / std``, in float32; None leaves a step out.

    Args:
        mean: a number, or one a channel.
        scale: a number.
        std: one a channel.
    """

    mean: float | Sequence[float] | Tensor | None = None
    scale: float | None = None
    std: Sequence[float] | Tensor | None = None

    def to(self, device: torch.device | str) -> "Normalization":
        """The same with its statistics as float32 tensors on a device."""
        return Normalization(_statistic(self.mean, device), self.scale, _statistic(self.std, device))

    def apply(self, z: Tensor) -> Tensor:
        """``b z h w`` or ``b z f h w`` as an encoder gives it → the same shape, float32."""
        z = z if z.dtype == torch.float32 else z.float()
        z = z if self.mean is None else z - _along_channels(self.mean, z)
        z = z if self.scale is None else z * self.scale
        return z if self.std is None else z / _along_channels(self.std, z)

    def undo(self, latents: Tensor) -> Tensor:
        """The inverse of `apply`."""
        z = latents.float()
        z = z if self.std is None else z * _along_channels(self.std, z)
        z = z if self.scale is None else z / self.scale
        return z if self.mean is None else z + _along_channels(self.mean, z)


def _statistic(value: Any, device: torch.device | str) -> Tensor | None:
    """A number or one a channel → ``1`` or ``z`` float32."""
    return None if value is None else torch.as_tensor(value, dtype=torch.float32).reshape(-1).to(device)


def _along_channels(statistic: Any, z: Tensor) -> Tensor:
    """``z`` → ``1 z 1 1`` or ``1 z 1 1 1``, as the latents are."""
    return torch.as_tensor(statistic, dtype=torch.float32, device=z.device).view(1, -1, *(1 for _ in z.shape[2:]))
