"""What a batch carries of the cache: the key of each sample, and what was found.

It is one object under one key of the batch, so that neither collating nor a precision plugin touches what it holds; it
goes to the device with the batch.

Shapes: ``b`` batch, ``n`` found or missing rows, ``z h w`` latents, ``H W`` pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from latentdm.autoencoders.images import Images
from latentdm.autoencoders.posterior import Posterior
from latentdm.batch import MASK, PIXELS, SOURCE
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

    def put(self, rows: "CachedRows", name: str, missing: Sequence[int], moments: Posterior, mask: Any) -> None:
        """Keep the moments of some rows of a batch."""


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
        keys: output → the keys of all rows.
        rows: output → which rows were found.
        moments: output → ``n k z h w`` of those.
        sizes: of all rows.
        variants: of all rows.
        mask_variants: of all rows.
        training: whether the rows are drawn as in training.
        failures: entries that could not be read.
        masks: rows whose mask was found, and ``n 1 H W`` uint8 of them.
        blank: ``H W`` where no image was read, because all that they would give was found; else None.

    Attributes:
        only: make nothing but what has a key: the cache is being filled.
        passed: entries found for samples that are not in the batch, as nothing of them is asked for.
    """

    def __init__(
        self,
        keys: dict[str, list[bytes]],
        rows: dict[str, list[int]],
        moments: dict[str, Tensor],
        sizes: list[tuple[int, ...]],
        variants: list[int],
        mask_variants: list[int],
        training: bool,
        failures: int = 0,
        masks: tuple[list[int], Tensor] | None = None,
        blank: tuple[int, int] | None = None,
    ) -> None:
        self.keys, self.rows, self.moments, self.sizes = keys, rows, moments, sizes
        self.variants, self.mask_variants, self.training = variants, mask_variants, training
        self.failures, self.masks, self.blank = failures, masks, blank
        self.only = False
        self.passed = 0

    def __len__(self) -> int:
        return len(self.sizes)

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
    def hits(self) -> int:
        """Entries found."""
        return sum(map(len, self.rows.values()))

    @property
    def misses(self) -> int:
        """Entries looked for in vain."""
        return len(self) * len(self.keys) - self.hits

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
    ) -> dict[str, Posterior]:
        """The moments of all rows: those that were found, and the others encoded now and handed to the sink.

        Args:
            to_encode: output → its images, ``b`` each.
            encode: encodes images.
            sink: keeps what it gives; None: nobody does.
            mask: gives the batch's masks ``b 1 H W`` bool as they hide images, for the entries that hold them.

        Returns:
            Output → ``b z h w``.
        """
        if sink is not None:
            sink.count(self)
        whole = [name for name in self.keys if name not in to_encode and not self.missing(name)]  # of images not read
        names = [*(name for name in to_encode if not self.only or name in self.keys), *whole]
        lacking = {name: self.missing(name) for name in names}
        sets = [_some(to_encode[name], lacking[name], len(self)) for name in names if lacking[name]]
        fresh: dict[str, Posterior] = {}
        if sets and self.blank is not None:
            lost = next(name for name in names if lacking[name])
            raise UserError(
                f"the batch holds latents without images, and {lost!r} is not among them; choose encoder=plain, or "
                "export from a cache that has it (a data set's own masks, or cache.mask_variants)"
            )
        if sets:
            order = [(name, row) for name in names for row in lacking[name]]
            moments, start = encode(sets, order), 0
            for name in (name for name in names if lacking[name]):
                part = slice(start, start + len(lacking[name]))
                fresh[name], start = moments.map(lambda moment, part=part: moment[part]), part.stop  # type: ignore[misc]
                if sink is not None and name in self.keys:
                    sink.put(self, name, lacking[name], fresh[name], mask)
        return {name: self._whole(name, lacking[name], fresh.get(name)) for name in names}

    def _whole(self, name: str, lacking: Sequence[int], fresh: Posterior | None) -> Posterior:
        found = self.moments.get(name)
        if found is None:
            assert fresh is not None
            return fresh
        parts = [found[:, part] for part in range(found.shape[1])]
        if fresh is None:
            return Posterior(parts[0], parts[1] if len(parts) > 1 else None)
        order = torch.tensor([*self.rows[name], *lacking], device=found.device).argsort()
        encoded = [fresh.mean] if fresh.logvar is None else [fresh.mean, fresh.logvar]
        both = [torch.cat([old.to(new.dtype), new])[order] for old, new in zip(parts, encoded, strict=True)]
        return Posterior(both[0], both[1] if len(both) > 1 else None)


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


# -------------------------------------------------------------------- in the worker


def collate_cached(samples: Sequence[dict[str, Any]], collate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Samples with a `CachedSample` each → a batch with a `CachedRows`; others as ``collate`` has them.

    Where only some samples have images, the others get black ones, which nobody looks at.
    """
    parts = [sample.get(CACHED) for sample in samples]
    if not all(isinstance(part, CachedSample) for part in parts):
        return collate([{name: value for name, value in s.items() if name != CACHED} for s in samples])
    whole = [{name: value for name, value in sample.items() if name != CACHED} for sample in samples]
    blank: tuple[int, int] | None = None
    for name in (PIXELS, SOURCE):
        like = next((sample[name] for sample in whole if isinstance(sample.get(name), Tensor)), None)
        if like is not None:
            for sample in whole:
                if name not in sample:
                    sample[name] = torch.zeros_like(like)
        elif name == PIXELS:
            blank = parts[0].sizes[-2:]  # type: ignore[union-attr]
    return collate(whole) | {CACHED: rows_of(parts, blank)}  # type: ignore[arg-type]


def rows_of(parts: Sequence[CachedSample], blank: tuple[int, int] | None) -> CachedRows:
    """Samples → a batch; ``blank`` is the size of their images where none of these was read."""
    names = [name for name in parts[0].keys if all(name in part.keys for part in parts)]
    rows: dict[str, list[int]] = {}
    moments: dict[str, Tensor] = {}
    for name in names:
        found = [(row, part.found[name][MOMENTS]) for row, part in enumerate(parts) if name in part.found]
        if found:
            rows[name] = [row for row, _ in found]
            moments[name] = torch.stack([moment for _, moment in found])
    masks = [
        (row, unpacked(entry[MASK], part.sizes[-1]))
        for row, part in enumerate(parts)
        for entry in part.found.values()
        if MASK in entry
    ]
    return CachedRows(
        keys={name: [part.keys[name] for part in parts] for name in names},
        rows=rows,
        moments=moments,
        sizes=[part.sizes for part in parts],
        variants=[part.variant for part in parts],
        mask_variants=[part.mask_variant for part in parts],
        training=parts[0].training,
        failures=sum(part.failures for part in parts),
        masks=([row for row, _ in masks], torch.stack([mask for _, mask in masks])) if masks else None,
        blank=blank,
    )


def packed(masks: Tensor) -> Tensor:
    """``n 1 H W`` bool → ``n H ⌈W/8⌉`` uint8, eight pixels a byte, the first in the highest bit."""
    n, _, height, width = masks.shape
    bits = pad(masks[:, 0].byte(), (0, -width % 8)).view(n, height, -1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return torch.sum(bits << shifts, -1, dtype=torch.uint8)


def unpacked(bits: Tensor, width: int) -> Tensor:
    """``H ⌈W/8⌉`` uint8 → ``1 H W`` uint8, 0 or 255."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width) * np.uint8(255))[None]
