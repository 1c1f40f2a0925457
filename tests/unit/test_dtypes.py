"""In which dtype a frozen autoencoder computes, and what happens to a sample that does not fit in it."""

import math
from typing import ClassVar

import pytest
import torch
from helpers import complains, no_warnings, tiny_kl
from tiny_models import CONFIGS, build, close, frozen, pictures
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentdm import FrozenVAE, InpaintEncoder, PlainEncoder
from latentdm.autoencoders.images import Images

BAD = 5
NO_UPCAST = {"force_upcast": False}


def overflowing():
    """A KL whose first convolution adds up brightness: beyond float16 for a white image, far below for gray ones."""
    model = build(CONFIGS["kl"] | NO_UPCAST)
    model.encoder.conv_in.weight[0] = 65504 / 20  # of 27 taps
    model.encoder.conv_in.weight[0, 0, 0, 0] /= 2
    return model


def gray_images(count=8):
    return 0.45 + 0.1 * pictures(count)


def with_a_white_one():
    images = gray_images()
    images[BAD] = 1
    return images


# ---------------------------------------------------------------- overflow


def test_the_white_image_does_overflow():
    latents = overflowing().half().encode((2 * with_a_white_one() - 1).half()).latent_dist.mean
    assert latents.isfinite().flatten(1).all(1).tolist() == [row != BAD for row in range(8)]


@pytest.mark.parametrize("per_batch", [None, 4, 3, 1])
def test_eight_finite_latents_seven_with_the_same_bits_and_one_as_in_float32(per_batch):
    vae = FrozenVAE(overflowing(), dtype="float16")
    encoder, batch = PlainEncoder(vae, per_batch=per_batch), {"index": torch.arange(100, 108)}
    with no_warnings():
        expected = encoder(batch | {"pixels": gray_images()})["latents"]
    with pytest.warns(UserWarning, match=r"sample 105 \(latents\) are not finite in float16; encoded again in float32"):
        encoded = encoder(batch | {"pixels": with_a_white_one()})["latents"]
    assert vae.reencoded == 1
    assert encoded.isfinite().all()
    # The same chunk shapes without the white image, whose row holds a gray one.
    others = [row for row in range(8) if row != BAD]
    assert torch.equal(encoded[others], expected[others])
    alone = {"pixels": with_a_white_one()[BAD : BAD + 1], "index": torch.tensor([105])}
    close(encoded[BAD], PlainEncoder(FrozenVAE(overflowing(), dtype="float32"))(alone)["latents"][0])


def test_the_warning_says_which_of_an_inpainting_pair():
    vae = FrozenVAE(overflowing(), dtype="float16")
    mask = torch.ones(8, 1, 32, 48)  # all gray, so that only the clean image overflows
    encoder = InpaintEncoder(vae, mask_offset=0, per_batch=3)
    ids = ["a", "b", "c", "d", "e", "seven", "g", "h"]
    with pytest.warns(UserWarning, match=r"sample seven \(latents\)") as warned:
        encoded = encoder({"pixels": with_a_white_one(), "mask": mask, "index": ids})
    assert len(warned) == vae.reencoded == 1
    assert encoded["latents"].isfinite().all()
    mask[BAD] = 0
    with pytest.warns(UserWarning, match="not finite in float16") as warned:
        encoder({"pixels": with_a_white_one(), "mask": mask, "index": ids})
    assert [str(warning.message).split(" are ")[0].split(" of ")[1] for warning in warned] == [
        "sample seven (latents)",
        "sample seven (masked_latents)",
    ]
    assert vae.reencoded == 3


def test_encode_by_itself_names_the_row_and_counts():
    vae = FrozenVAE(overflowing(), dtype="float16")
    white = with_a_white_one()
    for turn in (1, 2):
        with pytest.warns(UserWarning, match="row 5"):
            assert vae.encode(white, posterior="mode").isfinite().all()
        assert vae.reencoded == turn


def test_a_sample_is_encoded_again_in_inference_mode_as_well():
    vae = FrozenVAE(overflowing(), dtype="float16")
    with torch.inference_mode(), pytest.warns(UserWarning, match="row 5"):
        encoded = vae.encode(with_a_white_one(), posterior="mode")
    with pytest.warns(UserWarning, match="row 5"):
        expected = vae.encode(with_a_white_one(), posterior="mode")
    close(encoded, expected, 1e-3)


