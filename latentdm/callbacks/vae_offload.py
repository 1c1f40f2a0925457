"""`VAEOffload`: the frozen networks make room in stages that do not encode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from latentdm.callbacks.base import EncodeCallback, Inputs
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

    In training the autoencoder leaves after an epoch in which nothing was encoded, as all was read from a cache or an
    export, and comes back for the first batch that needs it.

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
        self._chunks = 0  # that were encoded before this epoch
        self._left_at = -1  # so many of them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn where there is no device to free."""
        super().setup(trainer, pl_module, stage)
        self._device = None
        if self.encoder_of(trainer).vae.device.type == "cpu" and not self._warned:
            self._warned = True
            rank_zero_warn("VAEOffload: has no effect: the frozen networks compute on the CPU; remove the callback")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the networks to the CPU if this stage is one of ``stages``."""
        stage = "test" if trainer.testing else "predict" if trainer.predicting else "validate"
        device = self.encoder_of(trainer).vae.device
        if stage in self.stages and device.type != "cpu":
            self._device = device
            with _freed(device, stage):
                trainer.datamodule.line.setup("cpu")  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move them back."""
        if self._device is not None:
            trainer.datamodule.line.setup(self._device)  # type: ignore[attr-defined]
            self._device = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was encoded so far."""
        self._chunks = self.encoder_of(trainer).vae.chunks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the autoencoder rest on the CPU if nothing was encoded in this epoch; it comes back by itself."""
        vae = self.encoder_of(trainer).vae
        if vae.chunks == self._chunks != self._left_at and self._device is None and vae.device.type != "cpu":
            self._left_at = vae.chunks
            with _freed(vae.device, "epochs that read everything"):
                vae.to(vae.device, rest=True)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs) -> None:
        """Move them back, with a warning, for a batch that needs them after all."""
        if self._device is not None:
            self.on_validation_end(trainer, pl_module)
            rank_zero_warn(
                f"VAEOffload: stages={list(self.stages)}, but such a stage encodes images; the networks are back for "
                "the rest of it. Leave that stage out"
            )


@contextmanager
def _freed(device: torch.device, what: str) -> Iterator[None]:
    """Say what the device has gained."""
    before = _allocated(device)
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rank_zero_info(f"VAEOffload: {(before - _allocated(device)) / 2**20:.0f} MiB of {device} freed for {what}")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
