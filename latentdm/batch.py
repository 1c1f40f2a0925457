"""The keys of a batch, how a user's batch is read and written, and what is wrong with one, said once.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels as they come, ``h w`` pixels after the crop to the VAE's multiple.
"""

from collections.abc import Mapping, MutableMapping, Sequence, Set
from copy import copy
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.errors import UserError

PIXELS = "pixels"
MASK = "mask"
INDEX = "index"
SEGMENTATION = "segmentation"
CAPTION = "caption"
LATENTS = "latents"
MASKED_LATENTS = "masked_latents"
NOISE_MASK = "noise_mask"
LATENT_MASK = "latent_mask"

INPUTS = (PIXELS, MASK, INDEX)
OUTPUTS = (LATENTS, MASKED_LATENTS, NOISE_MASK, LATENT_MASK)
OPTIONAL = (SEGMENTATION, CAPTION)
"""Inputs that one mask source or the captions' settings read; they stay in the batch."""

ROUNDING = 1e-4
"""How far beyond 0…1 floats may lie: resizing in float32 goes some 1e-7 beyond."""

Key = str | int

MAPPINGS = (dict, Mapping)
"""What a dict batch may be. A plain dict is known at once, where the abstract class alone would take its time."""


class BatchKeys:
    """Finds our keys in a user's batch and puts the results where the user wants them.

    Args:
        keys: our name → the user's: a key of a dict batch, or a position in a tuple or list batch, for inputs and
            outputs alike. Names left out keep ours; in a tuple batch ``pixels`` must be given a position. None keeps
            an output out of the batch.
        layout: ``"CHW"``, or ``"HWC"`` for channels-last images.

    Raises:
        ValueError: an unknown name or layout, or a mix of keys and positions.
    """

    def __init__(self, keys: Mapping[str, Key | None] | None = None, layout: str = "CHW") -> None:
        given = dict(keys or {})
        self.keys: dict[str, Key] = {name: key for name, key in given.items() if key is not None}
        self.left_out = given.keys() - self.keys.keys()
        unknown = [name for name in given if name not in INPUTS + OUTPUTS + OPTIONAL]
        if unknown:
            names = ", ".join(INPUTS + OUTPUTS + OPTIONAL)
            raise UserError(f"LatentDataModule: keys: unknown name {unknown[0]!r}; the names are {names}")
        if not self.left_out <= set(OUTPUTS):
            name = min(self.left_out - set(OUTPUTS))
            raise UserError(
                f"LatentDataModule: keys: {name!r} goes into the encoder; only outputs can be left out (null)"
            )
        if any(isinstance(key, int) and key < 0 for key in self.keys.values()):
            raise UserError(f"LatentDataModule: keys: {self.keys} has a negative position; count from 0, at the front")
        if len({isinstance(key, int) for key in self.keys.values()}) > 1:
            raise UserError(
                f"LatentDataModule: keys: {self.keys} mixes keys and positions; "
                "use strings for dict batches, or integers for tuples"
            )
        if layout not in ("CHW", "HWC"):
            raise UserError(f"LatentDataModule: layout must be 'CHW' or 'HWC', got {layout!r}")
        self.layout = layout
        self._inputs = [(name, self._key(name)) for name in INPUTS + OPTIONAL]

    def find(self, batch: Mapping[Any, Any] | Sequence[Any]) -> dict[str, Any]:
        """Our inputs under our names, as they lie in the batch; what is not there is left out."""
        if isinstance(batch, MAPPINGS):
            return {name: batch[key] for name, key in self._inputs if key in batch}
        return {name: batch[key] for name, key in self._inputs if isinstance(key, int) and key < len(batch)}

    def read(self, batch: Mapping[Any, Any] | Sequence[Any]) -> dict[str, Tensor]:
        """Our inputs, under our names and channels first.

        Returns:
            ``pixels`` ``b c H W`` (clips ``b c f H W``) and, where the batch has them, ``mask`` and ``index``.

        Raises:
            ValueError: the batch has no pixels, or they are no tensor of four or five dimensions.
        """
        found = self.find(batch)
        if PIXELS not in found:
            raise UserError(self._no_pixels(batch))
        pixels, mask = found[PIXELS], found.get(MASK)
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            raise UserError(
                f"LatentDataModule: batch[{self._key(PIXELS)!r}]: expected a tensor of shape {_LAYOUTS[self.layout]}, "
                f"got {describe(pixels)}"
            )
        if self.layout == "HWC":
            found[PIXELS] = pixels.movedim(-1, 1)
            if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] == 1:
                found[MASK] = mask.movedim(-1, 1)
        return found

    def replace(self, batch: Mapping[Any, Any] | Sequence[Any], values: Mapping[str, Any]) -> Any:
        """A batch of the same kind with some of our inputs replaced, each in its place."""
        return rebuild(batch, {self._key(name): value for name, value in values.items()})

    def write(
        self, batch: Mapping[Any, Any] | Sequence[Any], results: Mapping[str, Tensor], drop: Sequence[str]
    ) -> Any:
        """The user's batch with our results in it; everything else stays untouched, in its order.

        Args:
            batch: the user's batch.
            results: our name → tensor.
            drop: our inputs that do not stay (unless a result takes their place).

        Raises:
            ValueError: a result would overwrite something of the user's, or a tuple has no place for it.
        """
        leaving = {self._key(name) for name in drop}
        free = leaving | {key for name, key in self._inputs if name in results}
        placed: dict[Key, Any] = {}
        for name, value in results.items():
            if name in self.left_out:
                continue
            key = self._key(name)
            self._check_place(name, key, batch, free, placed)
            placed[key] = value
        if isinstance(batch, MAPPINGS):
            return rebuild(batch, placed, leaving)
        position = self.keys[PIXELS]
        if PIXELS in drop and position not in placed:
            raise UserError(
                f"LatentDataModule: keys: the pixels leave position {position} of the tuple and nothing fills it; "
                f"send an output there, as in keys={{pixels: {position}, latents: {position}}}, or set keep_pixels"
            )
        return rebuild(batch, placed)

    def missing_mask(self, batch: Mapping[Any, Any] | Sequence[Any]) -> str:
        """What to tell a user whose encoder needs a mask that the batch does not hold."""
        if isinstance(batch, MAPPINGS):
            held, example = f"only {_listed(batch)}", "masks"
        else:
            held, example = f"being a {type(batch).__name__} of {len(batch)}", "1"
        return (
            f"LatentDataModule: the batch has no {self._key(MASK)!r}, {held}; name the masks with keys, as in "
            f"keys={{mask: {example}}}, or choose a source (masks=random, masks=alpha)"
        )

    def missing_caption(self, batch: Mapping[Any, Any] | Sequence[Any]) -> str:
        """What to tell a user who asks for changes of captions that the batch does not hold."""
        held = f"only {_listed(batch)}" if isinstance(batch, MAPPINGS) else f"being a {type(batch).__name__}"
        return (
            f"LatentDataModule: the batch has no {self._key(CAPTION)!r}, {held}; name the captions with keys, as in "
            "keys={caption: text}, or leave out the captions' settings (captions=null)"
        )

    def _key(self, name: str) -> Key:
        return self.keys.get(name, name)

    def _check_place(self, name: str, key: Key, batch: Any, free: set[Key], placed: Mapping[Key, Any]) -> None:
        if key in placed:
            raise UserError(
                f"LatentDataModule: keys: {name!r} and another result both go to {key!r}; give each a place of its own"
            )
        if isinstance(batch, MAPPINGS):
            if key in batch and key not in free:
                raise UserError(
                    f"LatentDataModule: the batch already has {key!r} ({describe(batch[key])}), which the encoder's "
                    f"{name!r} would overwrite; rename one, as in keys={{{name}: my_{name}}}"
                )
        elif not isinstance(key, int):
            raise UserError(
                f"LatentDataModule: keys: the encoder's {name!r} has no position in a {type(batch).__name__} batch of "
                f"{len(batch)}; give it one, as in keys={{…, {name}: {len(batch)}}}, or leave it out with null"
            )
        elif key < len(batch) and key not in free:
            raise UserError(
                f"LatentDataModule: keys: position {key} already holds {describe(batch[key])}, which {name!r} would "
                f"overwrite; use {len(batch)} or more to append it"
            )

    def _no_pixels(self, batch: Mapping[Any, Any] | Sequence[Any]) -> str:
        key = self._key(PIXELS)
        if isinstance(batch, MAPPINGS):
            return (
                f"LatentDataModule: the batch has no {key!r}, only {_listed(batch)}; "
                "name the images with keys, as in keys={pixels: image}"
            )
        held = f"LatentDataModule: the batch is a {type(batch).__name__} of {len(batch)}"
        if isinstance(key, int):
            return f"{held} and has no position {key} for the pixels; count from 0 in keys={{pixels: …}}"
        return f"{held}; say where its images lie and the latents go, as in keys={{pixels: 0, latents: 0}}"


