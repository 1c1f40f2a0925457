"""FrozenVAE around an AutoencoderKL: the numbers of diffusers, frozen, and invisible to whoever holds it."""

import pickle

import pytest
import torch
from helpers import RecordingAutoencoder, complains, images, noise_vae, tiny_kl
from lightning.pytorch import LightningModule
from tiny_models import close

from latentdm import FrozenVAE, PlainEncoder
from latentdm.frozen.weights import computes_bfloat16

CONFIGS = {
    "SD": {"scaling_factor": 0.18215},
    "Flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "mean and std": {"scaling_factor": 0.5, "latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (1.0, 2.0, 0.5, 3.0)},
}
configs = pytest.mark.parametrize("config", CONFIGS)


def by_hand(config, z):
    """What the pipelines do to a latent."""
    if "latents_mean" in config:
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (z - mean) * config["scaling_factor"] / std
    return (z - config.get("shift_factor", 0)) * config["scaling_factor"]


@configs
def test_the_mode_is_diffusers_own(config):
    autoencoder = tiny_kl(**CONFIGS[config])
    pixels = images(2) / 255
    with torch.no_grad():
        expected = by_hand(CONFIGS[config], autoencoder.eval().encode(pixels * 2 - 1).latent_dist.mode())
    close(FrozenVAE(autoencoder, dtype="float32").encode(pixels, posterior="mode"), expected)


@configs
def test_a_sample_is_mean_plus_std_times_the_noise(config):
    autoencoder = tiny_kl(**CONFIGS[config])
    pixels, noise = images(2) / 255, torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = autoencoder.eval().encode(pixels * 2 - 1).latent_dist
    encoded = FrozenVAE(autoencoder, dtype="float32").encode(pixels, noise=noise)
    close(encoded, by_hand(CONFIGS[config], posterior.mean + posterior.std * noise))


def test_samples_vary_by_image_and_call_and_repeat_in_another_run():
    def calls():
        vae = noise_vae()
        return torch.cat([vae.encode(images(2) / 255) for _ in range(2)])

    latents = calls()
    assert torch.unique(latents, dim=0).shape == latents.shape
    assert torch.equal(latents, calls())


@configs
def test_denormalize_undoes_normalize(config):
    vae = FrozenVAE(tiny_kl(**CONFIGS[config]))
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z)
    assert not torch.allclose(vae.normalize(z), z)


