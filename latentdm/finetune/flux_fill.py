"""`FluxFill`: FLUX.1's inpainting transformer.

Shapes: ``b`` batch, ``z h w`` latents, ``n`` = h/2·w/2 packed tokens, ``l d`` tokens and channels of the text.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdm.batch import LATENT_MASK, MASKED_LATENTS, POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS
from latentdm.errors import UserError
from latentdm.finetune.base import CONDITIONS, FACTOR, FineTune
from latentdm.finetune.lora import Lora
from latentdm.finetune.objectives import TIMES, FlowMatching
from latentdm.validation import Check


class FluxFill(FineTune):
    """Fine-tunes the transformer of FLUX.1 Fill.

    It sees tokens of 2×2 latents: 64 channels of noisy latents, 64 of the masked image, and 256 of the mask, which is
    each latent's 8×8 pixels (``latent_mask="unshuffle"``). Sides are multiples of 16 pixels (``multiple=16``).

    Args:
        pretrained: as for `FineTune`.
        guidance: the guidance that the model is told in training. 1 is usual: the pipeline's 30 is for sampling.
        times: how often which share of noise is met: ``"logit_normal"`` (the middle more often) or ``"uniform"``;
            both are then shifted by the image's size as the pipeline's scheduler does.
        guidance_scale: as for `FineTune`, the pipeline's.
        settings: those of `FineTune`.

    Example:
        >>> model = FluxFill("black-forest-labs/FLUX.1-Fill-dev", lora=Lora(rank=16))  # doctest: +SKIP
        >>> Trainer(precision="bf16-mixed").fit(model, datamodule=dm)  # doctest: +SKIP
    """

    component = "transformer"
    network_class = "FluxTransformer2DModel"
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    conditions = (*CONDITIONS, POOLED_PROMPT_EMBEDS)

    def __init__(
        self,
        pretrained: str,
        lora: Lora | Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        times: str = "logit_normal",
        guidance_scale: float = 30.0,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, lora, guidance_scale=guidance_scale, **settings)
        self.guidance = Check(self.owner).number("guidance", guidance, 0)
        density = Check(self.owner).choice("times", times, TIMES)
        self.objective = FlowMatching(self.pipeline.config("scheduler"), density, self.owner)
        self.latent_channels = int(self.config.get("out_channels") or 64) // 4
        self.text_width = int(self.config["joint_attention_dim"])  # T5's
        self.pipeline_class = "FluxFillPipeline"
        expected = 4 * (2 * self.latent_channels + FACTOR**2)
        if self.config["in_channels"] != expected:
            raise UserError(
                f"{self.owner}: the transformer of {self.pipeline.source!r} takes {self.config['in_channels']} "
                f"channels, and FLUX Fill's {expected}; start from black-forest-labs/FLUX.1-Fill-dev or a model "
                "made of it"
            )

    def check_conditions(self, channels: Mapping[str, int]) -> None:
        """Raise UserError unless the encoder gives mask and masked image as this model sees them."""
        if MASKED_LATENTS not in channels or channels[LATENT_MASK] != FACTOR**2:
            raise UserError(
                f"{self.owner}: FLUX Fill sees the mask as {FACTOR**2} channels and the masked image, and the encoder "
                f"gives {', '.join(f'{name} ({count})' for name, count in channels.items())}; use encoder=inpaint "
                "encoder.latent_mask=unshuffle encoder.grow_mask_by=0 encoder.multiple=16"
            )

    def network_input(self, batch: Mapping[str, Any], noisy: Tensor, times: Tensor) -> dict[str, Any]:
        """``hidden_states`` ``b n 384``, ``timestep`` in 0…1, the guidance, the text, and where each token lies."""
        h, w = noisy.shape[-2:]
        if h % 2 or w % 2:
            raise UserError(
                f"{self.owner}: latents of {h}×{w} do not fold into tokens of 2×2; crop the images to multiples of "
                "16 pixels: encoder.multiple=16"
            )
        prompt = batch[PROMPT_EMBEDS]
        parts = [noisy, batch[MASKED_LATENTS].to(noisy.dtype), batch[LATENT_MASK].to(noisy.dtype)]
        guidance = torch.full((len(noisy),), self.guidance, device=noisy.device, dtype=torch.float32)
        return {
            "hidden_states": torch.cat([pack(part) for part in parts], dim=2),
            "timestep": times,
            "guidance": guidance if self.config.get("guidance_embeds") else None,
            "pooled_projections": batch[POOLED_PROMPT_EMBEDS],
            "encoder_hidden_states": prompt,
            "txt_ids": torch.zeros(prompt.shape[1], 3, device=prompt.device, dtype=prompt.dtype),
            "img_ids": token_positions(h // 2, w // 2).to(prompt),
        }

    def unpacked(self, output: Tensor, h: int, w: int) -> Tensor:
        """Of tokens."""
        return unpack(output, h, w)

    def sampler(self, **parts: Any) -> Any:
        """FLUX Fill's pipeline."""
        import diffusers

        # It documents that it takes latents of the masked image, and then insists on pixels.
        unchecked: dict[str, Any] = {"check_inputs": lambda *_, **__: None}
        make: Any = type("FluxFillPipeline", (diffusers.FluxFillPipeline,), unchecked)
        return make(text_encoder_2=None, tokenizer_2=None, **parts)

    def sampler_input(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The embeddings, and mask and masked image as tokens."""
        masked = batch[MASKED_LATENTS]
        return {
            "image": masked,  # from pure noise: it gives the size alone
            "masked_image_latents": torch.cat([pack(masked), pack(batch[LATENT_MASK].to(masked.dtype))], dim=2),
            PROMPT_EMBEDS: batch[PROMPT_EMBEDS],
            POOLED_PROMPT_EMBEDS: batch[POOLED_PROMPT_EMBEDS],
        }


def pack(latents: Tensor) -> Tensor:
    """``b c h w`` → ``b h/2·w/2 4c``: each token is 2×2 latents."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`: ``b h/2·w/2 4c`` → ``b c h w``."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, h // 2, w // 2), 2)


def token_positions(rows: int, columns: int) -> Tensor:
    """``rows·columns 3``: 0, row and column of each token."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
