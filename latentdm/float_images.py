"""Float images kept whole: a precision plugin casts every float tensor before the hooks, and would round them.

They are closed as the trainer takes a batch from its loader, Lightning's conversion passes them by, and the first hook
opens them again. uint8 images need none of this.
"""

from typing import Any

import torch
from torch import Tensor

from latentdm.batch import MAPPINGS, BatchKeys, is_batch, rebuild
from latentdm.loaders import derived

ROUNDED = (torch.float16, torch.bfloat16)
"""The input dtypes of a trainer that lose bits of an image."""


def closing(loader: Any, keys: BatchKeys) -> None:
    """Let the trainer get a loader's batches with their float images and masks closed.

    Loaders that cannot be derived from are left as they are.
    """
    derived(loader, lambda self, batches: (_closed(batch, keys) for batch in batches))


def opened(batch: Any) -> Any:
    """The batch with its closed tensors opened."""
    if not is_batch(batch):
        return batch
    places = batch.items() if isinstance(batch, MAPPINGS) else enumerate(batch)
    tensors = {place: value.tensor for place, value in places if isinstance(value, _Closed)}
    return rebuild(batch, tensors) if tensors else batch


class _Closed:
    """A tensor that Lightning's conversion of inputs does not see."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _closed(batch: Any, keys: BatchKeys) -> Any:
    if not is_batch(batch):
        return batch
    floats = {
        name: _Closed(value)
        for name, value in keys.find(batch).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return keys.replace(batch, floats) if floats else batch
