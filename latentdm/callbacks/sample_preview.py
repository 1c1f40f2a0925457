"""`SamplePreview`: what the model makes of validation images, before and after."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from latentdm.batch import LATENTS, Key
from latentdm.callbacks.base import Inputs, Outputs
from latentdm.callbacks.pictures import PictureCallback
from latentdm.containers import items_of, rebuild
from latentdm.errors import UserError
from latentdm.preview import before_and_after, captions_of
from latentdm.tensors import describe

TOLERANCE = 0.01
"""How far beyond 0…1 pixels may lie: resizing and half precision overshoot by less than two 8-bit levels."""


class SamplePreview(PictureCallback):
    """Lets the model sample the first validation batch, at every validation, and draws before and after.

    One row a sample: the image, the masked image, what the model sampled, and the image with its masked part from the
    sample. The model's ``predict_step`` is called with the first samples of the batch, as it came from the data module,
    and returns latents ``b z h/r w/r``, or pixels ``b 3 h w`` float in 0…1, as a model that samples through a diffusers
    pipeline has them. The picture is written as ``step_000500.png`` and sent to the trainer's loggers as
    `LatentPreview`'s is. Every rank samples, for a sharded model needs them all; rank 0 draws. Training goes on with
    the random numbers that it would have drawn.

    Args:
        samples: rows, the first ones of the batch.
        caption: as for `LatentPreview`.
        dirpath: folder of the pictures; None is ``samples`` in the trainer's log folder.

    Raises:
        UserError: a value out of range; in ``setup``, the model has no ``predict_step``; in validation,
            ``predict_step`` returns neither latents nor pixels, or latents where the autoencoder has no decoder.

    Example:
        >>> Trainer(callbacks=[SamplePreview()]).validate(model, datamodule=dm)  # doctest: +SKIP

    Attributes:
        latest: the last picture's file, on rank 0.
    """

    key = subfolder = "samples"

    def __init__(self, samples: int = 4, caption: Key | None = None, dirpath: str | Path | None = None) -> None:
        super().__init__(samples, caption, dirpath)
        self.latest: Path | None = None
        self._encoded: tuple[Inputs, Outputs] | None = None
        self._awaits_batch = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model, and choose the folder of the pictures."""
        super().setup(trainer, pl_module, stage)
        if not is_overridden("predict_step", pl_module, LightningModule):
            raise UserError(
                f"SamplePreview: {type(pl_module).__name__} has no predict_step; let it sample latents or pixels for a "
                "batch, or remove the callback"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Await the first batch."""
        self._awaits_batch = True

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        """Keep the first batch until it is validated."""
        if self._awaits_batch and trainer.validating:
            self._awaits_batch, self._encoded = False, (inputs, outputs)

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
            UserError: ``predict_step`` returned neither latents nor pixels.
        """
        if self._encoded is None:
            return
        (inputs, encoded), self._encoded = self._encoded, None
        b = len(encoded[LATENTS])
        n = min(self.samples, b)
        with isolate_rng(), trainer.precision_plugin.predict_step_context():
            sampled = pl_module.predict_step(_first(batch, n, b), batch_idx)
        encoder = self.encoder_of(trainer)
        _check_samples(sampled, n, encoded[LATENTS], encoder.vae, f"{type(pl_module).__name__}.predict_step")
        if trainer.is_global_zero:
            captions = captions_of(batch, self.caption)
            file = self.publish(lambda: before_and_after(encoder, inputs, encoded, sampled, captions), trainer)
            self.latest = file or self.latest


def _check_samples(sampled: Any, n: int, latents: Tensor, vae: Any, step: str) -> None:
    """Raise UserError unless these are ``n`` latents that can be decoded, or pixels in 0…1."""
    of_latents = (n, *latents.shape[1:])
    of_pixels = (n, 3, *(side * vae.spatial_compression for side in latents.shape[-2:]))
    shape = tuple(sampled.shape) if isinstance(sampled, Tensor) else None
    if shape not in (of_latents, of_pixels) or not sampled.is_floating_point():
        raise UserError(
            f"SamplePreview: {step} must return latents of shape {of_latents}, or float pixels in 0…1 of shape "
            f"{of_pixels}, got {describe(sampled)}"
        )
    if shape == of_latents:
        if not vae.can_decode:
            raise UserError(
                f"SamplePreview: {step} returns latents, and the autoencoder has no decoder; keep it "
                "(encoder_only=false), or return pixels"
            )
        return
    low, high = (float(bound) for bound in sampled.aminmax())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise UserError(
            f"SamplePreview: {step} must return pixels in 0…1, got {low:.3g}…{high:.3g}; for −1…1: (x + 1) / 2"
        )


def _first(batch: Any, n: int, b: int) -> Any:
    """The first ``n`` of ``b`` samples, of everything in a batch that has one value a sample."""
    cut = {
        key: value[:n]
        for key, value in items_of(batch)
        if isinstance(value, Tensor | list | tuple)
        and not (isinstance(value, Tensor) and not value.ndim)
        and len(value) == b
    }
    return rebuild(batch, cut)
