"""What every mask source is, and the sources that read the batch: its masks, its transparency, its label maps.

Shapes: ``b`` batch, ``c`` channels, ``H W`` pixels. White, 1 and True mean repaint.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentdm.batch import MASK, PIXELS, SEGMENTATION, describe
from latentdm.draws import Draws
from latentdm.errors import UserError


class MaskSource(ABC):
    """Gives each image of a batch its mask; called on the device, before the images are encoded."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """The masks of a batch.

        Args:
            inputs: the batch under our names: ``pixels`` ``b c H W`` uint8 or float, perhaps ``mask``, ``segmentation``
                and ``index``.
            draws: the random numbers of its samples.

        Returns:
            ``b 1 H W`` bool, uint8 (0…255) or float32 (0…1) on the device of ``pixels``.

        Raises:
            ValueError: the batch lacks what the source reads.
        """

    def check(self, inputs: Mapping[str, Tensor]) -> None:  # noqa: B027  # most sources read nothing but pixels
        """Raise ValueError where the batch lacks what the source reads; a mixture asks this of every batch."""


class BatchMask(MaskSource):
    """The mask that the batch brought, as it is."""

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``inputs["mask"]``, untouched: the encoder resizes it to the images; ValueError where there is none."""
        self.check(inputs)
        return inputs[MASK]

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError where the batch has no mask."""
        if inputs.get(MASK) is None:
            raise UserError(
                f"BatchMask: the batch has no {MASK!r}; say where it lies with keys={{{MASK}: …}}, "
                "or choose another source: masks=random or masks=alpha"
            )


class AlphaMask(MaskSource):
    """The transparency of the images: what is transparent is repainted, 1 − alpha as ComfyUI's LoadImage gives it.

    Args:
        invert: repaint what is opaque instead.
    """

    def __init__(self, invert: bool = False) -> None:
        self.invert = invert

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1, from ``pixels`` ``b 4 H W``; ValueError where they have no alpha channel."""
        self.check(inputs)
        alpha = inputs[PIXELS][:, 3:]
        # Floats, because a uint8 mask that is nowhere above 1, as 255 − 254, reads as a mask of zeros and ones.
        alpha = alpha.float() / 255 if alpha.dtype == torch.uint8 else alpha.float()
        return alpha if self.invert else 1 - alpha

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError where the images have no alpha channel."""
        pixels = inputs[PIXELS]
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
        ValueError: ``classes`` is empty or holds something else than integers.

    Example:
        >>> labels = torch.tensor([[[0, 3], [7, 3]]])
        >>> batch = {"pixels": torch.zeros(1, 3, 2, 2), "segmentation": labels}
        >>> SegmentationMask(classes=[3])(batch, Draws(seed=0, epoch=0, ids=[0]))
        tensor([[[[False,  True],
                  [False,  True]]]])
    """

    def __init__(self, classes: Sequence[int], invert: bool = False) -> None:
        if isinstance(classes, int | str) or not classes or any(type(label) is not int for label in classes):
            raise UserError(
                f"SegmentationMask: classes must be a list of the integer labels to repaint, got {classes!r}; "
                "for one class: [15]"
            )
        self.classes = list(classes)
        self.invert = invert

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 h w`` bool in the size of the label map; ValueError where there is none."""
        self.check(inputs)
        labels = inputs[SEGMENTATION]
        labels = labels.unsqueeze(1) if labels.ndim == 3 else labels
        # One comparison a class: a tensor of the classes would have to be copied to the device.
        mask = labels == self.classes[0]
        for label in self.classes[1:]:
            mask |= labels == label
        return ~mask if self.invert else mask

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError where the batch has no label map of integers, one an image."""
        labels = inputs.get(SEGMENTATION)
        if labels is None:
            raise UserError(
                f"SegmentationMask: the batch has no {SEGMENTATION!r}; say where its label map lies with "
                f"keys={{{SEGMENTATION}: …}}, or choose another source: masks=random or masks=batch"
            )
        shaped = isinstance(labels, Tensor) and (labels.ndim == 3 or (labels.ndim == 4 and labels.shape[1] == 1))
        if not shaped or labels.is_floating_point() or len(labels) != len(inputs[PIXELS]):
            raise UserError(
                f"SegmentationMask: {SEGMENTATION}: expected integer labels of shape b H W or b 1 H W for "
                f"{len(inputs[PIXELS])} images, got {describe(labels)}"
            )
