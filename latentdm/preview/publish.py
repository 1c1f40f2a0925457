"""Pictures of callbacks, written to a file and sent to each logger that takes images."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image


def folder_of(trainer: Trainer, dirpath: str | Path | None, name: str) -> Path:
    """``dirpath``, or a folder of this name in the trainer's log folder. To be called on every rank."""
    log_dir = trainer.log_dir  # which Lightning broadcasts
    return Path(dirpath) if dirpath is not None else Path(log_dir or ".") / name


def publish(picture: Image.Image, folder: Path, key: str, trainer: Trainer) -> Path:
    """Write ``step_000500.png`` and send the picture to TensorBoard, and to loggers with a ``log_image`` as W&B's.

    Args:
        picture: the picture.
        folder: made if it is not there.
        key: under which loggers show it.
        trainer: whose step and loggers are meant.

    Returns:
        The file.
    """
    step = trainer.global_step
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step_{step:06d}.png"
    picture.save(file)
    logger: Any
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[picture], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(key, np.asarray(picture), step, dataformats="HWC")
    return file
