"""A UNet that learns to see more: new input channels with weights of zero."""

from typing import Any

import torch
from torch import nn


def widen_input(unet: Any, channels: int) -> None:
    """Widen the first convolution of a diffusers UNet to ``channels``; its config follows.

    The new weights are zero, so that what the UNet computes stays what it was until they are trained.
    """
    old: nn.Conv2d = unet.conv_in
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # two numbers, as Conv2d makes of any
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)
