"""Whole pictures read as the data modules read them in parts."""

import numpy as np
import torch

from latentdm.data.decode import decode, image_to_tensor
from latentdm.data.levels import mask_image, resized


def read_image(file, **settings):
    """As `decode`, and gray as three equal channels, as `ResizeCrop` has it."""
    image, size = decode(file, **settings)
    colours = {"L": "RGB", "LA": "RGBA"}
    return (image.convert(colours[image.mode]) if image.mode in colours else image), size


def read_mask(file):
    """``1 H W`` uint8, 255 = repaint."""
    return image_to_tensor(mask_image(file))


def resize_mask(mask, height, width):
    """``1 H W`` uint8 → ``1 height width``."""
    levels = mask[0].numpy()
    pick = resized(lambda rows, columns: levels[np.ix_(rows, columns)], levels.shape[::-1], (width, height))
    return torch.from_numpy(pick(np.arange(height), np.arange(width)))[None]
