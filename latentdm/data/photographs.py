"""The photographs inside scikit-image, cut into a training and a validation part.

They need no download, so that the default example, the demo VAE and the tests run offline on real images.
"""

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from latentdm.extras import require

NAMES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "stereo_motorcycle",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
)
"""scikit-image's own colour photographs, by the name of the function in ``skimage.data`` that loads each."""

VALIDATION_SHARE = 1 / 3
"""The right third of every photograph is never trained on."""


@cache
def photographs(split: Literal["train", "val"]) -> dict[str, npt.NDArray[np.uint8]]:
    """The training or the validation part of each photograph.

    Args:
        split: ``"train"`` gives the left two thirds of each photograph, ``"val"`` the right third; they share no pixel.

    Returns:
        Name → ``H W 3`` uint8, in the order of `NAMES`. Sides lie between 150 and 1411 pixels.

    Raises:
        ImportError: scikit-image is missing; the message names the extra.
    """
    data = require("skimage.data", extra="samples", needed_by="the sample photographs")
    parts = {}
    for name in NAMES:
        image = getattr(data, name)()
        if isinstance(image, tuple):  # the stereo pair gives (left, right, disparity); the right one repeats the left
            image = image[0]
        cut = round(image.shape[1] * (1 - VALIDATION_SHARE))
        parts[name] = image[:, :cut] if split == "train" else image[:, cut:]
    return parts
