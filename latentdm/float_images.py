"""Float images kept whole: a precision plugin casts every float tensor before the hooks, and would round them.

A loader's collate function closes its float images and masks, Lightning's conversion passes them by, and the first
hook opens them again. uint8 images need none of this.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from latentdm.batch import MAPPINGS, BatchKeys, is_batch, rebuild

ROUNDED = (torch.float16, torch.bfloat16)
"""The input dtypes of a trainer that lose bits of an image."""


def closing(loaders: Any, keys: BatchKeys) -> Any:
    """The same loaders, alone or in any collection, with their float images closed; those of the user stay as they are.

    Loaders that are no torch ``DataLoader`` cannot be helped and come back unchanged.
    """
    if isinstance(loaders, DataLoader):
        if isinstance(loaders.collate_fn, _ClosingCollate):
            return loaders
        loader = copy(loaders)
        loader.collate_fn = _ClosingCollate(loaders.collate_fn, keys)
        return loader
    if isinstance(loaders, CombinedLoader):
        loaders.flattened = [closing(loader, keys) for loader in loaders.flattened]
    elif isinstance(loaders, Mapping):
        return {name: closing(loader, keys) for name, loader in loaders.items()}
    elif isinstance(loaders, list | tuple):
        return [closing(loader, keys) for loader in loaders]
    return loaders


def opened(batch: Any) -> Any:
    """The batch with its closed tensors opened."""
    if not is_batch(batch):
        return batch
    places = batch.items() if isinstance(batch, MAPPINGS) else enumerate(batch)
    tensors = {place: value.tensor for place, value in places if isinstance(value, _Closed)}
    return rebuild(batch, tensors) if tensors else batch


class _Closed:
    """A tensor that Lightning's conversion of inputs does not see; it can still be pinned."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def pin_memory(self, device: str | None = None) -> "_Closed":
        return _Closed(self.tensor.pin_memory())


class _ClosingCollate:
    """A loader's own collate function, with float images and masks closed afterwards. Workers pickle it."""

    def __init__(self, collate: Any, keys: BatchKeys) -> None:
        self.collate = collate
        self.keys = keys

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if not is_batch(batch):
            return batch
        floats = {
            name: _Closed(value)
            for name, value in self.keys.find(batch).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self.keys.replace(batch, floats) if floats else batch
