"""The names of a batch, and how a user's batch is read and written.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels as they come, ``h w`` pixels after the crop to the VAE's multiple.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from latentdm.containers import MAPPINGS, fields_of, is_batch, items_of, rebuild
from latentdm.errors import UserError, attributed
from latentdm.tensors import check_range, describe, how_to_convert, is_image
from latentdm.validation import Check

PIXELS = "pixels"
MASK = "mask"
SOURCE = "source"
INDEX = "index"
EPOCH = "_epoch"  # of our own loaders: the epoch that ordered the samples travels with them as far as the encoder
SEGMENTATION = "segmentation"
CAPTION = "caption"
LATENTS = "latents"
MASKED_LATENTS = "masked_latents"
SOURCE_LATENTS = "source_latents"
NOISE_MASK = "noise_mask"
LATENT_MASK = "latent_mask"
PROMPT_EMBEDS = "prompt_embeds"
POOLED_PROMPT_EMBEDS = "pooled_prompt_embeds"
ORIGINAL_SIZE = "original_size"
CROP_TOP_LEFT = "crop_top_left"
TARGET_SIZE = "target_size"

OUTPUTS = (
    LATENTS,
    MASKED_LATENTS,
    SOURCE_LATENTS,
    NOISE_MASK,
    LATENT_MASK,
    PROMPT_EMBEDS,
    POOLED_PROMPT_EMBEDS,
)
NAMES = (
    *(PIXELS, MASK, SOURCE, INDEX, SEGMENTATION, CAPTION, ORIGINAL_SIZE, CROP_TOP_LEFT, TARGET_SIZE),
    *OUTPUTS,
)
"""The names that a batch may hold whatever stages there are; see the table in README."""

Key = str | int

Path = tuple[Any, ...]
"""Keys that lead to a part of a batch; empty for the batch itself."""


class BatchKeys:
    """Finds our names in a user's batch and puts the results where the user wants them.

    Args:
        keys: our name → the user's: a key of a dict batch, or a position in a tuple or list batch, for inputs and
            outputs alike. Names left out keep ours; in a tuple batch ``pixels`` must be given a position. None keeps
            an output out of the batch. A dataclass or a named tuple is like a dict of its fields.
        layout: ``"CHW"``, or ``"HWC"`` for channels-last images.
        pixel_range: of float images, black and white: ``(0, 1)`` or ``(-1, 1)``.
        names: what the stages read and write, beside `NAMES`.

    Raises:
        UserError: an unknown name, layout or range, or a mix of keys and positions.
    """

    def __init__(
        self,
        keys: Mapping[str, Key | None] | None = None,
        layout: str = "CHW",
        pixel_range: Sequence[float] = (0, 1),
        names: Collection[str] = (),
    ) -> None:
        given = dict(keys or {})
        self.keys: dict[str, Key] = {name: key for name, key in given.items() if key is not None}
        self.left_out = given.keys() - self.keys.keys()
        unknown = [name for name in given if name not in NAMES and name not in names]
        if unknown:
            known = ", ".join(dict.fromkeys((*NAMES, *sorted(names))))
            raise UserError(f"LatentDataModule: keys: unknown name {unknown[0]!r}; the names are {known}")
        if inputs := self.left_out & (set(NAMES) - set(OUTPUTS)):
            raise UserError(
                f"LatentDataModule: keys: {min(inputs)!r} goes into a stage; only outputs can be left out (null)"
            )
        if any(isinstance(key, int) and key < 0 for key in self.keys.values()):
            raise UserError(f"LatentDataModule: keys: {self.keys} has a negative position; count from 0, at the front")
        if len({isinstance(key, int) for key in self.keys.values()}) > 1:
            raise UserError(
                f"LatentDataModule: keys: {self.keys} mixes keys and positions; "
                "use strings for dict batches, or integers for tuples"
            )
        self.layout = Check("LatentDataModule").choice("layout", layout, _LAYOUTS)
        if tuple(pixel_range) not in ((0, 1), (-1, 1)):
            raise Check("LatentDataModule").fail("pixel_range", "[0, 1] or [-1, 1]", list(pixel_range))
        self.signed = tuple(pixel_range) == (-1, 1)
        self._pixels = self.key(PIXELS)
        self._ours = {key: name for name, key in self.keys.items() if name not in OUTPUTS}
        self._by_position = any(isinstance(key, int) for key in self.keys.values())

    def each(self, batch: Any, change: Callable[[Any, Path], Any], path: Path = ()) -> Any:
        """A batch with each of its parts changed, as Lightning joins the batches of several loaders.

        Args:
            batch: as a loader yields it.
            change: ``(part, path)`` → what is put in its place. A batch without parts is its own part.
            path: where ``batch`` itself lies.

        Returns:
            A batch of the same kind; what lies beside the parts stays as it is.
        """
        if type(batch) is dict and isinstance(batch.get(self._pixels), Tensor):  # nearly all of them
            return change(batch, path)
        parts = self._parts(batch) if is_batch(batch) else {}
        if not parts:
            return change(batch, path)
        return rebuild(batch, {key: self.each(part, change, (*path, key)) for key, part in parts.items()})

    def _parts(self, batch: Any) -> dict[Any, Any]:
        """The items that hold images, where the batch itself has none."""
        own = self.find(batch).get(PIXELS)
        if own is not None and not is_batch(own):
            return {}
        items = [(key, item) for key, item in items_of(batch) if item is not None]
        parts = {key: item for key, item in items if self._holds_images(item)}
        if own is not None and self._named(batch) is None and len(parts) < len(items):
            return {}  # a list of images in the place of the pixels, which looks like a tuple of a loader by itself
        return parts

    def _holds_images(self, item: Any) -> bool:
        if not is_batch(item):
            return False
        own = self.find(item).get(PIXELS)
        if isinstance(own, Tensor):
            return own.ndim in (4, 5)
        return any(self._holds_images(inner) for _, inner in items_of(item))

    def may_be_images(self, tensor: Tensor, multiple: int) -> bool:
        """Whether a tensor has the shape of images or clips of at least ``multiple`` pixels a side."""
        sizes = tensor.shape[1:-1] if self.layout == "HWC" else tensor.shape[2:]
        channels = tensor.shape[-1 if self.layout == "HWC" else 1] if tensor.ndim in (4, 5) else 0
        return channels in (1, 3, 4) and min(sizes[-2:]) >= multiple

    def _named(self, batch: Any) -> Mapping[Any, Any] | None:
        """The batch as a dict; None for one whose items have positions alone."""
        if isinstance(batch, MAPPINGS):
            return batch
        return None if self._by_position and isinstance(batch, tuple) else fields_of(batch)

    def find(self, batch: Any) -> dict[str, Any]:
        """What the batch holds, under our names: of a dict all of it, of a tuple what has a name."""
        named = self._named(batch)
        if named is not None:
            if not self._ours:
                return dict(named)
            found = {key: value for key, value in named.items() if key not in self._ours and key not in self.keys}
            return found | {name: named[key] for key, name in self._ours.items() if key in named}
        return {name: batch[key] for key, name in self._ours.items() if isinstance(key, int) and key < len(batch)}

    def read(self, batch: Any) -> dict[str, Any]:
        """As `find`, images channels first and float ones in 0…1.

        Raises:
            UserError: the batch has no pixels, or they are no tensor of four or five dimensions, or not of their range.
        """
        found = self.find(batch) if is_batch(batch) else {}
        if PIXELS not in found:
            single = not is_batch(batch) or all(is_image(image) for _, image in items_of(batch))
            advice = how_to_convert(batch, self.layout) if single else ""
            if advice or not is_batch(batch):
                raise UserError(
                    f"LatentDataModule: the batch: expected a dict, as in {{'pixels': images}}, got {describe(batch)}"
                    f"{advice}"
                )
            raise UserError(self.missing(batch, PIXELS))
        pixels = found[PIXELS]
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            raise UserError(
                f"LatentDataModule: batch[{self.key(PIXELS)!r}]: expected a tensor of shape {_LAYOUTS[self.layout]}, "
                f"got {describe(pixels)}{how_to_convert(pixels, self.layout)}"
            )
        if self.layout == "HWC":
            for name in (PIXELS, SOURCE, MASK):
                image = found.get(name)
                if isinstance(image, Tensor) and image.ndim > 3 and (name != MASK or image.shape[-1] == 1):
                    found[name] = image.movedim(-1, 1)
        if self.signed:
            for name in (PIXELS, SOURCE):
                image = found.get(name)
                if isinstance(image, Tensor) and image.is_floating_point():
                    with attributed("LatentDataModule"):
                        check_range(image, name, low=-1)
                    found[name] = image.float().add(1).div_(2)
        return found

    def replace(self, batch: Any, values: Mapping[str, Any]) -> Any:
        """A batch of the same kind with some of our inputs replaced, each under its own key."""
        return rebuild(batch, {self.key(name): value for name, value in values.items()})

    def write(self, batch: Any, results: Mapping[str, Tensor], drop: Sequence[str]) -> Any:
        """The user's batch with our results in it; everything else stays untouched, in its order.

        Args:
            batch: the user's batch.
            results: our name → tensor.
            drop: our inputs that do not stay (unless a result takes their place).

        Raises:
            ValueError: a result would overwrite something of the user's, or a tuple has no place for it.
        """
        leaving: set[Key] = {self.key(name) for name in drop} if self.keys else set(drop)
        placed: dict[Key, Any] = {}
        for name, value in results.items():
            if name in self.left_out:
                continue
            key = self.keys.get(name, name)
            self._check_place(name, key, batch, leaving, placed)
            placed[key] = value
        if self._named(batch) is not None:
            return rebuild(batch, placed, leaving)
        position = self.keys[PIXELS]
        if PIXELS in drop and position not in placed:
            raise UserError(
                f"LatentDataModule: keys: the pixels leave position {position} of the tuple and nothing fills it; "
                f"send an output there, as in keys={{pixels: {position}, latents: {position}}}, or set keep_pixels"
            )
        return rebuild(batch, placed)

    def missing(self, batch: Any, name: str, reader: str | None = None) -> str:
        """What to tell a user whose batch lacks what a stage reads; ``reader`` is that stage."""
        key, named = self.key(name), self._named(batch)
        if named is not None:
            held, example = f"only {', '.join(map(repr, named)) or 'nothing'}", _USUAL.get(name, "…")
        else:
            held, example = f"being a {type(batch).__name__} of {len(batch)}", "0" if name == PIXELS else "1"
        reads = f" ({reader} reads it)" if reader else ""
        what = "images" if name == PIXELS else f"{name}s" if name in _ELSE else name
        hint = f"name the {what} with keys, as in keys={{{name}: {example}}}{_ELSE.get(name, '')}"
        if name == PIXELS and named is None:
            if isinstance(key, int):
                return f"LatentDataModule: the batch has no position {key} for the pixels, {held}; count from 0{reads}"
            hint = f"{hint[:-1]}, latents: 0}}"
        return f"LatentDataModule: the batch has no {key!r}, {held}; {hint}{reads}"

    def key(self, name: str) -> Key:
        """The user's key of our name."""
        return self.keys.get(name, name)

    def _check_place(self, name: str, key: Key, batch: Any, leaving: set[Key], placed: Mapping[Key, Any]) -> None:
        if key in placed:
            raise UserError(
                f"LatentDataModule: keys: {name!r} and another result both go to {key!r}; give each a place of its own"
            )
        named = self._named(batch)
        if named is not None:
            # A field that waits for the result is there, and empty.
            if named.get(key) is not None and key not in leaving and name in OUTPUTS:
                raise UserError(
                    f"LatentDataModule: the batch already has {key!r} ({describe(named[key])}), which the encoder's "
                    f"{name!r} would overwrite; rename one, as in keys={{{name}: my_{name}}}"
                )
        elif not isinstance(key, int):
            raise UserError(
                f"LatentDataModule: keys: the encoder's {name!r} has no position in a {type(batch).__name__} batch of "
                f"{len(batch)}; give it one, as in keys={{…, {name}: {len(batch)}}}, or leave it out with null"
            )
        elif key < len(batch) and key not in leaving and name in OUTPUTS:
            raise UserError(
                f"LatentDataModule: keys: position {key} already holds {describe(batch[key])}, which {name!r} would "
                f"overwrite; use {len(batch)} or more to append it"
            )


