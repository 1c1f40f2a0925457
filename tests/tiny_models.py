"""A tiny real model of every family that `FrozenVAE` knows: random weights, deterministic, nothing constant."""

import diffusers
import torch

from latentdm import FrozenVAE

MEAN = [0.31, -0.2, 0.05, 0.4]
STD = [0.9, 1.7, 0.6, 1.2]
FOUR = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
}
KL = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "scaling_factor": 0.18215, **FOUR}
VIDEO_SIZE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": MEAN,
    "latents_std": STD,
}
DC_TYPES = ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"]
VQ = {"_class_name": "VQModel", "block_out_channels": [8, 8, 8, 16], "num_vq_embeddings": 16, **FOUR}

CONFIGS = {
    "kl": KL,
    "kl_fp16": KL | {"scaling_factor": 0.13025, "force_upcast": False},
    "kl_statistics": KL | {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5, "shift_factor": 9.0},
    "kl_shift": KL
    | {"shift_factor": 0.1159, "scaling_factor": 0.3611, "use_quant_conv": False, "use_post_quant_conv": False},
    "asymmetric": {
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_out_channels": [8, 8, 8, 16],
        "up_block_out_channels": [8, 16, 16, 16],
        **FOUR,
    },
    "tiny": {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [8] * 4,
        "decoder_block_out_channels": [8] * 4,
        "num_encoder_blocks": [1] * 4,
        "num_decoder_blocks": [1] * 4,
    },
    "dc": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 8,
        "attention_head_dim": 8,
        "encoder_block_out_channels": [8, 8, 8, 16],
        "decoder_block_out_channels": [8, 8, 8, 16],
        "encoder_block_types": DC_TYPES,
        "decoder_block_types": DC_TYPES,
        "encoder_layers_per_block": [1] * 4,
        "decoder_layers_per_block": [1] * 4,
        "encoder_qkv_multiscales": [[], [], [], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5]],
        "scaling_factor": 0.41407,
    },
    "flux2": {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [8, 8, 8, 16],
        "layers_per_block": 1,
        "latent_channels": 4,
        **FOUR,
    },
    "qwen_image": {"_class_name": "AutoencoderKLQwenImage", **VIDEO_SIZE},
    "qwen_image_layered": {"_class_name": "AutoencoderKLQwenImage", "input_channels": 4, **VIDEO_SIZE},
    "qwen_image21": {
        "_class_name": "AutoencoderKLQwenImage21",
        "decoder_base_dim": 8,
        **VIDEO_SIZE,
        "dim_mult": [1, 1, 1, 1, 1],
    },
    "wan": {"_class_name": "AutoencoderKLWan", **VIDEO_SIZE},
    "wan22": {
        "_class_name": "AutoencoderKLWan",
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        **VIDEO_SIZE,
    },
    "hunyuan_image": {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32] * 4,
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "sample_size": 64,
        "scaling_factor": 0.75289,
    },
    "vq": VQ,
    "movq": VQ | {"norm_type": "spatial", "block_out_channels": [32] * 4, "latent_channels": 4},
}
"""Name → a diffusers config. Every family at least once, and the variants that are normalised otherwise."""

STAND_INS = {
    "sd15": "kl",
    "sdxl": "kl",
    "sdxl_fp16_fix": "kl_fp16",
    "sd3": "kl_shift",
    "flux": "kl_shift",
    "flux2": "flux2",
    "flux_fill": "kl_shift",
    "sana": "dc",
    "qwen_image": "qwen_image",
    "wan": "wan",
    "hunyuan_image": "hunyuan_image",
    "taesd": "tiny",
    "taesdxl": "tiny",
}
"""Preset of conf/vae → a tiny model of the same class: the repositories themselves are out of reach of a test."""

VIDEO = [
    name for name, config in CONFIGS.items() if config["_class_name"] in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
]
FACTORS = {"flux2": 16, "qwen_image21": 16, "wan22": 16}
"""Of those whose factor is not 8."""


def build(config, seed=0):
    """The model of a config, or of a name above, in eval mode; all its weights are random."""
    config = CONFIGS[config] if isinstance(config, str) else config
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(diffusers, config["_class_name"]).from_config(dict(config)).eval()
        for weight in model.parameters():  # so that biases and gains are neither zero nor one
            weight.add_(0.03 * torch.randn_like(weight))
        for name, statistic in model.named_buffers():  # Flux 2's batch norm
            if name.endswith("running_mean"):
                statistic.normal_()
            if name.endswith("running_var"):
                statistic.uniform_(0.2, 3)
    return model.requires_grad_(False)


def pictures(count=2, height=32, width=48, frames=None, seed=3):
    """``count 3 height width`` (with frames ``count 3 frames height width``) float32 in 0…1."""
    size = (height, width) if frames is None else (frames, height, width)
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def signed(pixels):
    """As diffusers' image processor normalises."""
    return 2.0 * pixels - 1.0


def frozen(name, **config):
    """The tiny model of a name above, some of its config changed, as a FrozenVAE in float32."""
    return FrozenVAE(build(CONFIGS[name] | config), dtype="float32")


def close(ours, theirs, tolerance=1e-6):
    """Equal up to a relative error of the whole tensor."""
    assert ours.shape == theirs.shape
    assert torch.linalg.vector_norm(ours - theirs) <= tolerance * torch.linalg.vector_norm(theirs)


def stand_in(preset, folder):
    """Writes the stand-in of a preset into a folder, as ``save_pretrained`` does."""
    build(STAND_INS[preset]).save_pretrained(folder)
    return folder
