"""`VAEOffload`: the frozen networks make room in stages that do not encode."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from latentdm.batch import MASKED_LATENTS
from latentdm.cache.rows import CACHED, CachedRows
from latentdm.callbacks.base import EncodeCallback, Inputs, encoder_of
from latentdm.validation import Check

STAGES = ("validate", "test", "predict")


class VAEOffload(EncodeCallback):
    """Moves the frozen networks to the CPU for stages whose batches need no encoding, and back; logs the memory freed.

    These are the autoencoder, the text encoders, and what stages of your own hold: all that a `latentdm.Stage` moves in
    its ``setup``.

    Use it where a stage works on something else than images, for instance on prompts: batches that hold no images and
    are no dict, tuple, list or dataclass pass the data module untouched, and the model may want the memory. If a batch
    of such a stage needs encoding after all, the networks come back for the rest of the stage, with a warning. Between
    stages that a trainer runs one after another `latentdm.LatentDataModule` frees the device in its ``teardown``.

    In training it leaves after an epoch in which nothing was encoded, as all was read from a cache or an export, and
    comes back for the first batch that needs it.

    Args:
        stages: some of ``"validate"`` (within a fit as well), ``"test"`` and ``"predict"``.

    Raises:
        UserError: another stage, or none.

    Example:
        >>> Trainer(callbacks=[VAEOffload(["validate"])]).fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(self, stages: Sequence[str] = ("predict",)) -> None:
        if isinstance(stages, str) or not stages or not set(stages) <= set(STAGES):
            raise Check("VAEOffload").fail("stages", f"a list of some of {', '.join(STAGES)}", stages)
        self.stages = tuple(stages)
        self._device: torch.device | None = None  # the networks', while they are away from it
        self._warned = False
        self._training = False  # it is away because an epoch needed nothing of it
        self._chunks = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn where there is no device to free."""
        super().setup(trainer, pl_module, stage)
        self._device = None
        if encoder_of(trainer, "VAEOffload").vae.device.type == "cpu" and not self._warned:
            self._warned = True
            rank_zero_warn("VAEOffload: has no effect: the frozen networks compute on the CPU; remove the callback")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the networks to the CPU if this stage is one of ``stages``."""
        stage = "test" if trainer.testing else "predict" if trainer.predicting else "validate"
        if stage in self.stages:
            self._leave(trainer, stage)

    def _leave(self, trainer: Trainer, stage: str) -> None:
        vae = encoder_of(trainer, "VAEOffload").vae
        if vae.device.type == "cpu":
            return
        self._device = vae.device
        before = _allocated(vae.device)
        trainer.datamodule.line.setup("cpu")  # type: ignore[attr-defined]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        freed = (before - _allocated(self._device)) / 2**20
        rank_zero_info(f"VAEOffload: {freed:.0f} MiB of {self._device} freed for {stage}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move them back."""
        if self._device is not None and not self._training:
            trainer.datamodule.line.setup(self._device)  # type: ignore[attr-defined]
            self._device = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was encoded so far."""
        self._chunks = encoder_of(trainer, "VAEOffload").vae.chunks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the autoencoder to the CPU if nothing was encoded in this epoch."""
        if encoder_of(trainer, "VAEOffload").vae.chunks == self._chunks and self._device is None:
            self._leave(trainer, "epochs that read everything")
            self._training = self._device is not None

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs) -> None:
        """Move them back for a batch that needs them; with a warning, where that was not to be."""
        if self._training and not _all_read(inputs, encoder_of(trainer, "VAEOffload")):
            self._training = False
            self.on_validation_end(trainer, pl_module)
        elif self._device is not None and not self._training:
            self.on_validation_end(trainer, pl_module)
            rank_zero_warn(
                f"VAEOffload: stages={list(self.stages)}, but such a stage encodes images; the networks are back for "
                "the rest of it. Leave that stage out"
            )


def _all_read(inputs: Inputs, encoder: Any) -> bool:
    """Whether a batch leaves nothing to encode."""
    cached = inputs.get(CACHED)
    if not isinstance(cached, CachedRows) or cached.misses:
        return False
    return cached.blank is not None or MASKED_LATENTS in cached.keys or MASKED_LATENTS not in encoder.writes


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
