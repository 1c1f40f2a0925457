"""How latents are scaled before a model trains on them, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        z = z.float()
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
