"""What a batch carries of the cache: the key of each sample, and what was found.

It is one object under one key of the batch, so that neither collating nor a precision plugin touches what it holds; it
goes to the device with the batch.

Shapes: ``b`` batch, ``n`` found or missing rows, ``z h w`` latents, ``H W`` pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from latentdm.autoencoders.images import Images
from latentdm.autoencoders.posterior import Posterior
from latentdm.batch import MASK, PIXELS
from latentdm.errors import UserError

CACHED = "cached"
"""The key of the batch."""

MOMENTS, SIZES = "moments", "sizes"
"""The fields of an entry, beside ``mask``: ``k z h w`` (mean and, where there is one, logvar), and `NO_SIZES`' six."""

NO_SIZES = (-1, -1, -1, -1)
"""``original_size`` and ``crop_top_left`` of an image whose data module does not tell; those of the pixels follow."""

Encode = Callable[[Sequence[Images], Sequence[tuple[str, int]]], Posterior]
"""Images, and for each row of them its output and its row in the batch → their moments."""


class Sink(Protocol):
    """Takes what was encoded."""

    def count(self, rows: "CachedRows") -> None:
        """Count what a batch found."""

    def put(self, rows: "CachedRows", name: str, missing: Sequence[int], moments: Tensor, mask: Any) -> None:
        """Keep the moments ``n k z h w`` of some rows of a batch."""


@dataclass
class CachedSample:
    """The same of one sample, as a worker makes it.

    Attributes:
        keys: output → the key of its entry.
        found: output → the entry, where there is one.
        sizes: of the image; see `SIZES`.
        variant: in the place of the epoch, for what augments; −1: the epoch itself.
        mask_variant: the same for masks.
        training: whether it is drawn as in training.
        failures: entries that could not be read.
    """

    keys: dict[str, bytes]
    found: dict[str, dict[str, Tensor]]
    sizes: tuple[int, ...]
    variant: int = -1
    mask_variant: int = -1
    training: bool = False
    failures: int = 0


