"""Pictures of callbacks, written to files and sent to each logger that takes images."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image


class Publisher:
    """Writes ``step_000500.png`` and sends the picture to the loggers that take one.

    They are TensorBoard, MLflow, and those with a ``log_image`` as W&B's. Others, such as CSV, are passed over.

    A picture that cannot be written, as on a full disk, does not end a run: the first one is warned of, and all are
    counted.

    Args:
        owner: the callback, which a warning names.
        key: under which loggers show the pictures.

    Attributes:
        folder: of the files, once `open` has chosen it.
        lost: how many pictures were not written.
    """

    def __init__(self, owner: str, key: str) -> None:
        self.owner = owner
        self.key = key
        self.folder = Path()
        self.lost = 0
        self._warned = False

    def open(self, trainer: Trainer, dirpath: str | Path | None, name: str) -> None:
        """Choose ``dirpath``, or a folder of this name in the trainer's log folder. To be called on every rank."""
        log_dir = trainer.log_dir  # which Lightning broadcasts
        self.folder = Path(dirpath) if dirpath is not None else Path(log_dir or ".") / name
        self.lost = 0

    def publish(self, picture: Image.Image, trainer: Trainer) -> Path | None:
        """Publish the picture of a step.

        Args:
            picture: the picture.
            trainer: whose step and loggers are meant.

        Returns:
            The file; None where it could not be written.
        """
        step = trainer.global_step
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

    def close(self) -> None:
        """Say how many pictures were lost, if it was more than the one that was warned of."""
        if self.lost > 1:
            rank_zero_info(f"{self.owner}: {self.lost} pictures could not be written, as to {self.folder}")

    def _count(self, where: Path | str, error: OSError) -> None:
        self.lost += 1
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self.owner}: cannot write {where}: {error.strerror or error}; training goes on, and pictures that "
                "cannot be written are left out without another warning"
            )
