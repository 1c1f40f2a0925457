"""Writes docs/autoencoders.md from the table of families: ``python docs/autoencoders.py``."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from latentdm.autoencoders import Family, Normalization, known_families

HERE = Path(__file__).parent
PRESETS = HERE.parent / "conf" / "vae"

# The configs of the published models, as far as they shape the network and scale its latents.
STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SIXTEEN_CHANNELS = STABLE_DIFFUSION | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX = SIXTEEN_CHANNELS | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION | {"scaling_factor": 0.13025},
    "sdxl_fp16_fix": STABLE_DIFFUSION | {"scaling_factor": 0.13025, "force_upcast": False},
    "sd3": SIXTEEN_CHANNELS | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": FLUX,
    "flux_fill": FLUX,
    "flux2": {"_class_name": "AutoencoderKLFlux2"},
    "sana": {
        "_class_name": "AutoencoderDC",
        "encoder_block_types": DC_BLOCKS,
        "decoder_block_types": DC_BLOCKS,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    "qwen_image": {"_class_name": "AutoencoderKLQwenImage"},
    "wan": {"_class_name": "AutoencoderKLWan"},
    "hunyuan_image": {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "layers_per_block": 2,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
        "scaling_factor": 0.75289,
    },
    "taesd": {"_class_name": "AutoencoderTiny"},
    "taesdxl": {"_class_name": "AutoencoderTiny"},
    "tiny": json.loads((HERE.parent / "latentdm" / "demo_vae" / "config.json").read_text(encoding="utf-8")),
}
"""Preset → config."""
OTHERS: dict[str, dict[str, Any]] = {
    "cross-attention/asymmetric-autoencoder-kl-x-1-5": {
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "down_block_out_channels": [128, 256, 512, 512],
        "layers_per_down_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "up_block_out_channels": [192, 384, 768, 768],
        "layers_per_up_block": 3,
    },
    "Qwen/Qwen-Image-2.1": {"_class_name": "AutoencoderKLQwenImage21"},
    "kandinsky-community/kandinsky-2-2-decoder (movq)": {
        "_class_name": "VQModel",
        "block_out_channels": [128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16384,
        "norm_type": "spatial",
    },
}
"""Repository without a preset → config."""

TEXT = """<!-- Written by `python docs/autoencoders.py`; edit that. -->
# Autoencoders

`vae=sdxl` on the command line, or `FrozenVAE.from_pretrained("stabilityai/sdxl-vae")`: the class that the config names
is loaded, and its latents are scaled as the pipeline of its family scales them: in float32 bit for bit (Wan's to 1e-6,
as its pipeline multiplies by 1 / std).

{table}

`z` is what encode gives. Factor: pixels a latent along one side, and for video families frames a latent frame. Memory:
the weights in float32, half of it in bfloat16 and float16; `encoder_only: true` leaves the decoder out. What the
activations take comes on top, and grows with the image and with `per_batch`.

## Where a model comes from

`source` is a hub id (with `revision` and `subfolder`), a folder written by `save_pretrained`, a whole pipeline (its
`vae` is taken), or a single `.safetensors` file with its `config.json` beside it or named with `config`. Files in the
format of an original release (whole Stable Diffusion checkpoints too) are converted where diffusers can. A key that is
missing, left over or of another size is an error. Pickled weights (`.bin`) are loaded with `use_safetensors: false`,
files such as `diffusion_pytorch_model.fp16.safetensors` with `variant: fp16`.

## dtype

`auto` is bfloat16 where the device computes in it natively, else float32; `float32`, `bfloat16` and `float16` are taken
at their word. Where a config sets `force_upcast`, as AutoencoderKL's does by default, `float16` warns. Latents and
statistics are float32 always. A sample whose latents come out NaN or infinite is encoded again alone in float32 from
the weights as they were stored, with a warning that names it; `FrozenVAE.reencoded` counts them. If that is not finite
either, the error names the sample. The other samples keep their bits.

## Images, clips, posteriors

An image batch `b c h w` gives `b z h/r w/r`, of a video family too, which takes it as clips of one frame. Clips
`b c f h w` go through `encoder=plain` and give `b z f' h/r w/r`: `f = 1 + t·n` frames give `f' = 1 + n`. Another number
is an error, because diffusers would drop the frames left over. Masks have no frames, so `encoder=inpaint` takes images.

