"""From a batch of pixels to a batch of latents: `PlainEncoder` and `InpaintEncoder`."""

from latentdm.encoders.base import Encoder
from latentdm.encoders.inpaint import InpaintEncoder
from latentdm.encoders.plain import PlainEncoder

__all__ = ["Encoder", "InpaintEncoder", "PlainEncoder"]