class CachedRows:
    """The same of a batch. It is no dataclass, whose fields Lightning would cast and copy one by one.

    Args:
        samples: of all rows.
        blank: ``H W`` where no image was read, because all that they would give was found; else None.

    Attributes:
        samples: of all rows; what was found is in ``moments`` and ``masks`` instead.
        names: the outputs that have an entry for each row.
        rows: output → which rows were found.
        moments: output → ``n k z h w`` of those.
        masks: rows whose mask was found, and ``n 1 H W`` uint8 of them.
        only: make nothing but what has a key: the cache is being filled.
        passed: entries found for samples that are not in the batch, as nothing of them is asked for.
    """

    def __init__(self, samples: Sequence[CachedSample], blank: tuple[int, int] | None = None) -> None:
        self.samples = [replace(sample, found={}) for sample in samples]
        self.blank = blank
        self.names = [name for name in samples[0].keys if all(name in sample.keys for sample in samples)]
        self.rows: dict[str, list[int]] = {}
        self.moments: dict[str, Tensor] = {}
        for name in self.names:
            found = {row: sample.found[name] for row, sample in enumerate(samples) if name in sample.found}
            if found:
                self.rows[name] = list(found)
                self.moments[name] = torch.stack([entry[MOMENTS] for entry in found.values()])
        masks = {
            row: unpacked(entry[MASK], sample.sizes[-1])
            for row, sample in enumerate(samples)
            for entry in sample.found.values()
            if MASK in entry
        }
        self.masks = (list(masks), torch.stack(list(masks.values()))) if masks else None
        self.only = False
        self.passed = 0

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: Any, **settings: Any) -> "CachedRows":
        """With its tensors on a device; Lightning calls it as it calls a tensor's."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True, **settings))

    def pin_memory(self) -> "CachedRows":
        """With its tensors in memory that a device copies from by itself; the loader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "CachedRows":
        changed = copy(self)
        changed.moments = {name: change(tensor) for name, tensor in self.moments.items()}
        changed.masks = self.masks and (self.masks[0], change(self.masks[1]))
        return changed

    @property
    def training(self) -> bool:
        """Whether the rows are drawn as in training."""
        return self.samples[0].training

    @property
    def hits(self) -> int:
        """Entries found."""
        return sum(map(len, self.rows.values()))

    @property
    def misses(self) -> int:
        """Entries looked for in vain."""
        return len(self) * len(self.names) - self.hits

    def missing(self, name: str) -> list[int]:
        """The rows whose moments must be encoded, for one output."""
        found = set(self.rows.get(name, ()))
        return [row for row in range(len(self)) if row not in found]

    def images(self) -> dict[str, Tensor]:
        """What stands for images that were not read: ``pixels`` ``b 3 H W`` of one black pixel's memory."""
        if self.blank is None:
            return {}
        black = torch.zeros((), dtype=torch.uint8, device=next(iter(self.moments.values())).device)
        return {PIXELS: black.expand(len(self), 3, *self.blank)}

    def with_masks(self, mask: Tensor | None) -> Tensor | None:
        """Masks ``b 1 H W`` with those that were found in their rows."""
        if self.masks is None:
            return mask
        rows, found = self.masks
        if len(rows) == len(self):
            return found
        if mask is None:
            return None
        if len(mask) == 1:
            mask = mask.expand(len(self), *mask.shape[1:])
        levels = found if mask.dtype == torch.uint8 else (found / 255).to(mask.dtype)
        return mask.index_copy(0, torch.tensor(rows, device=mask.device), levels.to(mask.device))

    def complete(
        self, to_encode: Mapping[str, Images], encode: Encode, sink: Sink | None, mask: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """The moments of all rows: those that were found, and the others encoded now and handed to the sink.

        Args:
            to_encode: output → its images, ``b`` each.
            encode: encodes images.
            sink: keeps what it gives; None: nobody does.
            mask: gives the batch's masks ``b 1 H W`` bool as they hide images, for the entries that hold them.

        Returns:
            Output → ``b k z h w``.
        """
        if sink is not None:
            sink.count(self)
        whole = [name for name in self.names if name not in to_encode and not self.missing(name)]  # of images not read
        names = [*(name for name in to_encode if not self.only or name in self.names), *whole]
        lacking = {name: rows for name in names if (rows := self.missing(name))}
        moments = {name: self.moments[name] for name in names if name not in lacking}
        if lacking and self.blank is not None:
            raise UserError(
                f"the batch holds latents without images, and {next(iter(lacking))!r} is not among them; choose "
                "encoder=plain, or export from a cache that has it (a data set's own masks, or cache.mask_variants)"
            )
        if lacking:
            sets = [_some(to_encode[name], rows, len(self)) for name, rows in lacking.items()]
            order = [(name, row) for name, rows in lacking.items() for row in rows]
            fresh = torch.split(encode(sets, order).stacked(), [len(rows) for rows in lacking.values()])
            for (name, rows), encoded in zip(lacking.items(), fresh, strict=True):
                if sink is not None and name in self.names:
                    sink.put(self, name, rows, encoded, mask)
                moments[name] = encoded
                if (found := self.moments.get(name)) is not None:
                    in_order = torch.tensor([*self.rows[name], *rows], device=found.device).argsort()
                    moments[name] = torch.cat([found.to(encoded.dtype), encoded])[in_order]
        return {name: moments[name] for name in names}


def _some(images: Images, rows: Sequence[int], count: int) -> Images:
    """Some rows of images."""
    if len(rows) == count:
        return images
    index = torch.tensor(rows, device=images.pixels.device)
    hole = images.hole
    if hole is not None and len(hole) > 1:
        hole = hole.index_select(0, index.to(hole.device))
    return Images(images.pixels.index_select(0, index), hole, images.fill)


def is_blank(batch: Mapping[str, Any]) -> bool:
    """Whether a batch's images were not read, as its latents were found: its ``pixels`` then show nothing."""
    cached = batch.get(CACHED)
    return isinstance(cached, CachedRows) and cached.blank is not None


def packed(masks: Tensor) -> Tensor:
    """``n 1 H W`` bool → ``n H ⌈W/8⌉`` uint8, eight pixels a byte, the first in the highest bit."""
    n, _, height, width = masks.shape
    bits = pad(masks[:, 0].byte(), (0, -width % 8)).view(n, height, -1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return torch.sum(bits << shifts, -1, dtype=torch.uint8)


def unpacked(bits: Tensor, width: int) -> Tensor:
    """``H ⌈W/8⌉`` uint8 → ``1 H W`` uint8, 0 or 255."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width) * np.uint8(255))[None]
