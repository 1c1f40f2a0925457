"""`SamplePreview`: what the model makes of validation images, before and after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from latentdm.batch import LATENTS, Key, rebuild
from latentdm.callbacks.base import EncodeCallback
from latentdm.callbacks.images import folder_of, publish
from latentdm.errors import UserError
from latentdm.preview import before_and_after, captions_of


class SamplePreview(EncodeCallback):
    """Lets the model sample the first validation batch, at every validation, and draws before and after.

    One row a sample: the image, the masked image, what the model sampled, and that in the place of the masked part.
    The model's ``predict_step`` is called with the first samples of the batch, as it came from the data module, and
    returns latents. The picture is written as ``step_000500.png`` and sent to the trainer's loggers as
    `LatentPreview`'s is. Every rank samples, for a sharded model needs them all; rank 0 draws. Training goes on with
    the random numbers that it would have drawn.

    Args:
        samples: rows, the first ones of the batch.
        caption: as for `LatentPreview`.
        dirpath: folder of the pictures; None is ``samples`` in the trainer's log folder.

    Raises:
        ValueError: a value out of range; in ``setup``, the model has no ``predict_step`` or the autoencoder no
            decoder; in validation, ``predict_step`` returns no latents.

    Example:
        >>> Trainer(callbacks=[SamplePreview()]).validate(model, datamodule=dm)  # doctest: +SKIP

    Attributes:
        latest: the last picture's file, on rank 0.
    """

    def __init__(self, samples: int = 4, caption: Key | None = None, dirpath: str | Path | None = None) -> None:
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise UserError(f"SamplePreview: samples must be an integer of at least 1, got {samples!r}")
        self.samples = samples
        self.caption = caption
        self.dirpath = dirpath
        self.latest: Path | None = None
        self._folder = Path()
        self._encoded: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
        self._waits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model and the autoencoder, and settle where the pictures go."""
        super().setup(trainer, pl_module, stage)
        if not is_overridden("predict_step", pl_module, LightningModule):
            raise UserError(
                f"SamplePreview: {type(pl_module).__name__} has no predict_step; let it sample latents for a batch, or "
                "remove the callback"
            )
        if not trainer.datamodule.encoder.vae.can_decode:  # type: ignore[attr-defined]
            raise UserError("SamplePreview: the autoencoder has no decoder; keep it: encoder_only=false")
        self._folder = folder_of(trainer, self.dirpath, "samples")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch."""
        self._waits = True

    def on_encode_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Tensor],
        batch: Any,
    ) -> None:
        """Keep the first batch until it was validated."""
        if self._waits and trainer.validating:
            self._waits, self._encoded = False, (inputs, outputs)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sample and draw.

        Raises:
            ValueError: ``predict_step`` returned something else than latents.
        """
        if self._encoded is None:
            return
        (inputs, encoded), self._encoded = self._encoded, None
        b = len(encoded[LATENTS])
        n = min(self.samples, b)
        with isolate_rng(), trainer.precision_plugin.predict_step_context():
            sampled = pl_module.predict_step(_first(batch, n, b), batch_idx)
        expected = (n, *encoded[LATENTS].shape[1:])
        if not isinstance(sampled, Tensor) or tuple(sampled.shape) != expected:
            got = tuple(sampled.shape) if isinstance(sampled, Tensor) else type(sampled).__name__
            raise UserError(
                f"SamplePreview: {type(pl_module).__name__}.predict_step must return latents of shape {expected}, "
                f"got {got}"
            )
        if not trainer.is_global_zero:
            return
        try:
            captions = captions_of(batch, self.caption)
            picture = before_and_after(trainer.datamodule.encoder, inputs, encoded, sampled, captions)  # type: ignore[attr-defined]
        except torch.OutOfMemoryError:
            rank_zero_warn("SamplePreview: no memory to decode a sample; this picture is skipped")
            return
        self.latest = publish(picture, self._folder, "samples", trainer)


def _first(batch: Any, n: int, b: int) -> Any:
    """The first ``n`` of ``b`` samples, of everything in a batch that has one value a sample."""
    places = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    cut = {
        place: value[:n]
        for place, value in places
        if isinstance(value, Tensor | list | tuple)
        and not (isinstance(value, Tensor) and not value.ndim)
        and len(value) == b
    }
    return rebuild(batch, cut)
