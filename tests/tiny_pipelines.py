"""Random pipelines of the very classes that the fine-tunes are for, small enough to be made and saved in a test."""

import diffusers
import torch
from helpers import tiny_kl
from lightning.pytorch import LightningDataModule
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "photo", "of", "the", "cat", "dog", "house", "red")
"""What the tokenizers know whole; they spell everything else."""

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LENGTH = 24
"""Tokens of the CLIP encoders; real ones have 77."""


def clip_tokenizer():
    """Byte pairs, as CLIP's: every byte, and the merges that lead to a few words."""
    letters = sorted(ByteLevel.alphabet())
    pieces, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], [parts[0] + parts[1], *parts[2:]]
            if tuple(pair) not in merges:
                merges.append(tuple(pair))
                pieces.append(parts[0])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def t5_tokenizer():
    """A unigram model of letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_text(tokenizer, kind=CLIPTextModel, width=16, **config):
    """A random text encoder of CLIP's kind."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **config,
        )
    ).eval()


def t5_text(tokenizer, width=24):
    """A random encoder of T5's kind."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config).eval()


def unet(in_channels, width, **config):
    """A random UNet with attention to text of ``width`` channels."""
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=config.pop("attention_head_dim", 4),
        **config,
    )


def sure_vae(**config):
    """A tiny AutoencoderKL whose posterior has next to no width, so that a draw from it is its mean to 1e-6."""
    vae = tiny_kl(**config)
    half = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[:half] *= 8
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -30
    return vae


def stable_diffusion(in_channels, prediction_type="epsilon"):
    """SD 1.5 (9 channels: its inpainting model), or 2 with ``v_prediction``."""
    tokenizer = clip_tokenizer()
    kind = diffusers.StableDiffusionInpaintPipeline if in_channels == 9 else diffusers.StableDiffusionPipeline
    return kind(
        vae=sure_vae(scaling_factor=0.18215),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(in_channels, 16),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(in_channels, **settings):
    """SDXL (9 channels: its inpainting model)."""
    tokenizer = clip_tokenizer()
    kind = diffusers.StableDiffusionXLInpaintPipeline if in_channels == 9 else diffusers.StableDiffusionXLPipeline
    return kind(
        vae=sure_vae(scaling_factor=0.13025),
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, CLIPTextModelWithProjection, width=24, hidden_act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            in_channels,
            40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
        **settings,
    )


def flux_fill():
    """FLUX Fill: 64 + 64 + 256 channels of packed latents, masked latents and mask."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxFillPipeline(
        vae=sure_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_text(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


PIPELINES = {
    "sd15": lambda: stable_diffusion(4),
    "sd15_inpaint": lambda: stable_diffusion(9),
    "sd2": lambda: stable_diffusion(4, "v_prediction"),
    "sdxl": lambda: sdxl(4),
    "sdxl_inpaint": lambda: sdxl(9),
    "flux_fill": flux_fill,
}
"""Name → makes the pipeline."""

EXPERIMENTS = {
    "sd15_inpaint": "sd15_inpaint",
    "sdxl_inpaint": "sdxl_inpaint",
    "flux_fill": "flux_fill",
    "sd15_to_inpaint": "sd15",
    "sdxl_plain": "sdxl",
}
"""Experiment → the pipeline that stands in for the one that it names."""


def tiny_pipeline(name, seed=0):
    """A pipeline of a name above, with weights that leave nothing at zero or one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        pipeline = PIPELINES[name]()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
                if component is not pipeline.vae:
                    for weight in component.parameters():
                        weight.add_(0.05 * torch.randn_like(weight))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(name, folder, seed=0):
    """Write one as ``save_pretrained`` does, and return the folder."""
    tiny_pipeline(name, seed).save_pretrained(folder)
    return folder


def experiment_stand_in(overrides, workplace):
    """Overrides that point the experiment among some at its tiny pipeline; the photographs get captions.

    The repositories that the experiments name are out of reach of a test, and its many steps to a sample too many.
    """
    chosen = [override.removeprefix("experiment=") for override in overrides if override.startswith("experiment=")]
    if not chosen:
        return []
    for photo in (workplace / "photos").glob("*.png"):
        if not photo.stem.endswith("-mask"):
            photo.with_suffix(".txt").write_text(f"a photo of the {photo.stem}", encoding="utf-8")
    folder = save_pipeline(EXPERIMENTS[chosen[0]], workplace / "pretrained")
    return [f"model.pretrained={folder}", "model.sampling_steps=2"]


def photographs(count, height, width, seed=5):
    """uint8 ``count 3 height width``, and uint8 masks ``count 1 height width`` of a box each."""
    from helpers import images

    masks = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        mask[:, 9 + number : 41, 13 : 50 - 2 * number] = 255
    return images(count, height, width, seed=seed), masks


def ready_batch(folder, count=3, height=64, width=96, inpaint=True, captions=None, **encoder):
    """A batch as the data module hands it to the model, and the frozen VAE and text encoder that made it."""
    from latentdm import FrozenVAE, InpaintEncoder, PlainEncoder, TextEncoder
    from latentdm.draws import Draws

    pixels, masks = photographs(count, height, width)
    vae = FrozenVAE.from_pretrained(folder, dtype="float32")
    text = TextEncoder.from_pretrained(folder, dtype="float32")
    batch = {"pixels": pixels, "caption": captions or [f"a photo of the {word}" for word in WORDS[-count:]]}
    batch |= {"index": torch.arange(count)}
    if inpaint:
        # chunks of the batch's size, as the pipelines encode: torch takes other kernels for other sizes
        encode = InpaintEncoder(vae, grow_mask_by=0, per_batch=count, **encoder)
        batch["mask"] = masks
    else:
        encode = PlainEncoder(vae, **encoder)
    draws = Draws(0, 0, list(range(count)))
    tokens = text.tokenizer(batch, draws)
    sizes = {
        "original_size": torch.tensor([[300, 400 + row] for row in range(count)]),
        "crop_top_left": torch.tensor([[3 * row, 5] for row in range(count)]),
        "target_size": torch.tensor([[height, width]] * count),
    }
    return encode(batch) | text(batch | tokens, draws) | sizes, encode, text


class Ready(LightningDataModule):
    """Hands out one batch again and again, with what a model asks of a latentdm.LatentDataModule."""

    def __init__(self, batch, encoder, text, length=4):
        super().__init__()
        self.batch, self.encoder, self.text, self.length = batch, encoder, text, length

    @property
    def channels(self):
        return self.encoder.channels

    def train_dataloader(self):
        return DataLoader([self.batch] * self.length, batch_size=None)

    val_dataloader = predict_dataloader = train_dataloader


def ready(folder, length=4, **batch):
    """The data module of `ready_batch`."""
    return Ready(*ready_batch(folder, **batch), length=length)


def model_of(name, folder, **settings):
    """The fine-tune of a pipeline above."""
    from latentdm.finetune import FluxFill, StableDiffusion

    return (FluxFill if name == "flux_fill" else StableDiffusion)(str(folder), **settings)
