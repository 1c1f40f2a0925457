"""Optimizers and the schedule of their learning rate."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from latentdm.errors import MissingExtraError

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = ("constant", "cosine", "linear")


def check_optimizer(optimizer: str, owner: str) -> str:
    """``optimizer``.

    Raises:
        MissingExtraError: its package is not installed.
    """
    if optimizer == "adamw_8bit":
        try:
            import_module("bitsandbytes")
        except ImportError as error:
            raise MissingExtraError(
                f"{owner}: optimizer=adamw_8bit needs the package 'bitsandbytes'; install it with: "
                "pip install bitsandbytes, or set optimizer=adamw"
            ) from error
    return optimizer


def make_optimizer(
    weights: list[nn.Parameter],
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    schedule: str,
    warmup_steps: int,
    trainer: Any,
) -> Any:
    """What Lightning's ``configure_optimizers`` returns."""
    from diffusers.optimization import get_scheduler

    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if optimizer == "adamw_8bit":
        made = import_module("bitsandbytes").optim.AdamW8bit(weights, **settings)
    else:
        made = torch.optim.AdamW(weights, **settings)
    if schedule == "constant" and not warmup_steps:
        return made
    name = "constant_with_warmup" if schedule == "constant" else schedule
    # asked for only where it matters: of an endless run Lightning cannot say it
    steps = None if schedule == "constant" else int(trainer.estimated_stepping_batches)
    scheduler = get_scheduler(name, made, num_warmup_steps=warmup_steps, num_training_steps=steps)
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