def rebuild(batch: Any, placed: Mapping[Any, Any], leaving: Set[Any] = frozenset()) -> Any:
    """A batch of the same kind with some places filled, and for a dict some keys gone; the batch itself stays as it is.

    A named tuple that grows becomes a plain one.
    """
    if isinstance(batch, MAPPINGS):
        rebuilt = copy(batch) if isinstance(batch, (dict, MutableMapping)) else dict(batch)
        for key in leaving:
            rebuilt.pop(key, None)
        rebuilt.update(placed)
        return rebuilt
    items = {**dict(enumerate(batch)), **placed}
    if max(items) >= len(items):
        raise UserError(
            f"LatentDataModule: keys: position {max(items)} leaves a gap after a batch of {len(batch)}; "
            f"use {len(batch)}"
        )
    row = [items[position] for position in range(len(items))]
    if hasattr(batch, "_make") and len(row) == len(batch):
        return batch._make(row)
    return row if isinstance(batch, list) else tuple(row)


def sample_ids(index: object, count: int, owner: str) -> list[int | str]:
    """The ids that a batch's ``index`` gives its samples: what randomness is keyed on.

    Args:
        index: ``b`` integers, as a tensor or a list; strings serve as well.
        count: how many images there are.
        owner: the class that an error names.

    Raises:
        ValueError: it holds something else, or not one an image.
    """
    ids = index.flatten().tolist() if isinstance(index, Tensor) else index
    if not isinstance(ids, (list, tuple)) or not (_plain(ids) or all(map(_is_id, ids))):
        raise UserError(
            f"{owner}: {INDEX}: expected one integer an image, got {describe(index)}; "
            "name another key with keys={index: …}"
        )
    if len(ids) != count:
        raise UserError(f"{owner}: {INDEX}: got {len(ids)} for {count} images ({describe(index)}); give one an image")
    return list(ids)


