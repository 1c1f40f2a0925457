"""What a cache of latents would take, from what some samples took."""

from dataclasses import dataclass
from typing import Any

from latentdm.batch import MASK
from latentdm.cache.cache import Cache
from latentdm.cache.keys import KEY_BYTES
from latentdm.cache.samples import draws_freely
from latentdm.datamodule import LatentDataModule
from latentdm.tensors import dtype_name

ROW_BYTES = KEY_BYTES + 4 + 6 * 4
"""Of an entry beside its moments: its key, a sum, and six sizes."""


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of an image.

    Attributes:
        bytes: of all entries of an image, on average.
        dtype: of the moments.
        each: what that is said of: an image, or one crop of it.
        reasons: what makes an image more than one entry, or none, in words.
    """

    bytes: float
    dtype: str
    each: str
    reasons: list[str]


def kept(datamodule: LatentDataModule, values: float, mask_bytes: float) -> Kept:
    """Estimate it.

    Args:
        datamodule: that is set up; without a cache the default settings of one are taken.
        values: of a sample's latents.
        mask_bytes: of a sample's mask.
    """
    vae, cache = datamodule.encoder.vae, datamodule.cache or Cache()
    dtype = cache.dtype_of(vae)
    moments = values * dtype.itemsize * (2 if vae.has_posterior else 1)
    entry, reasons, copies, each = moments + ROW_BYTES, [], 1, "an image"
    dataset: Any = getattr(datamodule.pixels, "train_set", None)
    drawn = datamodule.augment is not None or (dataset is not None and draws_freely(dataset))
    if drawn and cache.variants is None:
        each = "a crop"
        reasons.append("crops are drawn anew each epoch: nothing is kept unless cache.variants says how many")
    elif drawn:
        copies = cache.variants or 1
        reasons.append(f"cache.variants={copies} crops an image")
    elif getattr(datamodule.pixels, "flip", False):
        copies = 2
        reasons.append("both sides of an image, as images are mirrored")
    if MASK in datamodule.encoder.reads:
        times = _masks(datamodule, cache)
        entry += times * (entry + mask_bytes)
        reasons.append(
            f"{times} masked image{'s' * (times > 1)} beside each" if times else "masked images are encoded each time"
        )
    return Kept(copies * entry, dtype_name(dtype), each, reasons)


def _masks(datamodule: LatentDataModule, cache: Cache) -> int:
    """How many masked images are kept for each image: those under masks of its own, or under drawn ones."""
    if datamodule.masks is None or type(datamodule.masks).__name__ == "BatchMask":
        return 0 if datamodule.augment is not None else 1
    return 1 if type(datamodule.masks).__name__ == "AlphaMask" else cache.mask_variants or 0