def test_the_weights_as_they_came_make_the_second_attempt():
    """Not those that were rounded to float16 for the first."""
    model = overflowing()
    vae = FrozenVAE(model, dtype="float16")
    with pytest.warns(UserWarning, match="row 0"):
        encoded = vae.encode(torch.ones(1, 3, 32, 32), posterior="mode")
    exact, rounded = (
        FrozenVAE(weights, dtype="float32").encode(torch.ones(1, 3, 32, 32), posterior="mode")
        for weights in (overflowing(), overflowing().half().float())
    )
    close(encoded, exact)
    with pytest.raises(AssertionError):
        close(encoded, rounded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_sample_that_is_not_finite_in_float32_either_is_an_error_that_names_it(dtype):
    model = overflowing()
    model.encoder.conv_in.weight[0] = 1e38 / 2
    vae = FrozenVAE(model, dtype=dtype)
    with complains("sample 7 (latents)", "not finite in float32", "AutoencoderKL"):
        PlainEncoder(vae)({"pixels": torch.ones(1, 3, 32, 32), "index": torch.tensor([7])})
    assert vae.reencoded == 0


@pytest.mark.parametrize(("dtype", "attempts"), [("float16", 2), ("float32", 1)])
def test_float32_is_not_tried_twice(dtype, attempts):
    model = overflowing()
    model.encoder.conv_in.weight[0] = 1e38 / 2
    sizes = []
    encode = type(model).encode

    class Counted(type(model)):
        def encode(self, x):
            sizes.append((len(x), x.dtype))
            return encode(self, x)

    model.__class__ = Counted
    with complains("row 0"):
        FrozenVAE(model, dtype=dtype).encode(torch.ones(1, 3, 32, 48))
    assert sizes == [(1, getattr(torch, dtype)), (1, torch.float32)][:attempts]


def test_looking_costs_one_wait_for_the_device():
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    vae = FrozenVAE(overflowing(), dtype="float16")
    pixels = gray_images()
    vae.encode(pixels)
    with Waits() as waits:
        vae.moments([Images(pixels)], per_batch=2)
    assert waits.count == 1


# ---------------------------------------------------------------- which dtype


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_device_computes_in_it(native, monkeypatch):
    monkeypatch.setattr("latentdm.frozen.weights.computes_bfloat16", lambda device: native)
    assert FrozenVAE(tiny_kl()).dtype == (torch.bfloat16 if native else torch.float32)
    assert FrozenVAE(PlainModule()).dtype == torch.float32  # as it came


class PlainModule(nn.Module):
    spatial_compression = 8
    latent_channels = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, x):
        raise NotImplementedError


@pytest.mark.parametrize("dtype", ["float64", "bf16", "half", ""])
def test_an_unknown_dtype_is_an_error_with_the_choices(dtype):
    with complains("auto, float32, bfloat16, float16", repr(dtype)):
        FrozenVAE(tiny_kl(), dtype=dtype)


