"""`PictureCallback`: pictures of a run, written to files and sent to each logger that takes images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from latentdm.batch import Key
from latentdm.callbacks.base import EncodeCallback
from latentdm.validation import Check


class PictureCallback(EncodeCallback):
    """Writes ``step_000500.png`` and sends the picture to the loggers that take one.

    They are TensorBoard, MLflow, and those with a ``log_image`` as W&B's. Others, such as CSV, are passed over.

    A picture that does not fit in memory is left out with a warning. Nor does one that cannot be written, as on a full
    disk, end a run: the first one is warned of, and all are counted.

    Args:
        samples: rows, the first ones of the batch.
        caption: where the batch has the titles of the rows; see `captions_of`.
        dirpath: folder of the pictures; None is one in the trainer's log folder.

    Attributes:
        key: under which loggers show the pictures.
        subfolder: the name of that folder in the trainer's log folder.
        folder: of the files, once `setup` has chosen it.
    """

    key: str
    subfolder: str

    def __init__(self, samples: int, caption: Key | None, dirpath: str | Path | None) -> None:
        self.samples = Check(type(self).__name__).integer("samples", samples, 1)
        self.caption = caption
        self.dirpath = dirpath
        self.folder = Path()
        self._lost = 0
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder of the pictures."""
        super().setup(trainer, pl_module, stage)
        log_dir = trainer.log_dir  # which Lightning broadcasts
        self.folder = Path(self.dirpath) if self.dirpath is not None else Path(log_dir or ".") / self.subfolder
        self._lost = 0

    def publish(self, draw: Callable[[], Image.Image], trainer: Trainer) -> Path | None:
        """Publish the picture of a step.

        Args:
            draw: makes it.
            trainer: whose step and loggers are meant.

        Returns:
            The file; None where there is none.
        """
        step = trainer.global_step
        try:
            picture = draw()
        except torch.OutOfMemoryError:
            rank_zero_warn(
                f"{type(self).__name__}: no memory to decode a sample at step {step}; this picture is skipped"
            )
            return None
        file, written = self.folder / f"step_{step:06d}.png", True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        except OSError as error:
            written = False
            self._count(file, error)
        for logger in trainer.loggers:
            try:
                self._send(picture, logger, step)
            except OSError as error:
                self._count(f"to {type(logger).__name__}", error)
        return file if written else None

    def _send(self, picture: Image.Image, logger: Any, step: int) -> None:
        if hasattr(logger, "log_image"):
            logger.log_image(key=self.key, images=[picture], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture, key=self.key, step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(self.key, np.asarray(picture), step, dataformats="HWC")

    def _count(self, where: Path | str, error: OSError) -> None:
        self._lost += 1
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__}: cannot write {where}: {error.strerror or error}; training goes on, and "
                "pictures that cannot be written are left out without another warning"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say how many pictures could not be written, if it was more than the one that was warned of."""
        if self._lost > 1:
            name = type(self).__name__
            rank_zero_info(f"{name}: {self._lost} pictures could not be written, as to {self.folder}")
