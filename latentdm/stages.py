"""`Stage`: the one form of every step of the way of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from latentdm.draws import Draws


class Stage(ABC):
    """A step that reads some of a batch and writes more of it.

    A data module runs its stages in a fixed order: on the host captions and tokenizers; on the device augmentation,
    masks, the encoder, the text encoder, and then a user's own, which still see the pixels. All names are ours, those
    of the table in README; ``keys`` of the data module turns them into the user's.

    Attributes:
        reads: what must be there.
        writes: what it gives.
        drops: what the batch no longer holds when it reaches the model, because this stage has used it up.
        on_host: runs before the batch is sent to the device.
        training_only: is left out in validation, test and predict.

    Example:
        >>> class Brightness(Stage):
        ...     reads, writes = ("pixels",), ("brightness",)
        ...
        ...     def __call__(self, batch, draws):
        ...         return {"brightness": batch["pixels"].float().mean(dim=(1, 2, 3)) / 255}
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    on_host: bool = False
    training_only: bool = False

    @property
    def channels(self) -> dict[str, int]:
        """Name → channels, of what it writes at latent resolution: what a model may concatenate."""
        return {}

    def setup(self, device: torch.device | str) -> None:  # noqa: B027  # most hold nothing
        """Move what it holds to a device: once on every rank before the first batch, and to the CPU after the last."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """What it writes, and nothing else.

        Args:
            batch: what the batch holds so far under our names, channels first.
            draws: the random numbers of its samples. ``draws.training`` tells training from evaluation.

        Raises:
            UserError: what it reads has a wrong shape, dtype or range.
        """
