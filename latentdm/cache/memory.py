"""A folder in memory, which workers and ranks of a machine share."""

import atexit
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

from lightning.pytorch import Trainer

from latentdm.cache.store import remove_old

SHARED = Path("/dev/shm")
"""Linux's file system in memory; elsewhere the folder for temporary files has to do."""


def memory_folder(trainer: Trainer | None) -> Path:
    """A folder of the same name on all ranks, which goes when this process ends."""
    parent = SHARED if SHARED.is_dir() and os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
    remove_old(_left(parent))
    name = f"latentdm-{os.getpid()}-{uuid4().hex}"
    if trainer is not None:
        name = trainer.strategy.broadcast(name)
    folder = parent / name
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a worker, which inherits what is registered
        rmtree(folder, ignore_errors=True)


def _left(parent: Path) -> Iterator[Path]:
    """The folders of processes that are no more."""
    for folder in parent.glob("latentdm-*-*"):
        found = re.match(r"latentdm-(\d+)-", folder.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            yield folder
