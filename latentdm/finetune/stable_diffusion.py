"""`StableDiffusion`: UNets with 4 channels, or with 9 for inpainting: Stable Diffusion 1.5, 2 and XL.

Shapes: ``b`` batch, ``z h w`` latents, ``l d`` tokens and channels of the text, ``H W`` pixels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdm.batch import (
    CROP_TOP_LEFT,
    LATENT_MASK,
    LATENTS,
    MASKED_LATENTS,
    NOISE_MASK,
    ORIGINAL_SIZE,
    POOLED_PROMPT_EMBEDS,
    PROMPT_EMBEDS,
    TARGET_SIZE,
)
from latentdm.errors import UserError
from latentdm.finetune.base import CONDITIONS, FACTOR, FineTune
from latentdm.finetune.lora import Lora
from latentdm.finetune.objectives import Diffusion
from latentdm.validation import Check

SIZES = (ORIGINAL_SIZE, CROP_TOP_LEFT, TARGET_SIZE)


class StableDiffusion(FineTune):
    """Fine-tunes the UNet of Stable Diffusion 1.5, 2 or XL.

    An inpainting UNet sees noisy latents, the mask at latent resolution and the masked image's latents, in this order;
    one that is 9 channels wide already is taken as it is. What the UNet predicts is what the pipeline's scheduler says.

    Args:
        pretrained: as for `FineTune`.
        widen: give a UNet of 4 channels the 5 that inpainting needs, with weights of zero, so that it starts as what
            it was. They are trained and saved with all others, so that this is not for a LoRA.
        snr_gamma: weigh the loss by min-SNR; 5 is usual, None is without.
        settings: those of `FineTune`.

    Example:
        >>> model = StableDiffusion("stable-diffusion-v1-5/stable-diffusion-inpainting")  # doctest: +SKIP
        >>> Trainer(precision="bf16-mixed").fit(model, datamodule=dm)  # doctest: +SKIP
    """

    component = "unet"
    network_class = "UNet2DConditionModel"
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pretrained: str,
        lora: Lora | Mapping[str, Any] | None = None,
        widen: bool = False,
        snr_gamma: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, lora, **settings)
        if snr_gamma is not None and Check(self.owner).number("snr_gamma", snr_gamma, 0) == 0:
            raise Check(self.owner).fail("snr_gamma", "a number above 0", snr_gamma, "null is without")
        self.objective = Diffusion(self.pipeline.config("scheduler"), snr_gamma, self.owner)
        self.xl = self.config.get("addition_embed_type") == "text_time"
        if self.xl and self.pipeline.index.get("requires_aesthetics_score"):
            raise UserError(
                f"{self.owner}: {self.pipeline.source!r} is an SDXL refiner, which reads an aesthetic score; "
                "fine-tune the base or the inpainting model"
            )
        self.latent_channels = int(self.config["out_channels"])
        self.in_channels = int(self.config["in_channels"])
        plain, inpaint = self.latent_channels, 2 * self.latent_channels + 1
        if self.in_channels not in (plain, inpaint):
            raise UserError(
                f"{self.owner}: the unet of {self.pipeline.source!r} takes {self.in_channels} channels; "
                f"known are {plain}, and {inpaint} for inpainting"
            )
        if widen and self.lora.active:
            raise UserError(
                f"{self.owner}: widen=true with lora.rank={self.lora.rank}: the new channels would be neither trained "
                "nor saved; train all weights (lora.rank: null), or start from an inpainting model"
            )
        self.widen = widen and self.in_channels == plain
        if self.widen:
            self.in_channels = inpaint
        self.inpaints = self.in_channels == inpaint
        self.conditions = (CONDITIONS if self.inpaints else ()) + ((POOLED_PROMPT_EMBEDS,) if self.xl else ())
        self.text_width = int(self.config["cross_attention_dim"])
        if self.inpaints and "Inpaint" not in self.pipeline_class:  # widened, or saved as another pipeline
            self.pipeline_class = f"StableDiffusion{'XL' if self.xl else ''}InpaintPipeline"

    def check_conditions(self, channels: Mapping[str, int]) -> None:
        """Raise UserError unless the encoder gives mask and masked image as this model sees them."""
        masked = MASKED_LATENTS in channels
        if masked and not self.inpaints:
            raise UserError(
                f"{self.owner}: the unet of {self.pipeline.source!r} takes {self.in_channels} channels, and the "
                f"encoder gives it a mask besides ({2 * self.latent_channels + 1}); set widen: true to add channels "
                "for it, start from an inpainting model, or use encoder=plain"
            )
        if self.inpaints and not masked:
            raise UserError(
                f"{self.owner}: the unet takes {self.in_channels} channels, those of a mask among them, and the "
                "encoder gives latents alone; use encoder=inpaint encoder.grow_mask_by=0"
            )
        if masked and channels[LATENT_MASK] != 1:
            raise UserError(
                f"{self.owner}: latent_mask has {channels[LATENT_MASK]} channels, and Stable Diffusion takes 1; "
                "set encoder.latent_mask=nearest"
            )

    def _adapt(self, network: Any) -> None:
        """Widen the first convolution, with zeros: what the UNet computes stays what it was until they are trained."""
        if self.widen:
            conv = network.conv_in
            added = self.in_channels - conv.in_channels
            conv.weight = nn.Parameter(F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, added)))
            conv.in_channels = self.in_channels
            network.register_to_config(in_channels=self.in_channels)

    def network_input(self, batch: Mapping[str, Any], noisy: Tensor, times: Tensor) -> dict[str, Any]:
        """``sample`` ``b 4 h w`` or ``b 9 h w``, ``timestep``, the text, and SDXL's sizes."""
        conditions = [batch[key].to(noisy.dtype) for key in CONDITIONS] if self.inpaints else []
        arguments = {
            "sample": torch.cat([noisy, *conditions], dim=1),
            "timestep": times,
            "encoder_hidden_states": batch[PROMPT_EMBEDS],
        }
        if self.xl:
            arguments["added_cond_kwargs"] = {
                "text_embeds": batch[POOLED_PROMPT_EMBEDS],
                "time_ids": time_ids(batch).to(batch[PROMPT_EMBEDS]),
            }
        return arguments

    def sampler(self, **parts: Any) -> Any:
        """The pipeline of its family, for inpainting if the UNet does that."""
        import diffusers

        if self.xl:
            parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind = f"StableDiffusion{'XL' if self.xl else ''}{'Inpaint' if self.inpaints else ''}Pipeline"
        return getattr(diffusers, kind)(**parts)

    def sampler_input(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The embeddings, those for no prompt where a text encoder can be asked, and what an inpainting UNet sees."""
        names = (PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS) if self.xl else (PROMPT_EMBEDS,)
        given = {name: batch[name] for name in names}
        text: Any = getattr(getattr(self.trainer, "datamodule", None), "text", None)
        if self.guidance_scale > 1 and hasattr(text, "encode"):
            for name, embedding in text.encode([""]).items():
                given[f"negative_{name}"] = embedding.to(given[name]).expand_as(given[name])
        else:
            given["guidance_scale"] = 1.0
        if self.inpaints:
            # From pure noise, and without the picture: what lies under the mask must not show through.
            given |= {"image": batch[MASKED_LATENTS], "masked_image_latents": batch[MASKED_LATENTS]}
            given |= {"mask_image": batch[NOISE_MASK], "strength": 1.0}
        return given


def time_ids(batch: Mapping[str, Any]) -> Tensor:
    """SDXL's ``b 6``: the picture's own size, where it was cut, and the size it is trained at, rows first.

    A batch without them is taken for pictures that were never cut.
    """
    latents: Tensor = batch[LATENTS]
    size = torch.tensor([side * FACTOR for side in latents.shape[-2:]], device=latents.device)
    defaults = dict(zip(SIZES, (size, torch.zeros_like(size), size), strict=True))
    parts = [batch.get(name, defaults[name].expand(len(latents), 2)) for name in SIZES]
    return torch.cat([part.to(latents.device).float() for part in parts], dim=1)
