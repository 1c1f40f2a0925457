"""`SaveForDiffusers`: what was trained, as diffusers and ComfyUI load it."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError

from latentdm.errors import UserError
from latentdm.finetune.base import FineTune
from latentdm.finetune.export import write_lora, write_pipeline, written_whole
from latentdm.finetune.sharding import gathered
from latentdm.validation import Check

FOLDERS = {True: "lora", False: "pipeline"}
SPLITTING = (FSDPStrategy, DeepSpeedStrategy)
"""Strategies that split weights in ways of their own."""


class SaveForDiffusers(Callback):
    """Writes ``pipeline/``, which ``from_pretrained`` loads, or ``lora/``, which ``load_lora_weights`` loads.

    Every few steps, and at the end, on rank 0. A folder is written under a temporary name beside it and then renamed,
    so that what is there is whole; where the disk is full it warns, and training goes on. In ``pipeline/`` all that was
    not trained is copied from the pretrained pipeline.

    Weights that ``ModelParallelStrategy`` has split over ranks are gathered on rank 0, in the memory of its machine.
    Under Lightning's ``EMAWeightAveraging`` the last save holds the averages, and those before it the weights as they
    train.

    Args:
        every_n_steps: optimizer steps from one save to the next; None saves at the end alone.
        kohya: write a LoRA in kohya's format too, ``lora_kohya.safetensors``, which ComfyUI reads.
        dirpath: where the folder is made; None is the trainer's ``default_root_dir``.

    Raises:
        UserError: a value out of range; in ``setup``, the model is none of `latentdm.finetune`, or the strategy splits
            weights in another way.

    Example:
        >>> Trainer(callbacks=[SaveForDiffusers(every_n_steps=500)]).fit(model, datamodule=dm)  # doctest: +SKIP

    Attributes:
        latest: the folder that was written last, on rank 0.
    """

    def __init__(
        self, every_n_steps: int | None = None, kohya: bool = False, dirpath: str | os.PathLike[str] | None = None
    ) -> None:
        if every_n_steps is not None:
            Check("SaveForDiffusers").integer("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.kohya = kohya
        self.dirpath = dirpath
        self.latest: Path | None = None
        self._saved_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this model can be saved."""
        if not isinstance(pl_module, FineTune):
            raise UserError(
                f"SaveForDiffusers: {type(pl_module).__name__} is no model of latentdm.finetune; remove the callback, "
                "or choose model=stable_diffusion, sdxl or flux_fill"
            )
        if isinstance(trainer.strategy, SPLITTING):
            raise UserError(
                f"SaveForDiffusers: cannot gather the weights that {type(trainer.strategy).__name__} splits over "
                "ranks; choose ModelParallelStrategy (trainer=fsdp2), or remove the callback"
            )
        if self.kohya and not pl_module.lora.active:
            raise UserError("SaveForDiffusers: kohya=true without a LoRA; set model.lora.rank, or kohya: false")
        if self.kohya and pl_module.component != "unet":
            raise UserError(
                "SaveForDiffusers: kohya=true is for Stable Diffusion; of a FLUX LoRA in kohya's names diffusers drops "
                "layers in silence, and ComfyUI reads diffusers' own; set kohya: false"
            )
        self._saved_at = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if this step's turn has come."""
        step = trainer.global_step
        if step and self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_at:
            self.save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what training came to, unless this step was saved already and no averages have come since."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if averaged or trainer.global_step != self._saved_at:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder now."""
        assert isinstance(pl_module, FineTune)
        self._saved_at = trainer.global_step
        lora = pl_module.lora.active
        state = gathered(pl_module.network, trained=lora)  # every rank has a part
        if not trainer.is_global_zero:
            return
        folder = Path(self.dirpath if self.dirpath is not None else trainer.default_root_dir) / FOLDERS[lora]
        try:
            with written_whole(folder) as temporary:
                if lora:
                    write_lora(temporary, pl_module, state, self.kohya)
                else:
                    write_pipeline(temporary, pl_module, state, previous=folder if self.latest == folder else None)
        except (OSError, SafetensorError) as error:
            rank_zero_warn(
                f"SaveForDiffusers: step {trainer.global_step} was not saved to {str(folder)!r}: {error}; training "
                "goes on, and what was saved before stays"
            )
            return
        self.latest = folder
        rank_zero_info(f"SaveForDiffusers: step {trainer.global_step} → {folder}")
