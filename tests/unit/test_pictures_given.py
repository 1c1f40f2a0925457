"""Pictures as people have them: another range of floats, single ones, PIL images, arrays, several sizes."""

import re

import numpy
import pytest
import torch
from helpers import Photos, complains, images, masks, photo_columns
from PIL import Image

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder


@pytest.fixture
def encoder(vae):
    return PlainEncoder(vae, posterior="mode")


# -------------------------------------------------------------------- floats of another range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pixel_range", [[-1, 1], (-1.0, 1.0)])
def test_floats_of_another_range_are_declared(pixel_range, dtype, encoder):
    pixels = images(2)
    declared = LatentDataModule(Photos(photo_columns()), encoder, pixel_range=pixel_range)
    batch = {"pixels": (pixels / 127.5 - 1).to(dtype), "source": (pixels / 127.5 - 1).to(dtype)}
    got = declared.process(batch, "cpu")
    expected = encoder({"pixels": pixels, "source": pixels})
    for name in ("latents", "source_latents"):
        # bfloat16 rounds values near 1 by up to half an 8-bit level
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(declared.process({"pixels": pixels}, "cpu")["latents"], expected["latents"])  # uint8 has one


def test_a_range_is_never_guessed(encoder):
    signed = images(2) / 127.5 - 1
    with complains("floats must lie in 0…1, got -1…1", "pixel_range=[-1, 1]", "(x + 1) / 2"):
        LatentDataModule(Photos(photo_columns()), encoder).process({"pixels": signed}, "cpu")
    declared = LatentDataModule(Photos(photo_columns()), encoder, pixel_range=[-1, 1])
    for wrong in (images(2).float(), signed * 2.1, signed * torch.nan):
        with complains("LatentDataModule: pixels: floats must lie in −1…1 (pixel_range), got "):
            declared.process({"pixels": wrong}, "cpu")
    for wrong in ((0, 255), (1, -1), (0, 1, 2), ()):
        with complains(f"LatentDataModule: pixel_range must be [0, 1] or [-1, 1], got {list(wrong)}"):
            LatentDataModule(Photos(photo_columns()), encoder, pixel_range=wrong)


# -------------------------------------------------------------------- by hand: the advice is code that works


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


ONE = images(1)
GIVEN = {
    "PIL image": pil(ONE[0]),
    "PIL palette": pil(ONE[0]).convert("P"),
    "array": ONE[0].permute(1, 2, 0).numpy(),
    "array, channels first": ONE[0].numpy(),
    "array of some": ONE.permute(0, 2, 3, 1).numpy(),
    "array of some, channels first": ONE.numpy(),
    "tensor": ONE[0],
    "list of tensors": [ONE[0]],
    "list of PIL images": [pil(ONE[0])],
    "list of arrays": [ONE[0].permute(1, 2, 0).numpy()],
    "tuple of arrays": (ONE[0].numpy(),),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_advice_for_what_is_no_batch_of_images_is_code_that_works(kind, encoder):
    given = GIVEN[kind]
    with pytest.raises(ValueError, match="pixels: expected a tensor of shape b c H W, got ") as caught:
        encoder({"pixels": given})
    code = re.search(r"(?:convert it: |a batch axis: |stack them: )(.*)$", str(caught.value))[1]
    made = eval(code, {"torch": torch, "numpy": numpy, "images": given})
    assert made.shape == (1, 3, 32, 32)
    if "palette" not in kind:
        assert torch.equal(made, ONE)
    assert encoder({"pixels": made})["latents"].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_given_instead_of_a_dict_is_told_both(kind, encoder, vae):
    for given_to in (encoder, lambda given: LatentDataModule(Photos(photo_columns()), encoder).encode(given, "cpu")):
        with complains("expected a dict, as in {'pixels': images}, got "):
            given_to(GIVEN[kind])
    with complains("FrozenVAE.encode: expected pixels of shape b 3 h w, got "):
        vae.encode(GIVEN[kind])


def test_a_mask_of_another_kind_is_told_too(vae):
    encoder = InpaintEncoder(vae)
    with complains(
        "InpaintEncoder: mask: expected a tensor of shape b 1 H W or b H W, got (32, 32) uint8", "mask[None]"
    ):
        encoder({"pixels": ONE, "mask": masks(1)[0, 0]})
    with complains("InpaintEncoder: mask: expected a tensor", "got Image"):
        encoder({"pixels": ONE, "mask": pil(ONE[0]).convert("L")})


# -------------------------------------------------------------------- several sizes

WAYS_OUT = ("of images of different sizes", "pixels.size", "pixels=folder_buckets", "batch_size=1")
SIZES = [images(1)[0], images(1, 40, 40)[0]]


@pytest.mark.parametrize("kind", [lambda image: image, pil, lambda image: image.permute(1, 2, 0).numpy()])
def test_images_of_different_sizes_name_the_ways_out(kind, encoder):
    pictures = [kind(image) for image in SIZES]
    datamodule = LatentDataModule(Photos(photo_columns()), encoder)
    with complains("batch['pixels']: expected a tensor of shape b c H W, got list", *WAYS_OUT):
        datamodule.process({"pixels": pictures}, "cpu")
    with complains("expected a dict, as in {'pixels': images}, got list", *WAYS_OUT):
        datamodule.process(pictures, "cpu")
    with complains("PlainEncoder: pixels: expected a tensor", *WAYS_OUT):
        encoder({"pixels": pictures})


# -------------------------------------------------------------------- a module of one's own


class Own(torch.nn.Module):
    """Somebody's autoencoder; its weights are float64."""

    def __init__(self, **settings):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 8, stride=8, dtype=torch.float64)
        for name, value in settings.items():
            setattr(self, name, value)

    def encode(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(latents=self.conv(x.to(self.conv.weight.dtype)))


class Config:
    scaling_factor = 0.5
    shift_factor = 0.25


CONFIGS = {
    "none": None,
    "dict": {"scaling_factor": 0.5, "shift_factor": 0.25},
    "object": Config(),
    "class": Config,
    "empty": {},
    "of something else": "a path",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_module_of_ones_own_keeps_its_dtype_and_is_scaled_as_its_config_says(name):
    config = CONFIGS[name]
    own = Own() if config is None else Own(config=config)
    vae = FrozenVAE(own).to("cpu")
    assert vae.dtype == torch.float64
    plain = own.encode(images(1) / 127.5 - 1).latents
    scaled = (plain - 0.25) * 0.5 if name in ("dict", "object", "class") else plain
    torch.testing.assert_close(vae.encode(images(1) / 255), scaled.float(), rtol=1e-5, atol=1e-5)


def test_the_config_of_a_module_of_ones_own_warns_of_overflow_too():
    for config in ({"force_upcast": True}, type("Config", (), {"force_upcast": True})()):
        with pytest.warns(UserWarning, match="sets force_upcast"):
            FrozenVAE(Own(config=config), dtype="float16")
