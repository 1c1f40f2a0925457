"""Pictures of a model in training, by diffusers' pipelines."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentdm.batch import LATENTS
from latentdm.draws import sample_seed
from latentdm.errors import UserError


def sample(model: Any, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
    """What ``predict_step`` of a `latentdm.finetune.base.FineTune` gives: ``b 3 H W`` float32 in 0…1."""
    import diffusers

    encoder = getattr(getattr(model.trainer, "datamodule", None), "encoder", None)
    if encoder is None:
        raise UserError(f"{model.owner}: predict_step decodes with the autoencoder of a latentdm.LatentDataModule")
    vae, (b, _, h, w) = encoder.vae, batch[LATENTS].shape
    scheduler = model.pipeline.load(diffusers, "scheduler")
    parts = {"vae": vae.module, "scheduler": scheduler, model.component: model.network}
    sampler = model.sampler(text_encoder=None, tokenizer=None, **parts)
    sampler.set_progress_bar_config(disable=True)
    ids = [f"{batch_idx}.{model.global_rank}.{row}" for row in range(b)]
    settings: dict[str, Any] = {
        "height": h * vae.spatial_compression,
        "width": w * vae.spatial_compression,
        "num_inference_steps": model.sampling_steps,
        "guidance_scale": model.guidance_scale,
        "generator": [torch.Generator(model.device).manual_seed(sample_seed(model.seed, 0, i, "sample")) for i in ids],
        "output_type": "latent",
    }
    sampled = sampler(**settings | model.sampler_input(batch)).images.float()
    return vae.decode(model.unpacked(sampled, h, w))  # type: ignore[no-any-return]