def sample_ids(index: object, count: int) -> list[int | str]:
    """The ids that a batch's ``index`` gives its samples: what randomness is keyed on.

    Args:
        index: ``b`` integers, as a tensor or a list; strings serve as well.
        count: how many images there are.

    Raises:
        UserError: it holds something else, or not one an image.
    """
    ids = index.flatten().tolist() if isinstance(index, Tensor) else index
    if not isinstance(ids, (list, tuple)) or not (_plain(ids) or all(map(_is_id, ids))):
        raise UserError(
            f"{INDEX}: expected one integer an image, got {describe(index)}; name another key with keys={{index: …}}"
        )
    if len(ids) != count:
        raise UserError(f"{INDEX}: got {len(ids)} for {count} images ({describe(index)}); give one an image")
    return list(ids)


def _plain(ids: Sequence[object]) -> bool:
    """What nearly all batches hold, seen at a glance."""
    return set(map(type, ids)) == {int}


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


_LAYOUTS = {"CHW": "b c H W", "HWC": "b H W c"}
_USUAL = {PIXELS: "image", MASK: "masks", CAPTION: "text"}
_ELSE = {
    MASK: ", give each image a mask (name-mask.png beside name.png, a column), or choose a source (masks=random, "
    "masks=alpha)",
    CAPTION: ", give each image a text (name.txt beside name.png, a column), or leave out what reads them "
    "(captions=null, text=null)",
}