def _plain(ids: Sequence[object]) -> bool:
    """What nearly all batches hold, seen at a glance."""
    return set(map(type, ids)) == {int}


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_batch(batch: object) -> bool:
    """Whether something is a batch that can hold images: a dict, tuple or list."""
    return isinstance(batch, _BATCHES)


def check_pixels(pixels: object, multiple: int, owner: str) -> None:
    """Check images before they are encoded.

    Args:
        pixels: ``b c H W`` or clips ``b c f H W``, c ∈ {1, 3, 4}, uint8 0…255 or float 0…1. The range of floats is
            looked at (on an accelerator that waits for the device: another reason to ship uint8).
        multiple: the VAE's spatial compression; a side may not be smaller.
        owner: the class that an error names.

    Raises:
        ValueError: naming what was found and what is right.
    """
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        raise UserError(f"{owner}: {PIXELS}: expected a tensor of shape {_LAYOUTS['CHW']}, got {describe(pixels)}")
    if pixels.shape[1] not in (1, 3, 4):
        hint = "; for channels-last images set layout=HWC" if pixels.shape[-1] in (1, 3, 4) else ""
        raise UserError(
            f"{owner}: {PIXELS}: expected 1, 3 or 4 channels in {_LAYOUTS['CHW']}, got {describe(pixels)}{hint}"
        )
    if pixels.shape[0] == 0:
        raise UserError(f"{owner}: {PIXELS}: the batch is empty, got {describe(pixels)}")
    if min(pixels.shape[-2:]) < multiple:
        raise UserError(
            f"{owner}: {PIXELS}: {pixels.shape[-2]}×{pixels.shape[-1]} is smaller than the autoencoder's factor "
            f"{multiple}; use images of at least {multiple}×{multiple}"
        )
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        raise UserError(f"{owner}: {PIXELS}: expected uint8 in 0…255 or float in 0…1, got {describe(pixels)}")
    check_range(pixels, PIXELS, owner)


