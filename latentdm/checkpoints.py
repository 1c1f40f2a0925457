"""`WholeCheckpoints`: a checkpoint's file is the old one or the new one, whatever happens while it is written."""

import os
from pathlib import Path
from typing import Any

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO

from latentdm.errors import RunError


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the place where it belongs, and then renames it.

    Lightning's own writes into the system's temporary folder. Where that lies on another file system the file is copied
    from there, over the checkpoint of the same name: a process that is killed meanwhile, or a full disk, leaves neither
    the old one nor the new one. It also holds all of a checkpoint in memory a second time, which this one does not.

    What is not on a local file system is written as Lightning does. `ModelParallelStrategy` asks this class only with
    ``save_distributed_checkpoint=False``.

    Raises:
        RunError: in `save_checkpoint`, the checkpoint could not be written, as where the disk is full; the one before
            is there as it was.

    Example:
        >>> Trainer(plugins=[WholeCheckpoints()])  # doctest: +SKIP
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: the state to write.
            path: its file.
            storage_options: Lightning's; None.
        """
        if storage_options is not None or get_protocol(str(path)) != "file":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(str(path).removeprefix("file://"))
        unfinished = target.with_name(f".{target.name}.part")  # always the same, so that a killed run leaves but one
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before what was written
            unfinished.replace(target)
        except (OSError, RuntimeError) as error:  # torch turns what a file raises into a RuntimeError
            unfinished.unlink(missing_ok=True)
            before = "the one before stays" if target.exists() else "there is none before it"
            raise RunError(
                f"the checkpoint {str(target)!r} could not be written, and {before}: {_reason(error)}; make room on "
                "the disk, and go on with ckpt_path=last"
            ) from error


def _reason(error: BaseException) -> str:
    """The file's own error, where torch's hides it, in one line."""
    while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
        error = error.__context__
    return " ".join(str(error).split())