Families without a posterior give the same latents for `posterior: sample` (the default) and `mode`; an encoder that was
set to `mode` warns that this has no effect.

## Not in the table

- ConsistencyDecoderVAE: its encoder is Stable Diffusion 1.5's own. Train on `vae=sd15`, and decode with what you like.
- AutoencoderRAE: resizes every image to one size, so that it has no factor, and its encoder needs transformers.
- AutoencoderKLKVAE: no pipeline of diffusers says how its latents are scaled.
- AutoencoderKLHunyuanImageRefiner: its pipeline folds frames into channels for a model that refines finished images.
- The other video and audio autoencoders.

One call adds a class:

```python
from latentdm import register_family
from latentdm.autoencoders import Family, Normalization

register_family(
    MyAutoencoder,
    Family(
        spatial_compression=lambda autoencoder: 8,
        latent_channels=lambda autoencoder: autoencoder.config.latent_channels,
        normalization=lambda autoencoder: Normalization(mean=0.1, scale=autoencoder.config.scaling_factor),
    ),
)
```

A module that is no diffusers class needs no entry if `encode` takes images in −1…1: see `latentdm.FrozenVAE`.
"""


def main() -> None:
    """Write the page."""
    (HERE / "autoencoders.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page as it should be."""
    families = known_families()
    head = ["class", "preset", "factor", "channels", "a model trains on", "encoder, MiB", "decoder, MiB"]
    rows = [[f"`vae={name}`: {source_of(name)}", config] for name, config in CONFIGS.items()]
    rows += [[name, config] for name, config in OTHERS.items()]
    rows.sort(key=lambda row: list(families).index(row[1]["_class_name"]))
    missing = set(families) - {config["_class_name"] for _, config in rows}
    assert not missing, f"no config of {missing}"
    lines = [head, ["---"] * 3 + ["---:"] + ["---"] + ["---:"] * 2]
    lines += [cells(preset, config, families[config["_class_name"]]) for preset, config in rows]
    return TEXT.replace("{table}", "\n".join("| " + " | ".join(line) + " |" for line in lines))


def cells(preset: str, config: dict[str, Any], family: Family) -> list[str]:
    """A row of the table; the network is built without its weights."""
    with torch.device("meta"):
        autoencoder = getattr(diffusers, config["_class_name"]).from_config(config)
    factor = str(family.spatial_compression(autoencoder))
    if family.temporal_compression is not None:
        factor += f", frames {family.temporal_compression(autoencoder)}"
    decoder = sum(mebibytes(getattr(autoencoder, part)) for part in family.decoder_parts if has(autoencoder, part))
    return [
        config["_class_name"],
        preset,
        factor,
        str(family.latent_channels(autoencoder)),
        formula(family.normalization(autoencoder), family.patch(autoencoder)),
        f"{mebibytes(autoencoder) - decoder:.0f}",
        f"{decoder:.0f}",
    ]


def source_of(preset: str) -> str:
    """The repository that a preset names."""
    return str(OmegaConf.load(PRESETS / f"{preset}.yaml").source)


def formula(normalization: Normalization, patch: int) -> str:
    """How latents are scaled, in figures where a figure does for all channels."""
    text = "z" if patch == 1 else f"z in patches of {patch}×{patch}"
    if isinstance(normalization.mean, float) and normalization.mean:
        text = f"({text} − {normalization.mean:g})"
    elif normalization.mean is not None and not isinstance(normalization.mean, float):
        origin = "of its batch norm" if isinstance(normalization.mean, Tensor) else "of its config"
        return f"({text} − mean) / std a channel, {origin}"
    return text if normalization.scale in (None, 1) else f"{text} · {normalization.scale:g}"


def has(autoencoder: Any, part: str) -> bool:
    """Whether a part is there; post_quant_conv may be None."""
    return isinstance(getattr(autoencoder, part, None), nn.Module)


def mebibytes(module: nn.Module) -> float:
    """The weights of a module in float32."""
    return 4 * sum(weight.numel() for weight in (*module.parameters(), *module.buffers())) / 2**20


if __name__ == "__main__":
    main()
