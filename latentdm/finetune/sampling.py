"""What both models need to sample with diffusers' pipelines."""

from typing import Any

import torch

from latentdm.draws import sample_seed
from latentdm.errors import UserError


def frozen_vae(model: Any) -> Any:
    """The data module's frozen autoencoder, which decodes samples.

    Raises:
        UserError: there is none.
    """
    encoder = getattr(getattr(model.trainer, "datamodule", None), "encoder", None)
    if encoder is None:
        raise UserError(f"{model.owner}: predict_step decodes with the autoencoder of a latentdm.LatentDataModule")
    return encoder.vae


def generators(model: Any, count: int, batch_idx: int) -> list[torch.Generator]:
    """One generator a sample, the same in every validation."""
    ids = [f"{batch_idx}.{model.global_rank}.{row}" for row in range(count)]
    return [torch.Generator(model.device).manual_seed(sample_seed(model.seed, 0, i, "sample")) for i in ids]
