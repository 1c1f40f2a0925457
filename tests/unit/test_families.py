"""Each family against diffusers' own pipelines: what they encode, how they scale it, what they decode."""

import pytest
import torch
import torch.nn.functional as F
from helpers import complains, no_warnings
from pipelines import (
    decoded_by_pipeline,
    flux,
    flux2,
    hunyuan_image,
    kandinsky,
    qwen_image,
    qwen_image21,
    qwen_image_layered,
    sana,
    sdxl,
    sdxl_with_statistics,
    stable_diffusion,
    stable_diffusion_3,
    wan,
    with_opaque_alpha,
)
from tiny_models import CONFIGS, FACTORS, VIDEO, build, close, frozen, pictures, signed

from latentdm import FrozenVAE, PlainEncoder
from latentdm.autoencoders import known_families

NO_POSTERIOR = ("tiny", "dc", "vq", "movq")


# ---------------------------------------------------------------- encode as the pipelines do


PIPELINES = [
    ("kl", stable_diffusion),
    ("kl", sdxl),
    ("kl_fp16", sdxl),
    ("kl_statistics", sdxl_with_statistics),
    ("kl_shift", stable_diffusion_3),
    ("kl_shift", flux),
    ("asymmetric", stable_diffusion),
    ("tiny", stable_diffusion),
    ("tiny", flux),
    ("dc", sana),
    ("flux2", flux2),
    ("qwen_image", qwen_image),
    ("qwen_image_layered", qwen_image_layered),
    ("qwen_image21", qwen_image21),
    ("wan", wan),
    ("wan22", wan),
    ("hunyuan_image", hunyuan_image),
    ("vq", kandinsky),
    ("movq", kandinsky),
]
every_pipeline = pytest.mark.parametrize(
    ("name", "theirs"), PIPELINES, ids=lambda value: getattr(value, "__name__", value)
)
every_model = pytest.mark.parametrize("name", CONFIGS)


def without_frame(latents, pixels):
    return latents.squeeze(2) if latents.ndim == 5 and pixels.ndim == 4 else latents


def test_every_family_is_compared_with_a_pipeline():
    assert {CONFIGS[name]["_class_name"] for name, _ in PIPELINES} == set(known_families())
    assert {name for name, _ in PIPELINES} == set(CONFIGS)


@every_pipeline
def test_the_mode_is_what_the_pipeline_encodes(name, theirs):
    autoencoder, pixels = build(name), pictures()
    expected = without_frame(theirs(autoencoder, signed(pixels)), pixels)
    encoded = FrozenVAE(build(name), dtype="float32").encode(pixels, posterior="mode")
    assert expected.std() > 1e-3
    assert not torch.allclose(encoded[0], encoded[1], rtol=1e-2)
    close(encoded, expected)


@every_pipeline
def test_uint8_images_lose_nothing_on_their_way(name, theirs):
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    expected = without_frame(theirs(build(name), signed(images.float() / 255)), images)
    encoded = quiet_encoder(name)({"pixels": images})["latents"]
    close(encoded, expected)


def quiet_encoder(name):
    """In the mode; a family without a posterior would say that this has no effect."""
    return PlainEncoder(frozen(name), posterior="sample" if name in NO_POSTERIOR else "mode")


@every_pipeline
def test_a_sample_is_what_the_pipeline_draws_with_the_same_noise(name, theirs):
    if name in NO_POSTERIOR:
        pytest.skip("no posterior")
    autoencoder, pixels = build(name), pictures(1)
    expected = theirs(autoencoder, signed(pixels), generator=torch.Generator().manual_seed(7), posterior="sample")
    vae = FrozenVAE(build(name), dtype="float32")
    raw = autoencoder.encode(prepared(vae, name, pixels)).latent_dist.mean
    noise = without_frame(torch.randn(raw.shape, generator=torch.Generator().manual_seed(7)), pixels)
    if name == "flux2":
        noise = F.pixel_unshuffle(noise, 2)
    close(vae.encode(pixels, noise=noise), without_frame(expected, pixels))
    assert not torch.equal(vae.encode(pixels, noise=noise), vae.encode(pixels, posterior="mode"))


def prepared(vae, name, pixels):
    """What the autoencoder itself takes."""
    image = with_opaque_alpha(signed(pixels)) if name in ("qwen_image_layered", "qwen_image21") else signed(pixels)
    return image.unsqueeze(2) if name in VIDEO or name == "qwen_image21" else image


# ---------------------------------------------------------------- decode, and back


