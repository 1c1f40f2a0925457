"""Does what a data module gives fit the denoiser? Each says which setting makes it fit."""

from collections.abc import Mapping
from typing import Any

from latentdm.batch import LATENTS, POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS
from latentdm.errors import UserError

SCALING_FACTOR = 0.18215
"""Of an AutoencoderKL whose config names none, as that of SD 1.5."""


def check_text(model: Any, datamodule: Any) -> None:
    """Raise UserError unless a stage of a `latentdm.LatentDataModule` makes prompt embeddings."""
    names = getattr(getattr(datamodule, "line", None), "names", None)
    if names is not None and PROMPT_EMBEDS not in names:
        raise UserError(
            f"{model.owner}: no stage of the data module makes {PROMPT_EMBEDS!r} of the captions; set text=pipeline, "
            "or name it in the reads of a stage of your own where the batches bring it"
        )


def check_vae(model: Any, channels: Mapping[str, int], autoencoder: Any) -> None:
    """Raise UserError where the latents are another VAE's: SDXL's have the channels of SD 1.5's, in another scale."""
    remedy = f"use the pipeline's own: vae.source={model.pipeline.source} vae.subfolder=vae"
    if channels[LATENTS] != model.latent_channels:
        raise UserError(
            f"{model.owner}: the VAE gives latents of {channels[LATENTS]} channels, and the {model.component} of "
            f"{model.pipeline.source!r} takes {model.latent_channels}; {remedy}"
        )
    own = model.pipeline.config("vae")
    given = getattr(autoencoder, "config", {})
    if own.get("_class_name") != type(autoencoder).__name__ or "scaling_factor" not in given:
        return
    expected = own.get("scaling_factor", SCALING_FACTOR)
    if given["scaling_factor"] != expected:
        raise UserError(
            f"{model.owner}: the VAE's scaling_factor is {given['scaling_factor']}, and that of "
            f"{model.pipeline.source!r} {expected}: it belongs to another family; {remedy}"
        )


def check_batch(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise UserError unless a batch holds what the denoiser takes."""
    for name in (LATENTS, PROMPT_EMBEDS, *model.conditions):
        if name not in batch:
            remedy = {
                LATENTS: "use a latentdm.LatentDataModule",
                PROMPT_EMBEDS: "let a text encoder make it of captions: text=pipeline",
                POOLED_PROMPT_EMBEDS: "SDXL and FLUX need the text encoders of their own pipeline: text=pipeline",
            }.get(name, "use encoder=inpaint")
            raise UserError(f"{model.owner}: the batch has no {name!r}, only {', '.join(map(repr, batch))}; {remedy}")
    width = batch[PROMPT_EMBEDS].shape[-1]
    if width != model.text_width:
        raise UserError(
            f"{model.owner}: prompt_embeds have {width} channels, and the {model.component} of "
            f"{model.pipeline.source!r} reads {model.text_width}; use its own text encoders: "
            f"text.source={model.pipeline.source}"
        )
