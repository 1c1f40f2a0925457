"""Where masks come from: the batch's own, transparency, label maps, and mixtures and soft edges of other sources.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels. White, 1 and True mean repaint.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.batch import MASK, PIXELS, SEGMENTATION
from latentdm.draws import Draws
from latentdm.errors import UserError, attributed
from latentdm.stages import Stage
from latentdm.tensors import describe, unit_levels, unit_mask
from latentdm.validation import Check

MAX_FEATHER = 128
"""The widest soft edge, in pixels to either side."""


class MaskSource(Stage):
    """A stage that gives each image its mask, on the device, before the images are encoded.

    A source of your own implements `masks`, and names in ``reads`` what the batch must hold.

    Example:
        >>> class UpperHalf(MaskSource):
        ...     def masks(self, batch, draws):
        ...         mask = torch.zeros_like(batch["pixels"][:, :1], dtype=torch.bool)
        ...         mask[..., : mask.shape[-2] // 2, :] = True
        ...         return mask
    """

    reads: tuple[str, ...] = (PIXELS,)
    writes: tuple[str, ...] = (MASK,)

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The batch's ``mask``.

        Args:
            batch: under our names: ``pixels`` ``b c H W`` uint8 or float, and what else the source reads.
            draws: the random numbers of its samples.

        Returns:
            ``mask``, as `masks` gives it.

        Raises:
            UserError: the batch lacks what the source reads, or holds something else there.
        """
        self.check(batch)
        return {MASK: self.masks(batch, draws)}

    @abstractmethod
    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 H W`` bool, uint8 (0…255) or float32 (0…1) on the device of ``pixels``, for a checked batch."""

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise UserError unless the batch holds what the source reads."""
        for name in self.reads:
            if batch.get(name) is None:
                raise UserError(
                    f"{type(self).__name__}: the batch has no {name!r}; say where it lies with keys={{{name}: …}}, "
                    "or choose another source, such as masks=random"
                )


class BatchMask(MaskSource):
    """The mask that the batch brought, as it is: the encoder resizes it to the images."""

    reads = (MASK,)

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``batch["mask"]``, untouched."""
        mask: Tensor = batch[MASK]
        return mask


class AlphaMask(MaskSource):
    """The transparency of the images: what is transparent is repainted, 1 − alpha as ComfyUI's LoadImage gives it.

    Args:
        invert: repaint what is opaque instead.
    """

    def __init__(self, invert: bool = False) -> None:
        self.invert = invert

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1, from ``pixels`` ``b 4 H W``."""
        # Floats, because a uint8 mask that is nowhere above 1, as 255 − 254, reads as a mask of zeros and ones.
        alpha = unit_levels(batch[PIXELS][:, 3:])
        return alpha if self.invert else 1 - alpha

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise UserError where the images have no alpha channel."""
        super().check(batch)
        pixels = batch[PIXELS]
        if pixels.ndim != 4 or pixels.shape[1] != 4:
            raise UserError(
                f"AlphaMask: expected {PIXELS} of shape b 4 H W, got {describe(pixels)}; let the data keep its alpha "
                "channel (pixels.alpha=true), or choose another source: masks=random or masks=batch"
            )


class SegmentationMask(MaskSource):
    """The pixels of chosen classes of a label map: ``segmentation`` in the batch, an integer a pixel.

    Args:
        classes: the labels to repaint.
        invert: repaint all other labels instead.

    Raises:
        UserError: ``classes`` is empty or holds something else than integers.

    Example:
        >>> labels = torch.tensor([[[0, 3], [7, 3]]])
        >>> batch = {"pixels": torch.zeros(1, 3, 2, 2), "segmentation": labels}
        >>> SegmentationMask(classes=[3])(batch, Draws(seed=0, epoch=0, ids=[0]))["mask"]
        tensor([[[[False,  True],
                  [False,  True]]]])
    """

    reads = (PIXELS, SEGMENTATION)

    def __init__(self, classes: Sequence[int], invert: bool = False) -> None:
        if isinstance(classes, int | str) or not classes or any(type(label) is not int for label in classes):
            raise Check("SegmentationMask").fail(
                "classes", "a list of the integer labels to repaint", classes, "for one class: [15]"
            )
        self.classes = list(classes)
        self.invert = invert

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 h w`` bool in the size of the label map."""
        labels: Tensor = batch[SEGMENTATION]
        labels = labels.unsqueeze(1) if labels.ndim == 3 else labels
        # One comparison a class: a tensor of the classes would have to be copied to the device.
        mask = labels == self.classes[0]
        for label in self.classes[1:]:
            mask |= labels == label
        return ~mask if self.invert else mask

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise UserError where the batch has no label map of integers, one an image."""
        super().check(batch)
        labels, b = batch[SEGMENTATION], len(batch[PIXELS])
        shaped = isinstance(labels, Tensor) and (labels.ndim == 3 or (labels.ndim == 4 and labels.shape[1] == 1))
        if not shaped or labels.is_floating_point() or len(labels) != b:
            raise UserError(
                f"SegmentationMask: {SEGMENTATION}: expected integer labels of shape b H W or b 1 H W for {b} images, "
                f"got {describe(labels)}"
            )


class MixedMask(MaskSource):
    """Several mask sources with a probability each; every sample draws one by its own draw.

    Args:
        sources: name → source.
        probabilities: name → its weight, at least 0; they are divided by their sum. None: all alike.

    Raises:
        UserError: no sources, or weights that do not name them all or do not make probabilities; when called: a
            source lacks what it reads, whether or not a sample of this batch drew it.

    Example:
        >>> sources = {"own": BatchMask(), "random": RandomMask()}
        >>> MixedMask(sources, {"own": 0.75, "random": 0.25})  # doctest: +SKIP
    """

    def __init__(self, sources: Mapping[str, MaskSource], probabilities: Mapping[str, float] | None = None) -> None:
        check = Check("MixedMask")
        for name, source in sources.items():
            _check_source(check, f"sources.{name}", source)
        given = dict.fromkeys(sources, 1.0) if probabilities is None else probabilities
        if not sources or given.keys() != sources.keys():
            raise UserError(
                f"MixedMask: probabilities must name each source once; the sources are {', '.join(sources) or 'none'}, "
                f"the probabilities name {', '.join(given) or 'none'}"
            )
        weights = [check.number(f"probabilities.{name}", given[name], 0) for name in sources]
        if not 0 < sum(weights) < inf:
            raise check.fail("probabilities", "at least 0 and not all 0", dict(given))
        self.sources = dict(sources)
        self.probabilities = None if probabilities is None else dict(probabilities)
        self.reads = tuple(dict.fromkeys([PIXELS, *(name for source in sources.values() for name in source.reads)]))
        self.bounds = torch.tensor([bound / sum(weights) for bound in accumulate(weights)])

    def setup(self, device: torch.device | str) -> None:
        """Set each source up."""
        for source in self.sources.values():
            source.setup(device)

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1."""
        pixels: Tensor = batch[PIXELS]
        mask = batch.get(MASK)
        if mask is not None and len(mask) == 1:  # one for all
            batch = {**batch, MASK: mask.expand(len(pixels), *mask.shape[1:])}
        drawn = torch.bucketize(draws.uniform("mask source", 1)[:, 0], self.bounds[:-1], right=True)
        masks = pixels.new_empty(len(pixels), 1, *pixels.shape[-2:], dtype=torch.float32)
        for number, source in enumerate(self.sources.values()):
            rows = (drawn == number).nonzero().flatten()
            if len(rows) == 0:
                continue
            on_device = rows.to(pixels.device, non_blocking=True)
            some = {
                name: value.index_select(0, on_device) if isinstance(value, Tensor) and value.ndim else value
                for name, value in batch.items()
            }
            masks.index_copy_(0, on_device, _unit_masks(source, some, draws.of(rows.tolist())))
        return masks

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise UserError where any source of the mixture lacks what it reads."""
        for name, source in self.sources.items():
            try:
                source.check(batch)
            except UserError as error:
                raise UserError(f"MixedMask: sources.{name}: {error}") from None


class FeatheredMask(MaskSource):
    """The masks of another source with soft edges.

    The inpainting encoders of this package round a mask before they use it, as the nodes that they follow do: there a
    feathered mask is one with smoother corners. It is for encoders of your own, and for losses weighted by the mask.

    Args:
        source: where the masks come from.
        pixels: how far the edge reaches to either side, in 1…128. Its middle stays where it was: the mask is averaged
            twice over windows of about this width.

    Raises:
        UserError: ``pixels`` is out of range, or ``source`` is no mask source.
    """

    def __init__(self, source: MaskSource, pixels: int = 8) -> None:
        check = Check("FeatheredMask")
        self.pixels = check.integer("pixels", pixels, 1, MAX_FEATHER)
        _check_source(check, "source", source)
        self.source = source
        self.reads = tuple(dict.fromkeys([PIXELS, *source.reads]))

    def setup(self, device: torch.device | str) -> None:
        """Set the source up."""
        self.source.setup(device)

    def masks(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1."""
        mask = _unit_masks(self.source, batch, draws)
        for reach in (self.pixels // 2, self.pixels - self.pixels // 2):
            for window, pad in (((1, 2 * reach + 1), (reach, reach, 0, 0)), ((2 * reach + 1, 1), (0, 0, reach, reach))):
                # What lies outside the image counts as its nearest pixel: no edge is made at the border.
                mask = F.avg_pool2d(F.pad(mask, pad, mode="replicate"), window, stride=1)
        return mask.clamp_(0, 1)

    def check(self, batch: Mapping[str, Any]) -> None:
        """As the source."""
        self.source.check(batch)


def _check_source(check: Check, setting: str, source: object) -> None:
    if not isinstance(source, MaskSource):
        raise UserError(f"{check.owner}: {setting} must be a mask source, got {type(source).__name__}")


def _unit_masks(source: MaskSource, batch: Mapping[str, Any], draws: Draws) -> Tensor:
    """The masks of another source as ``b 1 H W`` float32 in 0…1."""
    with attributed(type(source).__name__):
        return unit_mask(source.masks(batch, draws), batch[PIXELS])
