"""Prints what a fine-tune's weights, gradients and optimizer take, computed from the shapes of the published models.

The models are built on the meta device, and nothing is downloaded. Activations are left out: they depend on the size of
the images. ``python scripts/memory_table.py sd15_inpaint`` prints the table that the
header of ``conf/experiment/sd15_inpaint.yaml`` holds; without a name all are printed.
"""

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from latentdm.finetune import FluxFill, Lora, StableDiffusion

GIB = 2**30
RANK = 16

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def clip(kind: Any = transformers.CLIPTextModel, **config: Any) -> nn.Module:
    """A text encoder of CLIP's kind."""
    return kind(transformers.CLIPTextConfig(projection_dim=config["hidden_size"], **config))  # type: ignore[no-any-return]


def t5() -> nn.Module:
    """The encoder of T5 XXL 1.1."""
    config = transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5_XXL)
    return transformers.T5EncoderModel(config)


def sd15(in_channels: int) -> tuple[nn.Module, list[nn.Module]]:
    """Stable Diffusion 1.5: its UNet, and what is frozen beside it."""
    unet = diffusers.UNet2DConditionModel(in_channels=in_channels, cross_attention_dim=768)
    return unet, [diffusers.AutoencoderKL(**VAE), clip(**CLIP_L)]


def sdxl(in_channels: int) -> tuple[nn.Module, list[nn.Module]]:
    """SDXL."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    second = clip(transformers.CLIPTextModelWithProjection, **CLIP_G)
    return unet, [diffusers.AutoencoderKL(**VAE), clip(**CLIP_L), second]


def flux_fill() -> tuple[nn.Module, list[nn.Module]]:
    """FLUX.1 Fill [dev]."""
    transformer = diffusers.FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
    vae = diffusers.AutoencoderKL(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **VAE)
    return transformer, [vae, clip(**CLIP_L), t5()]


EXPERIMENTS: dict[str, tuple[Callable[[], tuple[nn.Module, list[nn.Module]]], Any]] = {
    "sd15_inpaint": (lambda: sd15(9), StableDiffusion),
    "sd15_to_inpaint": (lambda: sd15(9), StableDiffusion),
    "sdxl_inpaint": (lambda: sdxl(9), StableDiffusion),
    "sdxl_plain": (lambda: sdxl(4), StableDiffusion),
    "flux_fill": (flux_fill, FluxFill),
}
"""Experiment → makes the denoiser and the frozen networks, and its LightningModule."""


def count(module: nn.Module, trained: bool = False) -> int:
    """Numbers in a module's weights."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad or not trained)


def table(experiment: str) -> list[str]:
    """The lines of an experiment's table, in GiB.

    Args:
        experiment: a name of `EXPERIMENTS`.
    """
    make, model = EXPERIMENTS[experiment]
    with torch.device("meta"):
        network, frozen = make()
        whole = count(network)
        Lora(rank=RANK).add_to(network, model.lora_targets, model.__name__)
    adapter = count(network, trained=True)
    beside = 2 * sum(map(count, frozen))
    # bytes: frozen weights in bfloat16, trained ones, their gradients and AdamW's two moments in float32 (8 bits: one
    # byte each)
    rows = {
        "all weights, float32": (4 * whole, 4 * whole, 8 * whole),
        "all weights, optimizer=adamw_8bit": (4 * whole, 4 * whole, 2 * whole),
        f"lora.rank={RANK}, bf16-mixed": (2 * whole + 4 * adapter, 4 * adapter, 8 * adapter),
    }
    if experiment == "sd15_to_inpaint":  # which is not for a LoRA
        rows.popitem()
    lines = [
        f"Memory in GiB, computed from {whole / 1e6:.0f} million weights"
        f" (a LoRA of rank {RANK}: {adapter / 1e6:.1f}), without activations:",
        f"{'':36}weights  gradients  optimizer    frozen      sum",
    ]
    if experiment == "sd15_to_inpaint":
        lines[0] = f"Memory in GiB, computed from {whole / 1e6:.0f} million weights, without activations:"
    for name, parts in rows.items():
        weights, gradients, optimizer, others, total = (part / GIB for part in (*parts, beside, sum(parts) + beside))
        lines.append(f"  {name:34}{weights:7.2f}{gradients:11.2f}{optimizer:11.2f}{others:10.2f}{total:9.2f}")
    return [
        *lines,
        "Frozen are VAE and text encoders, in bfloat16.",
    ]


def main() -> None:
    """Print the tables that are named, or all."""
    for experiment in sys.argv[1:] or EXPERIMENTS:
        print("\n".join([experiment, *(f"# {line}" for line in table(experiment)), ""]))


if __name__ == "__main__":
    main()
