"""What the callbacks share: two hooks around the encoding of a batch, and when a step is one that is logged."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from latentdm.errors import UserError

Inputs = Mapping[str, Any]
"""What a batch held on the device, under our names."""

Outputs = Mapping[str, Tensor]
"""What the stages made of it, under our names, in float32."""


class EncodeCallback(Callback):
    """A callback that watches batches become latents. It observes, and changes nothing.

    `latentdm.LatentDataModule` calls its two hooks in every stage, on every rank and in the order of the callbacks, and
    once for each part of a batch of several loaders.

    Raises:
        UserError: in ``setup``, the trainer has no `latentdm.LatentDataModule`.

    Example:
        >>> class PrintShapes(EncodeCallback):
        ...     def on_encode_end(self, trainer, pl_module, inputs, outputs, batch):
        ...         print(inputs["pixels"].shape, "→", outputs["latents"].shape)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to watch."""
        self.encoder_of(trainer)

    def encoder_of(self, trainer: Trainer) -> Any:
        """The encoder of the trainer's data module.

        Raises:
            UserError: the data module has none.
        """
        datamodule = getattr(trainer, "datamodule", None)
        encoder = getattr(datamodule, "encoder", None)
        if not hasattr(encoder, "vae"):
            raise UserError(
                f"{type(self).__name__}: needs a LatentDataModule to watch, got {type(datamodule).__name__}; "
                "pass one as datamodule=, or remove the callback"
            )
        return encoder

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs) -> None:
        """Called when a batch is on the device, before masks are made and images encoded.

        Args:
            trainer: the trainer.
            pl_module: the model.
            inputs: the batch under our names, channels first: ``pixels`` and, where it has them, ``mask``, ``index``.
        """

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        """Called when a batch is encoded, before the step receives it.

        Args:
            trainer: the trainer.
            pl_module: the model.
            inputs: as for `on_encode_start`, with the ``mask`` that the mask source made.
            outputs: what the stages wrote, under our names, in float32: ``latents``, …
            batch: as the step receives it, under the user's names.
        """


class LogSteps:
    """Tells at the end of a training batch whether its step is one that the trainer logs, once for each such step.

    A trainer that logs nothing (``log_every_n_steps=0``) counts as one that logs every 50 steps: its alarms ring too.
    """

    def __init__(self) -> None:
        self._last = 0

    def reached(self, trainer: Trainer) -> bool:
        """Whether this batch ended a step that is logged; the same on every rank."""
        every, step = trainer.log_every_n_steps or 50, trainer.global_step  # type: ignore[attr-defined]
        if step == self._last or step % every:
            return False
        self._last = step
        return True