def check_range(levels: Tensor, name: str, owner: str) -> None:
    """Raise ValueError unless floats lie in 0…1, give or take what resizing rounds."""
    low, high = (float(bound) for bound in levels.detach().aminmax())
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    if not (isfinite(low) and isfinite(high)):
        remedy = "look at how they were made"
    elif low <= -0.5:
        remedy = "undo the normalisation (for −1…1: (x + 1) / 2)"
    else:
        remedy = "divide by 255" if high > 2 else "clamp them"
    raise UserError(
        f"{owner}: {name}: floats must lie in 0…1, got {low:.6g}…{high:.6g} ({describe(levels)}); {remedy}, "
        "or yield uint8"
    )


def unit_mask(mask: Tensor, pixels: Tensor, owner: str) -> Tensor:
    """A batch's mask, resized to the images.

    Args:
        mask: ``b 1 H' W'`` or ``b H' W'``, b that of the images or 1; bool, float 0…1 or uint8. White = 1 = repaint.
            A uint8 mask whose largest value is 1 is a 0/1 mask, as segmentation tools write them.
        pixels: ``b c H W``, the whole images, before any crop.
        owner: the class that an error names.

    Returns:
        ``b 1 H W`` or ``1 1 H W`` float32 in 0…1, resized bilinearly without antialias where its size differs.

    Raises:
        ValueError: naming what was found and what is right.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise UserError(f"{owner}: {MASK}: expected a tensor of shape b 1 H W or b H W, got {describe(mask)}")
    if mask.shape[0] not in (1, pixels.shape[0]):
        raise UserError(
            f"{owner}: {MASK}: got {mask.shape[0]} masks for {pixels.shape[0]} images ({describe(mask)}); "
            "give one an image, or one for all"
        )
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if mask.dtype == torch.uint8:
        white = torch.where(mask.amax(dim=(1, 2, 3), keepdim=True) > 1, 255.0, 1.0)
        mask = mask / white
    elif mask.dtype == torch.bool or mask.is_floating_point():
        if mask.is_floating_point() and (pixels.is_floating_point() or mask.device.type == "cpu"):
            check_range(mask, MASK, owner)  # elsewhere a look would make uint8 images wait for the device
        mask = mask.float()
    else:
        raise UserError(f"{owner}: {MASK}: expected bool, uint8 in 0…255 or float in 0…1, got {describe(mask)}")
    if mask.shape[-2:] != pixels.shape[-2:]:
        mask = F.interpolate(mask, size=pixels.shape[-2:], mode="bilinear")
    return mask


def crop(image: Tensor, multiple: int) -> Tensor:
    """The centred crop (a view) to the largest multiple that fits: offset ``(H mod multiple) // 2``."""
    height, width = image.shape[-2:]
    over, beside = height % multiple, width % multiple
    if not over and not beside:
        return image
    top, left = over // 2, beside // 2
    return image[..., top : top + height - over, left : left + width - beside]


def describe(value: object) -> str:
    """A value as an error names it: shape and dtype of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _listed(batch: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, batch)) or "nothing"


_BATCHES = (tuple, list, *MAPPINGS)
_LAYOUTS = {"CHW": "b c H W", "HWC": "b H W c"}
