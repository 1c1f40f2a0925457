"""`preview_data`: what ``latentdm preview`` draws, for a data module that was made in a notebook."""

import torch
from PIL import Image

from latentdm.datamodule import LatentDataModule
from latentdm.preview.batch import describe, preview
from latentdm.preview.samples import first_samples
from latentdm.validation import Check


def preview_data(
    datamodule: LatentDataModule, samples: int = 4, device: torch.device | str | None = None, stage: str = "train"
) -> Image.Image:
    """Draw what a model would see of the data, and below it what to check. Nothing is written.

    A notebook shows the picture if the call is the last line of its cell. The data module can be trained on afterwards.

    Args:
        datamodule: as it goes to ``Trainer.fit``; it is set up here.
        samples: rows of the picture, at least 1.
        device: where to encode; None takes CUDA's first, or the CPU without one.
        stage: ``"train"`` or ``"val"``: whose data.

    Returns:
        An RGB picture, a row a sample.

    Raises:
        UserError: a value out of range, or there is no batch.

    Example:
        >>> preview_data(datamodule, samples=2).save("preview.png")  # doctest: +SKIP
    """
    check = Check("preview_data")
    check.integer("samples", samples, 1)
    check.choice("stage", stage, ("train", "val"))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs, outputs, captions = first_samples(datamodule, samples, place, stage)
    notes = describe(datamodule.encoder, inputs, outputs)
    return preview(datamodule.encoder, inputs, outputs, captions, samples, notes)
