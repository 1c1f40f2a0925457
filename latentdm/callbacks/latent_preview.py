"""`LatentPreview`: what the model sees, as a picture, while it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentdm.batch import Key
from latentdm.callbacks.base import EncodeCallback
from latentdm.callbacks.images import folder_of, publish
from latentdm.errors import UserError
from latentdm.preview import captions_of, preview


class LatentPreview(EncodeCallback):
    """Draws a training batch at the start and every few steps: images, masks, and latents decoded again.

    The picture is written as ``step_000500.png`` and sent to the trainer's loggers: TensorBoard, and each that has a
    ``log_image`` as W&B's. Others are passed over. Only rank 0 draws. Samples are decoded one at a time; where even
    that does not fit in memory, the picture is skipped with a warning. An autoencoder without its decoder
    (``encoder_only``) has no decoded columns.

    Args:
        every_n_steps: optimizer steps from one picture to the next.
        samples: rows, the first ones of the batch.
        caption: where the batch has its captions, a key or the position in a tuple; None looks at ``caption``,
            ``captions``, ``text``, ``prompt`` and ``name``.
        dirpath: folder of the pictures; None is ``previews`` in the trainer's log folder.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> Trainer(callbacks=[LatentPreview(every_n_steps=500)]).fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        samples: int = 4,
        caption: Key | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("samples", samples)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"LatentPreview: {name} must be an integer of at least 1, got {value!r}")
        self.every_n_steps = every_n_steps
        self.samples = samples
        self.caption = caption
        self.dirpath = dirpath
        self._folder = Path()
        self._drawn: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle where the pictures go."""
        super().setup(trainer, pl_module, stage)
        self._folder = folder_of(trainer, self.dirpath, "previews")
        self._drawn = None

    def on_encode_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Tensor],
        batch: Any,
    ) -> None:
        """Draw this batch if its step's turn has come."""
        step = trainer.global_step
        if not trainer.is_global_zero or not trainer.training or step == self._drawn:
            return
        if self._drawn is not None and step % self.every_n_steps:
            return
        self._drawn = step
        captions = captions_of(batch, self.caption)
        try:
            picture = preview(trainer.datamodule.encoder, inputs, outputs, captions, self.samples)  # type: ignore[attr-defined]
        except torch.OutOfMemoryError:
            rank_zero_warn(f"LatentPreview: no memory to decode a sample at step {step}; this picture is skipped")
            return
        publish(picture, self._folder, "preview", trainer)
