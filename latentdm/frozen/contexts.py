"""Where a frozen network computes: without gradients, outside of inference mode and of the trainer's autocast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

NOTHING = nullcontext()


def untracked() -> AbstractContextManager[None]:
    """Without gradients, and outside of inference mode.

    No inference tensor may reach training, nor make a compiled encoder compile again. A context costs microseconds,
    which a small batch feels: none is entered where there is nothing to change.
    """
    if torch.is_inference_mode_enabled():
        return _untracked()
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


@contextmanager
def _untracked() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # in this order: leaving inference mode turns gradients on
        yield


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The trainer's autocast must not override a frozen network's own dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return NOTHING
