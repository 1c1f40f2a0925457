"""Growing and shrinking binary masks at a cost that hardly depends on the radius.

Shapes: ``b 1 h w``. One axis at a time, a window is composed of two of half its width (the logarithmic decomposition of
van den Boomgaard and van Balen, 1992), on bytes: log2(k) passes over one byte a pixel instead of the k×k convolution
of the original nodes, whose cost grows with k². The results are equal bit for bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.validation import Check

MAX_GROW = 64
"""The largest ``grow_mask_by``, in pixels."""

MAX_OFFSET = 128
"""The largest ``mask_offset``, in pixels to either side."""


def check_grow_mask_by(grow_mask_by: int, owner: str = "grow_mask") -> None:
    """Raise UserError unless ``grow_mask_by`` is an integer in 0…64."""
    hint = "to shrink a mask, or to grow it further, use mask_offset"
    Check(owner).integer("grow_mask_by", grow_mask_by, 0, MAX_GROW, hint)


def check_mask_offset(mask_offset: int, owner: str = "offset_mask") -> None:
    """Raise UserError unless ``mask_offset`` is an integer in −128…128."""
    hint = "positive grows the mask, negative shrinks it"
    Check(owner).integer("mask_offset", mask_offset, -MAX_OFFSET, MAX_OFFSET, hint)


def grow_mask(mask: Tensor, grow_mask_by: int) -> Tensor:
    """Round a mask and grow it as ComfyUI's ``VAEEncodeForInpaint`` does.

    A pixel is 1 if any pixel of the rounded mask lies in a k×k window, k = ``grow_mask_by``. An even window reaches
    k/2 back (up and left) and k/2 − 1 forward.

    Args:
        mask: ``b 1 h w`` in 0…1, any float dtype or bool; exactly 0.5 rounds to 0.
        grow_mask_by: k in 0…64; 0 and 1 only round.

    Returns:
        ``b 1 h w``, 0 or 1, float32 for a bool mask and the mask's dtype otherwise.

    Raises:
        UserError: ``grow_mask_by`` is out of range.

    Example:
        >>> grow_mask(torch.tensor([[[[0.0, 0.0, 1.0, 0.0, 0.0]]]]), 2)
        tensor([[[[0., 0., 1., 1., 0.]]]])
    """
    check_grow_mask_by(grow_mask_by)
    binary = round_mask(mask)
    if grow_mask_by <= 1:
        return binary
    return _dilate(binary, back=grow_mask_by // 2, forward=(grow_mask_by - 1) // 2)


def offset_mask(mask: Tensor, mask_offset: int) -> Tensor:
    """Round a mask and move its edge by ``mask_offset`` pixels, as the ``WAS_VAEEncodeForInpaint`` node does.

    Args:
        mask: ``b 1 h w`` in 0…1, any float dtype or bool; exactly 0.5 rounds to 0.
        mask_offset: d in −128…128. Positive grows by d on every side (window 2d + 1); negative shrinks by |d|, where
            what lies outside the image counts as masked, so that the image's border does not erode the mask.

    Returns:
        ``b 1 h w``, 0 or 1, float32 for a bool mask and the mask's dtype otherwise.

    Raises:
        UserError: ``mask_offset`` is out of range.

    Example:
        >>> offset_mask(torch.tensor([[[[0.0, 1.0, 1.0, 1.0, 1.0]]]]), -1)
        tensor([[[[0., 0., 1., 1., 1.]]]])
    """
    check_mask_offset(mask_offset)
    binary = round_mask(mask)
    if mask_offset > 0:
        return _dilate(binary, back=mask_offset, forward=mask_offset)
    if mask_offset < 0:
        # A pixel stays if no unmasked pixel is near: grow the complement. Outside the image nothing is unmasked.
        return 1 - _dilate(1 - binary, back=-mask_offset, forward=-mask_offset)
    return binary


def round_mask(mask: Tensor) -> Tensor:
    """0 or 1; exactly 0.5 gives 0, as ``torch.round`` does. Bool becomes float32."""
    return mask.float() if mask.dtype == torch.bool else mask.round()


def _dilate(binary: Tensor, back: int, forward: int) -> Tensor:
    """1 where any 1 lies at most ``back`` pixels up and left, or ``forward`` pixels down and right."""
    seen = F.pad(binary.to(torch.uint8), (back, forward, back, forward))
    return _any_in_window(_any_in_window(seen, -1, back + forward + 1), -2, back + forward + 1).to(binary.dtype)


def _any_in_window(seen: Tensor, dim: int, window: int) -> Tensor:
    """The OR of each ``window`` neighbours along one axis, which gets ``window − 1`` shorter."""
    width = 1
    while width < window:
        step = min(width, window - width)  # two windows of `width` that overlap or touch make one of `width + step`
        kept = seen.shape[dim] - step
        seen = seen.narrow(dim, 0, kept) | seen.narrow(dim, step, kept)
        width += step
    return seen
