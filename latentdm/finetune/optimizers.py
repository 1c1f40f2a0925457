"""Optimizers and the schedule of their learning rate."""

from importlib import import_module
from typing import Any

import torch

OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = ("constant", "cosine", "linear")


def make_optimizer(model: Any) -> Any:
    """What ``configure_optimizers`` of a `latentdm.finetune.base.FineTune` returns, by its settings."""
    from diffusers.optimization import get_scheduler

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    settings: dict[str, Any] = {"lr": model.learning_rate, "weight_decay": model.weight_decay}
    if model.optimizer == "adamw_8bit":
        made = import_module("bitsandbytes").optim.AdamW8bit(weights, **settings)
    else:
        made = torch.optim.AdamW(weights, **settings)
    constant = model.schedule == "constant"
    if constant and not model.warmup_steps:
        return made
    name = "constant_with_warmup" if constant else model.schedule
    # asked for only where it matters: of an endless run Lightning cannot say it
    steps = None if constant else int(model.trainer.estimated_stepping_batches)
    scheduler = get_scheduler(name, made, num_warmup_steps=model.warmup_steps, num_training_steps=steps)
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
