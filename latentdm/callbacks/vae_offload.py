"""`VAEOffload`: the autoencoder makes room in stages that do not encode."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from latentdm.callbacks.base import EncodeCallback, encoder_of
from latentdm.errors import UserError

STAGES = ("validate", "test", "predict")


class VAEOffload(EncodeCallback):
    """Moves the autoencoder to the CPU for stages whose batches need no encoding, and back; logs the memory freed.

    That is of use where a stage works on something else than images, as where validation samples from noise or
    prompts: their batches pass the data module untouched if they are no dict, tuple or list, and a model may want the
    memory for larger batches. If a batch of such a stage is to be encoded after all, the autoencoder comes back for the
    rest of the stage, with a warning. Between stages that a trainer runs one after another nothing needs doing:
    `latentdm.LatentDataModule` frees the device in its ``teardown``.

    Args:
        stages: some of ``"validate"`` (within a fit as well), ``"test"`` and ``"predict"``.

    Raises:
        ValueError: another stage, or none.

    Example:
        >>> Trainer(callbacks=[VAEOffload(["validate"])]).fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(self, stages: Sequence[str] = ("predict",)) -> None:
        if isinstance(stages, str) or not stages or not set(stages) <= set(STAGES):
            raise UserError(f"VAEOffload: stages must be a list of some of {', '.join(STAGES)}, got {stages!r}")
        self.stages = tuple(stages)
        self._home: torch.device | None = None  # while it is away
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where this cannot have an effect."""
        super().setup(trainer, pl_module, stage)
        self._home = None
        if self._useless(trainer) and not self._warned:
            self._warned = True
            rank_zero_warn("VAEOffload: has no effect: the autoencoder computes on the CPU; remove the callback")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Away, if asked for."""
        self._leave(trainer, "validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back."""
        self._return(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Away, if asked for."""
        self._leave(trainer, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back."""
        self._return(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Away, if asked for."""
        self._leave(trainer, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back."""
        self._return(trainer)

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Mapping[str, Any]) -> None:
        """A batch needs it after all."""
        if self._home is not None:
            self._return(trainer)
            rank_zero_warn(
                f"VAEOffload: stages={list(self.stages)}, but such a stage encodes images; the autoencoder is back for "
                "the rest of it. Leave that stage out"
            )

    @staticmethod
    def _useless(trainer: Trainer) -> bool:
        return trainer.strategy.root_device.type == "cpu"

    def _leave(self, trainer: Trainer, stage: str) -> None:
        vae = encoder_of(trainer, "VAEOffload").vae
        if stage not in self.stages or vae.device.type == "cpu":
            return
        self._home = vae.device
        before = _allocated(vae.device)
        vae.to("cpu")
        if self._home.type == "cuda":
            torch.cuda.empty_cache()
        freed = (before - _allocated(self._home)) / 2**20
        rank_zero_info(f"VAEOffload: {freed:.0f} MiB of {self._home} freed for {stage}")

    def _return(self, trainer: Trainer) -> None:
        if self._home is not None:
            encoder_of(trainer, "VAEOffload").vae.to(self._home)
            self._home = None


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