@every_model
def test_decode_is_the_pipelines(name):
    vae = FrozenVAE(build(name), dtype="float32")
    latents = vae.encode(pictures(), posterior="mode")
    expected = decoded_by_pipeline(name, build(name), latents)
    expected = expected.squeeze(2) if expected.ndim == 5 else expected
    images = vae.decode(latents)
    assert images.shape == pictures().shape
    assert images.std() > 0.01
    close(images, expected)


@every_model
def test_denormalize_undoes_normalize(name):
    vae = frozen(name)
    z = 3 * torch.randn(2, vae.latent_channels, 3, 5, generator=torch.Generator().manual_seed(1)) + 1
    close(vae.denormalize(vae.normalize(z)), z)
    if name not in ("tiny", "vq", "movq"):
        assert not torch.allclose(vae.normalize(z), z)


def test_statistics_need_both_mean_and_std():
    """As SDXL's pipeline, which scales as usual when one of them is missing."""
    image = pictures()
    for config in ({"latents_mean": [0.5] * 4}, {"latents_std": [2.0] * 4}):
        config = CONFIGS["kl"] | config
        expected = sdxl_with_statistics(build(config), signed(image))
        torch.testing.assert_close(FrozenVAE(build(config), dtype="float32").encode(image, posterior="mode"), expected)


# ---------------------------------------------------------------- factors


@every_model
def test_factors_are_those_that_encode_shows(name):
    vae, autoencoder = frozen(name), build(name)
    pixels = pictures(1, 64, 96)
    encoded = vae.encode(pixels)
    r = vae.spatial_compression
    assert r == FACTORS.get(name, 8)
    assert encoded.shape == (1, vae.latent_channels, 64 // r, 96 // r)
    assert encoded.shape[1:] == vae.latent_shape((64, 96))
    assert vae.temporal_compression == (4 if name in VIDEO else None)
    assert vae.class_name == type(autoencoder).__name__
    assert vae.has_posterior == (name not in NO_POSTERIOR)


ONE_BLOCK = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
THREE_BLOCKS = {
    "block_out_channels": [8, 8, 16],
    "layers_per_block": [1] * 3,
    "block_types": "ResBlock",
    "qkv_multiscales": [[]] * 3,
}
OTHER_LAYOUTS = {
    "kl": (1, ONE_BLOCK),
    "dc": (4, {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in THREE_BLOCKS.items()}),
    "qwen_image": (4, {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}),
    "hunyuan_image": (32, {"block_out_channels": [32] * 6, "spatial_compression_ratio": 32}),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_other_layouts_have_other_factors(name):
    r, config = OTHER_LAYOUTS[name]
    vae = frozen(name, **config)
    assert vae.spatial_compression == r
    assert vae.encode(pictures(1, 32, 64)).shape[-2:] == (32 // r, 64 // r)


@every_model
def test_a_size_below_the_factor_is_an_error(name):
    vae = frozen(name)
    r = vae.spatial_compression
    with complains("PlainEncoder", f"{r - 1}×{r}", f"factor {r}"):
        PlainEncoder(vae)({"pixels": torch.zeros(1, 3, r - 1, r, dtype=torch.uint8)})
    with complains("FrozenVAE.encode", f"{r}×{r + 1}", f"factor {r}"):
        vae.encode(torch.zeros(1, 3, r, r + 1))


def test_flux2_takes_square_patches_only():
    with complains("AutoencoderKLFlux2", "2×1"):
        FrozenVAE(build(CONFIGS["flux2"] | {"patch_size": [2, 1]}))


# ---------------------------------------------------------------- posterior


@pytest.mark.parametrize("name", NO_POSTERIOR)
def test_families_without_a_posterior_give_the_same_for_both_settings(name):
    vae, pixels = frozen(name), pictures()
    assert torch.equal(vae.encode(pixels, posterior="sample"), vae.encode(pixels, posterior="mode"))
    with no_warnings():
        PlainEncoder(vae)({"pixels": pixels})
    with pytest.warns(UserWarning, match=f"PlainEncoder: posterior=mode has no effect: {vae.class_name}"):
        PlainEncoder(vae, posterior="mode")
    lazy = PlainEncoder(lambda: vae, posterior="mode")
    with pytest.warns(UserWarning, match="has no effect"):
        lazy({"pixels": pixels})
    with no_warnings():
        lazy({"pixels": pixels})


def test_families_with_a_posterior_take_either_setting_quietly():
    with no_warnings():
        encoder = PlainEncoder(frozen("kl"), posterior="mode")
    assert encoder.vae.has_posterior
