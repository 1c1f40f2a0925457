"""Samples of a data module, taken through its stages without a trainer, and what they are called.

Shapes: ``b`` batch.
"""

from collections.abc import Generator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from latentdm.batch import LATENTS, MASK, PIXELS, Key
from latentdm.containers import is_batch, items_of
from latentdm.datamodule import LatentDataModule
from latentdm.errors import UserError

CAPTIONS: tuple[Key, ...] = ("name", "caption", "captions", "text", "prompt")
"""Where the titles of samples are looked for in a batch, if nobody says."""


def first_samples(
    datamodule: LatentDataModule, samples: int, device: torch.device, stage: str = "train"
) -> tuple[dict[str, Any], dict[str, Tensor], list[str] | None]:
    """Take the first batches of a data module through its stages, without a trainer.

    Args:
        datamodule: it is set up here.
        samples: how many are wanted at least; fewer come where the data has fewer, or no more of the first one's size.
            Of several loaders the first one is asked.
        device: where to encode.
        stage: ``"train"`` or ``"val"``.

    Returns:
        Inputs and outputs under our names, as `preview` takes them, and titles if all batches have some.

    Raises:
        UserError: there is no batch.
    """
    taken: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    captions: list[str] = []
    count = 0
    for batch in islice(batches(datamodule, stage), samples):
        inputs, outputs, held = encoded(datamodule, batch, device)
        if taken and inputs[PIXELS].shape[1:] != taken[0][0][PIXELS].shape[1:]:
            continue  # a bucket of another size
        taken.append((inputs, outputs))
        captions += captions_of(held) or []
        count += len(outputs[LATENTS])
        if count >= samples:
            break
    datamodule.teardown("fit")
    if not taken:
        raise UserError(f"no batch: the {stage} data is empty; choose another stage, or look at the data")
    inputs, outputs = (joined([part[which] for part in taken]) for which in (0, 1))
    return inputs, outputs, captions if len(captions) == count else None


def batches(datamodule: LatentDataModule, stage: str = "train") -> Generator[Any, None, None]:
    """Set a data module up, and give the batches of its first loader as they are.

    Args:
        datamodule: its teardown is the caller's.
        stage: ``"train"`` or ``"val"``.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    loaders = datamodule.train_dataloader() if stage == "train" else datamodule.val_dataloader()
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    yield from combined.flattened[0] if combined.flattened else ()


def encoded(
    datamodule: LatentDataModule, batch: Any, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor], dict[Any, Any]]:
    """Take a batch through the stages of a data module, without a trainer.

    Returns:
        Tensors of inputs and outputs under our names, with a mask for each sample; and all that the batch holds for
        `captions_of`: captions as the stages changed them come before those that the loader gave.
    """
    inputs, outputs = datamodule.encode(batch, device)
    b = len(outputs[LATENTS])
    held = {**(dict(items_of(batch)) if is_batch(batch) else {}), **inputs}
    if MASK in inputs and len(inputs[MASK]) == 1:
        inputs = {**inputs, MASK: inputs[MASK].expand(b, *inputs[MASK].shape[1:])}
    return first(inputs, b), first(outputs, b), held


def captions_of(batch: Any, key: Key | None = None) -> list[str] | None:
    """The titles of the samples of a user's batch.

    Args:
        batch: a dict, tuple, list or dataclass.
        key: where its list of strings lies; None looks for names, then for captions.

    Returns:
        One string a sample; None where there are none.
    """
    items = dict(items_of(batch))
    if isinstance(batch, tuple):
        items |= enumerate(batch)  # a named one has positions too
    for name in CAPTIONS if key is None else (key,):
        value = items.get(name)
        if isinstance(value, list | tuple) and value and all(isinstance(caption, str) for caption in value):
            return list(value)
    return None


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The tensors of several batches as those of one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def first(values: Mapping[str, Any], b: int) -> dict[str, Any]:
    """The first samples of each tensor (a mask for all stays one)."""
    return {name: value[:b] for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