@configs
def test_decode_is_diffusers_own_clamped_to_images(config):
    autoencoder = tiny_kl(**CONFIGS[config])
    vae = FrozenVAE(autoencoder, dtype="float32")
    latents = vae.encode(images(2, 32, 48) / 255, posterior="mode") * 30  # large enough to leave the range
    decoded = vae.decode(latents)
    with torch.no_grad():
        expected = autoencoder.decode(vae.denormalize(latents)).sample / 2 + 0.5
    assert decoded.shape == (2, 3, 32, 48)
    assert decoded.dtype == torch.float32
    assert expected.min() < 0 < 1 < expected.max()
    torch.testing.assert_close(decoded, expected.clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("levels", "r"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_the_factor_follows_the_levels(levels, r):
    autoencoder = tiny_kl(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=3,
    )
    vae = FrozenVAE(autoencoder)
    assert (vae.spatial_compression, vae.latent_channels) == (r, 3)
    assert vae.encode(images(1, 16, 24) / 255).shape == (1, 3, 16 // r, 24 // r)


# -------------------------------------------------------------------- frozen


def test_it_is_frozen_and_gives_no_graph():
    autoencoder = tiny_kl().train()
    vae = FrozenVAE(autoencoder)
    assert not any(parameter.requires_grad for parameter in vae.module.parameters())
    assert not any(module.training for module in vae.module.modules())
    latents = vae.encode((images(1) / 255).requires_grad_())
    assert not latents.requires_grad
    assert not vae.decode(latents.requires_grad_()).requires_grad


def test_a_model_that_holds_one_does_not_register_its_weights(vae):
    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.vae = vae

    model = Model().double()
    assert not list(model.parameters())
    assert not model.state_dict()
    assert vae.dtype == torch.float32


# -------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_weights_and_latents_stay_float32(dtype):
    vae = FrozenVAE(tiny_kl(force_upcast=False), dtype=dtype)
    assert vae.dtype == getattr(torch, dtype)
    assert vae.encode(images(1) / 255, posterior="mode").dtype == torch.float32


def test_auto_is_bfloat16_where_the_device_computes_in_it():
    native = computes_bfloat16(torch.device("cpu"))
    assert FrozenVAE(tiny_kl()).dtype == (torch.bfloat16 if native else torch.float32)


def test_auto_leaves_a_plain_module_its_dtype():
    assert FrozenVAE(RecordingAutoencoder()).dtype == torch.float32


def test_bfloat16_agrees_with_float32_as_far_as_it_goes():
    pixels = images(4) / 255
    exact, rounded = (FrozenVAE(tiny_kl(), dtype=d).encode(pixels, posterior="mode") for d in ("float32", "bfloat16"))
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_a_cast_leaves_the_caller_s_weights():
    autoencoder = tiny_kl()
    FrozenVAE(autoencoder, dtype="bfloat16").encode(images(1) / 255)
    assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.float32}


def test_statistics_stay_float32_in_a_bfloat16_vae():
    vae = FrozenVAE(tiny_kl(scaling_factor=0.18215), dtype="bfloat16")
    close(vae.normalize(torch.ones(1, 4, 1, 1)), torch.full((1, 4, 1, 1), 0.18215))  # bfloat16 would be off by 1e-3


# -------------------------------------------------------------------- what is wrong is said


def test_from_config_draws_its_weights_from_its_seed():
    config = {**tiny_kl().config, "_class_name": "AutoencoderKL"}
    first, again, other = (FrozenVAE.from_config(config, seed=s, dtype="float32") for s in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in vae.module.parameters()]) for vae in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_dtype_is_named():
    with complains("FrozenVAE: dtype must be one of auto, float32, bfloat16, float16", "got 'fp16'"):
        FrozenVAE(tiny_kl(), dtype="fp16")


def test_what_is_no_autoencoder_is_named():
    with complains("FrozenVAE: Linear has no encode method", "pass a diffusers autoencoder", error=TypeError):
        FrozenVAE(torch.nn.Linear(1, 1))
    with complains("FrozenVAE: str is no torch.nn.Module", "FrozenVAE.from_pretrained", error=TypeError):
        FrozenVAE("stabilityai/sdxl-vae")


WRONG_PIXELS = {
    "channels": (torch.rand(1, 4, 32, 32), ["b 3 h w", "(1, 4, 32, 32)"]),
    "rank": (torch.rand(3, 32, 32), ["b 3 h w", "(3, 32, 32)"]),
    "multiple": (torch.rand(1, 3, 32, 30), ["32×30", "multiple", "8", "crop"]),
    "dtype": (torch.full((1, 3, 32, 32), 255), ["uint8 in 0…255 or float in 0…1", "int64"]),
    "empty": (torch.rand(0, 3, 32, 32), ["the batch is empty"]),
}


@pytest.mark.parametrize("case", WRONG_PIXELS)
def test_wrong_pixels_are_named(case, vae):
    pixels, parts = WRONG_PIXELS[case]
    with complains("FrozenVAE.encode: ", *parts):
        vae.encode(pixels)


def test_an_unknown_posterior_is_named(vae):
    with complains("FrozenVAE.encode: posterior must be one of sample, mode, got 'mean'"):
        vae.encode(images(1) / 255, posterior="mean")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_s_default_dtype_changes_nothing(dtype):
    """Lightning's bf16-true makes bfloat16 the default within steps."""
    vae, pixels = FrozenVAE(tiny_kl(), dtype=dtype), images(2)
    batch = {"pixels": pixels, "index": torch.arange(2)}
    expected = vae.encode(pixels / 255, noise=torch.ones(2, 4, 4, 4)), PlainEncoder(vae)(batch)["latents"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoded = vae.encode(pixels.float() / 255, noise=torch.ones(2, 4, 4, 4, dtype=torch.float32))
        assert torch.equal(encoded, expected[0])
        assert torch.equal(PlainEncoder(vae)(batch)["latents"], expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_autoencoder_without_weights_is_where_it_was_put():
    class Pooling(torch.nn.Module):
        spatial_compression = 8
        latent_channels = 3

        def encode(self, x):
            raise NotImplementedError

    vae = FrozenVAE(Pooling()).to("meta")
    assert vae.device.type == "meta"
    assert vae.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_kl, RecordingAutoencoder])
def test_it_can_be_sent_to_another_process(make):
    vae = FrozenVAE(make(), dtype="float32")
    sent = pickle.loads(pickle.dumps(vae))
    pixels = images(2) / 255
    close(sent.encode(pixels, posterior="mode"), vae.encode(pixels, posterior="mode"))


def test_pixels_in_another_range_are_named():
    for pixels, remedy in ((images(1) / 127.5 - 1, "(x + 1) / 2"), (images(1).float(), "divide by 255")):
        with complains("FrozenVAE.encode: pixels: floats must lie in 0…1", remedy):
            FrozenVAE(tiny_kl()).encode(pixels)
    FrozenVAE(tiny_kl()).encode(images(1) / 254.99999)  # what a resize rounds


def test_what_is_where_it_should_be_is_not_walked_through_again():
    """Each batch by hand asks for it."""
    vae = FrozenVAE(tiny_kl(), dtype="bfloat16").to("cpu")
    vae.module.to = None  # to call it would fail
    assert vae.to("cpu").device.type == "cpu"
