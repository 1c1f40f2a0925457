"""Inpainting does not depend on the family: every factor, against the original nodes or a loop over pixels."""

import json
from pathlib import Path

import pytest
import torch
from pipelines import pipeline
from safetensors import safe_open
from tiny_models import CONFIGS, FACTORS, build, close, frozen, pictures, signed

from latentdm import FrozenVAE, InpaintEncoder

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*inpaint*.safetensors"))
FLUX2_OF_8 = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
FACTOR_8 = {name: {} for name in CONFIGS if name not in FACTORS} | {"flux2": FLUX2_OF_8}


@pytest.mark.parametrize("name", FACTOR_8)
def test_golden_inpainting_with_every_family_of_factor_8(name):
    autoencoder = build(CONFIGS[name] | FACTOR_8[name])
    seen = []
    encode = autoencoder.encode
    autoencoder.encode = lambda x: seen.append(x) or encode(x)
    vae = FrozenVAE(autoencoder, dtype="float32")
    assert vae.spatial_compression == 8
    assert len(GOLDEN) == 12
    for case in GOLDEN:
        with safe_open(case, "pt") as file:
            settings = json.loads(file.metadata()["settings"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings.pop("node")
        pixels, b = tensors["pixels"].movedim(-1, 1), len(tensors["pixels"])
        seen.clear()
        encoded = InpaintEncoder(vae, **settings)({"pixels": pixels, "mask": tensors["mask"]})
        images = torch.cat(seen)
        images = images.squeeze(2) if images.ndim == 5 else images
        masked = images[b:, :3]
        torch.testing.assert_close(masked, 2 * tensors["vae_pixels"].movedim(-1, 1) - 1, rtol=0, atol=1e-6)
        assert torch.equal(encoded["noise_mask"], tensors["noise_mask"].expand(b, -1, -1, -1))
        assert encoded["masked_latents"].shape == (b, *vae.latent_shape(masked.shape[-2:]))


LARGE = {
    "flux2": (16, CONFIGS["flux2"]),
    "wan22": (16, CONFIGS["wan22"]),
    "hunyuan_image": (32, CONFIGS["hunyuan_image"] | {"block_out_channels": [32] * 6, "spatial_compression_ratio": 32}),
}


@pytest.mark.parametrize(("r", "config"), LARGE.values(), ids=LARGE)
def test_inpainting_with_larger_factors_equals_a_naive_one(r, config):
    autoencoder = build(config)
    seen = []
    encode = autoencoder.encode
    autoencoder.encode = lambda x: seen.append(x) or encode(x)
    vae = FrozenVAE(autoencoder, dtype="float32")
    height, width = 2 * r + 5, 3 * r - 1
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, height, width)
    mask[..., 9:20, 12:17] = 1
    mask[..., -3:, -5:] = 1

    # A loop over pixels: crop, fill with the rounded mask, grow by a window of 5 (2 back, 2 forward).
    h, w = height // r * r, width // r * r
    top, left = (height - h) // 2, (width - w) // 2
    grown = torch.zeros(h, w)
    filled = torch.zeros(3, h, w)
    for y in range(h):
        for x in range(w):
            window = [
                mask[0, 0, top + v, left + u]
                for v in range(max(y - 2, 0), min(y + 3, h))
                for u in range(max(x - 2, 0), min(x + 3, w))
            ]
            grown[y, x] = float(max(window) > 0.5)
            inside = mask[0, 0, top + y, left + x] > 0.5
            filled[:, y, x] = 0.5 if inside else pixels[0, :, top + y, left + x] / 255

    for kind in ("nearest", "unshuffle"):
        seen.clear()
        encoded = InpaintEncoder(vae, grow_mask_by=5, latent_mask=kind)({"pixels": pixels, "mask": mask})
        image = torch.cat(seen).reshape(2, 3, h, w)
        torch.testing.assert_close(image[1], 2 * filled - 1, rtol=0, atol=1e-6)
        assert torch.equal(encoded["noise_mask"][0, 0], grown)
        assert encoded["latents"].shape == (1, vae.latent_channels, h // r, w // r)
        expected = torch.stack([grown[v::r, u::r] for v in range(r) for u in range(r)])
        expected = expected if kind == "unshuffle" else expected[:1]
        assert torch.equal(encoded["latent_mask"][0], expected)


def test_flux_fill_packs_the_same_masked_latents_and_mask():
    """FLUX.1 Fill's own preparation, packed; ours packed as it packs."""
    vae, pixels = frozen("kl_shift"), pictures(2, 32, 48)
    mask = torch.zeros(2, 1, 32, 48)
    mask[0, :, 3:20, 7:30] = 1
    mask[1, :, 10:30, 1:9] = 1
    encoder = InpaintEncoder(vae, mask_offset=0, latent_mask="unshuffle", posterior="mode")
    ours = encoder({"pixels": pixels, "mask": mask})
    masked = signed(pixels) * (1 - mask)
    methods = ("prepare_mask_latents", "_pack_latents")
    path = "flux/pipeline_flux_fill.py"
    pipe = pipeline(path, "FluxFillPipeline", *methods, vae=build("kl_shift"), vae_scale_factor=8)
    packed_mask, packed = pipe.prepare_mask_latents(mask, masked, 2, 4, 1, 32, 48, torch.float32, "cpu", None)
    assert torch.equal(pipe._pack_latents(ours["latent_mask"], 2, 64, 4, 6), packed_mask)
    close(pipe._pack_latents(ours["masked_latents"], 2, 4, 4, 6), packed)