def test_float16_warns_where_the_config_asks_for_float32():
    with pytest.warns(UserWarning, match="AutoencoderKL sets force_upcast.*use bfloat16"):
        FrozenVAE(tiny_kl(force_upcast=True), dtype="float16")
    with no_warnings():
        FrozenVAE(tiny_kl(force_upcast=False), dtype="float16")
        FrozenVAE(tiny_kl(force_upcast=True), dtype="bfloat16")
        FrozenVAE(tiny_kl(force_upcast=True), dtype="auto").to("cpu")
        FrozenVAE(build("tiny"), dtype="float16")
        FrozenVAE(PlainModule(), dtype="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_near_to_float32(name, dtype):
    config = CONFIGS[name] | (NO_UPCAST if CONFIGS[name]["_class_name"] == "AutoencoderKL" else {})
    vae, pixels = FrozenVAE(build(config), dtype=dtype), pictures()
    encoded, expected = vae.encode(pixels, posterior="mode"), frozen(name).encode(pixels, posterior="mode")
    assert vae.dtype == getattr(torch, dtype)
    assert encoded.dtype == torch.float32
    assert encoded.is_contiguous()
    error = (encoded - expected).norm() / expected.norm()
    assert 0 < error < (0.08 if dtype == "bfloat16" else 0.02)
    assert vae.decode(encoded).dtype == torch.float32


def test_statistics_are_float32_whatever_the_autoencoder_computes_in():
    z = torch.tensor(0.123456789).expand(1, 4, 1, 1)
    config = CONFIGS["kl_statistics"] | NO_UPCAST
    normalized = [FrozenVAE(build(config), dtype=dtype).normalize(z) for dtype in ("float32", "bfloat16", "float16")]
    close(normalized[1], normalized[0])
    close(normalized[2], normalized[0])


@pytest.mark.parametrize("name", ["kl", "kl_shift", "flux2"])
def test_latents_in_half_precision_are_scaled_in_float32(name):
    vae = frozen(name)
    z = torch.randn(2, vae.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scale in (vae.normalize, vae.denormalize):
        assert scale(z).dtype == torch.float32
        close(scale(z), scale(z.float()))


def test_autocast_does_not_reach_the_autoencoder():
    vae, pixels = frozen("kl"), pictures()
    expected = vae.encode(pixels, posterior="mode")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vae.encode(pixels, posterior="mode"), expected)
        images = vae.decode(expected)
    assert torch.equal(images, vae.decode(expected))


# ---------------------------------------------------------------- where the weights are


def test_a_rounding_cast_is_made_on_a_copy():
    model = build(CONFIGS["kl"] | NO_UPCAST)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    vae = FrozenVAE(model, dtype="bfloat16")
    assert {weight.dtype for weight in vae.module.parameters()} == {torch.bfloat16}
    assert vae.module is not model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert FrozenVAE(model, dtype="float32").module is model


def test_the_copy_goes_to_the_device_and_the_weights_stay():
    model = build(CONFIGS["kl"] | NO_UPCAST)
    vae = FrozenVAE(model, dtype="float16").to("meta")
    assert vae.device.type == "meta"
    assert vae.dtype == torch.float16
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_no_whole_copy_lies_between_the_weights_and_the_device():
    """Casting the module before moving it, or the other way round, would take its memory twice."""

    class Copies(TorchDispatchMode):
        devices: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                self.devices.append((result.device.type, result.dtype))
            return result

    vae = FrozenVAE(build(CONFIGS["kl"] | NO_UPCAST), dtype="float16")
    with Copies() as copies:
        vae.to("meta")
    assert set(copies.devices) == {("meta", torch.float16)}


@pytest.mark.parametrize("name", ["kl", "wan", "flux2"])
def test_only_half_precision_images_are_laid_out_channels_last(name):
    config = CONFIGS[name] | (NO_UPCAST if name == "kl" else {})
    for dtype in ("float32", "bfloat16"):
        vae = FrozenVAE(build(config), dtype=dtype)
        weights = [w for w in vae.module.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1]
        last = dtype == "bfloat16" and name != "wan"
        assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in weights)


def test_nothing_trains():
    model = build("kl").train().requires_grad_(True)
    vae = FrozenVAE(model, dtype="float32")
    assert not any(weight.requires_grad for weight in vae.module.parameters())
    assert not any(module.training for module in vae.module.modules())
    assert not vae.encode(pictures().requires_grad_(True)).requires_grad


# ---------------------------------------------------------------- without the decoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_decoder_can_be_dropped_without_changing_latents(name, dtype):
    pixels = pictures()
    whole, half = FrozenVAE(build(name), dtype=dtype), FrozenVAE(build(name), dtype=dtype, encoder_only=True)
    close(half.encode(pixels), whole.encode(pixels), 1e-6 if dtype == "float32" else 0.02)
    assert size(half) < 0.75 * size(whole)
    assert not any(key.startswith(("decoder", "post_quant", "quantize")) for key in half.module.state_dict())
    assert whole.can_decode
    assert not half.can_decode
    with complains("FrozenVAE.decode", "encoder_only: false"):
        half.decode(half.encode(pixels))


def test_clips_are_encoded_without_the_decoder():
    clip = pictures(1, frames=5)
    for name in ("qwen_image", "wan"):
        half = FrozenVAE(build(name), dtype="float32", encoder_only=True)
        close(half.encode(clip), frozen(name).encode(clip))


def size(vae):
    return sum(math.prod(weight.shape) for weight in vae.module.parameters())


def test_decode_gives_back_the_range_of_images():
    vae = frozen("kl")
    images = vae.decode(30 * vae.encode(pictures()))
    assert images.min() == 0 or images.max() == 1
    close(images, images.clamp(0, 1))
