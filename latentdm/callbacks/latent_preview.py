"""`LatentPreview`: what the model sees, as a picture, while it trains."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from latentdm.batch import Key
from latentdm.callbacks.base import Inputs, Outputs
from latentdm.callbacks.pictures import PictureCallback
from latentdm.preview import captions_of, preview
from latentdm.validation import Check


class LatentPreview(PictureCallback):
    """Draws a training batch at the start and every few steps: images, masks, and latents decoded again.

    The picture is written as ``step_000500.png`` and sent to the trainer's loggers: TensorBoard, and each that has a
    ``log_image`` as W&B's. Others are passed over. Only rank 0 draws. Samples are decoded one at a time. Where even
    that does not fit in memory, or the disk is full, the picture is left out with a warning. An autoencoder without its
    decoder (``encoder_only``) has no decoded columns.

    Args:
        every_n_steps: optimizer steps from one picture to the next.
        samples: rows, the first ones of the batch.
        caption: where the batch has the titles of the rows, a key or the position in a tuple; None looks at ``name``,
            ``caption``, ``captions``, ``text`` and ``prompt``.
        dirpath: folder of the pictures; None is ``previews`` in the trainer's log folder.

    Raises:
        UserError: a value out of range.

    Example:
        >>> Trainer(callbacks=[LatentPreview(every_n_steps=500)]).fit(model, datamodule=dm)  # doctest: +SKIP
    """

    key, subfolder = "preview", "previews"

    def __init__(
        self,
        every_n_steps: int = 500,
        samples: int = 4,
        caption: Key | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__(samples, caption, dirpath)
        self.every_n_steps = Check("LatentPreview").integer("every_n_steps", every_n_steps, 1)
        self._drawn: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder of the pictures, and forget earlier runs."""
        super().setup(trainer, pl_module, stage)
        self._drawn = None

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        """Draw the batch in a step that is one of ``every_n_steps``."""
        step = trainer.global_step
        if not trainer.is_global_zero or not trainer.training or step == self._drawn:
            return
        if self._drawn is not None and step % self.every_n_steps:
            return
        self._drawn = step
        encoder, captions = self.encoder_of(trainer), captions_of(batch, self.caption)
        self.publish(lambda: preview(encoder, inputs, outputs, captions, self.samples), trainer)
