"""The encoders by themselves, as in a notebook: what they give, in which chunks, and what they refuse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import RecordingAutoencoder, complains, images, masks, noise_vae, tiny_kl
from tqdm.auto import tqdm

from latentdm import FrozenVAE, InpaintEncoder, PlainEncoder

ENCODERS = {"plain": PlainEncoder, "inpaint": InpaintEncoder}
both = pytest.mark.parametrize("kind", ENCODERS)
CHUNKS = (1, 2, 3, 5, 9, 16)


def batch_of(count, height=32, width=32, **more):
    return {"pixels": images(count, height, width), "mask": masks(count, height, width), **more}


def indexed(count):
    return batch_of(count, index=torch.arange(count))


# -------------------------------------------------------------------- what goes in, what comes out


def test_plain_adds_latents_and_leaves_the_rest(vae):
    batch = batch_of(3, caption=["a", "b", "c"])
    encoded = PlainEncoder(vae)(batch)
    assert set(encoded) == {"mask", "caption", "latents"}
    assert encoded["mask"] is batch["mask"]
    assert encoded["latents"].shape == (3, 4, 4, 4)


def test_inpaint_gives_the_keys_of_the_table(vae):
    batch = batch_of(3, 40, 32, caption=["a", "b", "c"])
    encoded = InpaintEncoder(vae)(batch)
    shapes = {name: tuple(value.shape) for name, value in encoded.items() if name != "caption"}
    assert shapes == {
        "latents": (3, 4, 5, 4),
        "masked_latents": (3, 4, 5, 4),
        "noise_mask": (3, 1, 40, 32),
        "latent_mask": (3, 1, 5, 4),
    }
    assert encoded["caption"] is batch["caption"]
    assert set(batch) == {"pixels", "mask", "caption"}  # the caller's own is not touched


@both
def test_latents_are_those_of_the_vae(kind, vae):
    batch = batch_of(3)
    encoded = ENCODERS[kind](vae, posterior="mode")(batch)
    expected = vae.encode(batch["pixels"] / 255, posterior="mode")
    torch.testing.assert_close(encoded["latents"], expected, rtol=0, atol=1e-5)


def test_the_masked_image_is_gray_under_the_rounded_mask_and_untouched_elsewhere(recorder, recording_vae):
    batch = batch_of(2)
    InpaintEncoder(recording_vae, grow_mask_by=9)(batch)
    clean, masked = recorder.pixels.chunk(2)
    inside = (batch["mask"] > 127).expand_as(clean)
    assert torch.equal(masked[inside], torch.zeros_like(masked[inside]))  # mid-gray in −1…1
    torch.testing.assert_close(masked[~inside], clean[~inside], rtol=0, atol=1e-6)
    np.testing.assert_allclose(clean.numpy(), batch["pixels"].numpy() / 127.5 - 1, rtol=0, atol=1e-6)


def test_an_offset_moves_the_fill_as_well(recorder, recording_vae):
    batch = batch_of(2)
    encoded = InpaintEncoder(recording_vae, mask_offset=3)(batch)
    _, masked = recorder.pixels.chunk(2)
    inside = encoded["noise_mask"].bool().expand_as(masked)
    assert inside.sum() == 2 * 3 * (9 + 6) * (12 + 6)
    assert not masked[inside].any()


def test_grow_mask_by_is_six_unless_told(recording_vae):
    assert torch.equal(
        *(InpaintEncoder(recording_vae, **options)(batch_of(2))["noise_mask"] for options in ({}, {"grow_mask_by": 6}))
    )


@pytest.mark.parametrize(("channels", "expected"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_gray_is_repeated_and_alpha_dropped(channels, expected, recorder, recording_vae):
    pixels = images(2, channels=channels)
    PlainEncoder(recording_vae)({"pixels": pixels})
    torch.testing.assert_close(recorder.pixels, pixels[:, expected] / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_floats_of_any_dtype_are_taken_at_their_value(dtype, recorder, recording_vae):
    pixels = (images(2) / 255).to(dtype)
    PlainEncoder(recording_vae)({"pixels": pixels})
    torch.testing.assert_close(recorder.pixels, pixels.float() * 2 - 1, rtol=0, atol=1e-6)


def test_image_and_mask_are_cropped_alike_to_the_centre(recorder, recording_vae):
    pixels, mask = images(1, 45, 39), masks(1, 45, 39)
    encoded = InpaintEncoder(recording_vae, grow_mask_by=0)({"pixels": pixels, "mask": mask})
    window = (..., slice(2, 42), slice(3, 35))
    torch.testing.assert_close(recorder.pixels[:1], pixels[window] / 127.5 - 1, rtol=0, atol=1e-6)
    assert torch.equal(encoded["noise_mask"], mask[window] / 255)


MASK_FORMS = {
    "b 1 H W": lambda m: m,
    "b H W": lambda m: m[:, 0],
    "bool": lambda m: m > 127,
    "float": lambda m: m / 255,
    "half": lambda m: (m / 255).half(),
    "zeros and ones": lambda m: m // 255,
    "twice the size": lambda m: m.repeat_interleave(2, -1).repeat_interleave(2, -2),
}


@pytest.mark.parametrize("form", MASK_FORMS)
def test_every_form_of_a_mask_is_the_same_mask(form, recording_vae):
    batch = batch_of(3)
    encoder = InpaintEncoder(recording_vae, grow_mask_by=0)
    formed = encoder(batch | {"mask": MASK_FORMS[form](batch["mask"])})
    assert torch.equal(formed["noise_mask"], batch["mask"] / 255)


def test_one_mask_serves_every_image_in_the_output_too(recorder, recording_vae):
    batch = batch_of(3)
    one = InpaintEncoder(recording_vae)(batch | {"mask": batch["mask"][1:2]})
    assert torch.equal(one["noise_mask"], one["noise_mask"][:1].repeat(3, 1, 1, 1))
    assert one["latent_mask"].shape[0] == 3
    inside = (batch["mask"][1:2] > 127).expand(3, 3, -1, -1)
    assert not recorder.pixels[3:][inside].any()


# -------------------------------------------------------------------- the mask at latent resolution


def latent_mask(how, mask):
    """A batch's ``noise_mask`` and ``latent_mask`` for a mask that is not moved."""
    pixels = images(len(mask), *mask.shape[-2:])
    encoder = InpaintEncoder(FrozenVAE(RecordingAutoencoder()), grow_mask_by=0, latent_mask=how)
    encoded = encoder({"pixels": pixels, "mask": mask})
    return encoded["noise_mask"], encoded["latent_mask"]


def scattered_masks(count=3, height=48, width=40, share=0.03):
    return torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(3)) < share


def tiles(mask, r=8):
    """``b 1 h w`` → ``b h/r w/r r r``, by hand."""
    b, _, h, w = mask.shape
    return mask.reshape(b, h // r, r, w // r, r).permute(0, 1, 3, 2, 4)


def test_nearest_is_what_stable_diffusion_s_inpainting_pipeline_does():
    noise_mask, small = latent_mask("nearest", scattered_masks(share=0.5))
    assert torch.equal(small, F.interpolate(noise_mask, size=(48 // 8, 40 // 8)))


def test_area_is_the_masked_share_of_each_latent():
    noise_mask, small = latent_mask("area", scattered_masks())
    torch.testing.assert_close(small[:, 0], tiles(noise_mask).sum((-2, -1)) / 64)


def test_max_marks_a_latent_with_any_masked_pixel():
    noise_mask, small = latent_mask("max", scattered_masks(share=0.01))
    assert torch.equal(small[:, 0].bool(), tiles(noise_mask).bool().flatten(-2).any(-1))
    assert 0 < small.mean() < 1


def test_unshuffle_is_the_packing_of_flux_fill():
    noise_mask, small = latent_mask("unshuffle", scattered_masks())
    # Flux Fill: view (b, h, r, w, r) → permute (0, 2, 4, 1, 3) → (b, r·r, h, w)
    b, _, height, width = noise_mask.shape
    packed = noise_mask[:, 0].view(b, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3)
    assert torch.equal(small, packed.reshape(b, 64, height // 8, width // 8))


def test_channels_tell_a_model_what_it_may_concatenate(vae):
    assert PlainEncoder(vae).channels == {"latents": 4}
    for how, channels in {"nearest": 1, "unshuffle": 64}.items():
        encoder = InpaintEncoder(vae, latent_mask=how)
        encoded = encoder(batch_of(1))
        assert encoder.channels == {name: encoded[name].shape[1] for name in encoder.channels}
        assert encoder.channels["latent_mask"] == channels


# -------------------------------------------------------------------- chunks


@both
def test_per_batch_does_not_change_the_result(kind, vae):
    whole = ENCODERS[kind](vae)(indexed(5))
    for per_batch in CHUNKS:
        chunked = ENCODERS[kind](vae, per_batch=per_batch)(indexed(5))
        for name in set(whole) & {"latents", "masked_latents", "noise_mask", "latent_mask"}:
            torch.testing.assert_close(chunked[name], whole[name], rtol=0, atol=1e-5, msg=f"{name} of {per_batch}")


@both
def test_per_batch_does_not_change_a_bit_of_the_noise(kind):
    whole = ENCODERS[kind](noise_vae())(indexed(5))
    assert whole["latents"].std() > 0.8
    for per_batch in CHUNKS:
        chunked = ENCODERS[kind](noise_vae(), per_batch=per_batch)(indexed(5))
        for name in set(whole) & {"latents", "masked_latents"}:
            assert torch.equal(chunked[name], whole[name])


@pytest.mark.parametrize(
    ("kind", "per_batch", "expected"),
    [
        ("plain", None, [5]),
        ("plain", 2, [2, 2, 1]),
        ("plain", 16, [5]),
        ("inpaint", None, [10]),  # the clean and the masked images in one pass
        ("inpaint", 4, [4, 4, 2]),  # a chunk may hold both
        ("inpaint", 3, [3, 3, 3, 1]),
    ],
)
def test_chunks_hold_at_most_per_batch_images(kind, per_batch, expected, recorder, recording_vae):
    ENCODERS[kind](recording_vae, per_batch=per_batch)(indexed(5))
    assert [len(chunk) for chunk in recorder.seen] == expected


def test_chunks_keep_images_and_their_masks_together(recording_vae):
    one_pass, chunked = (InpaintEncoder(recording_vae, per_batch=n)(indexed(5)) for n in (None, 2))
    for name in ("latents", "masked_latents"):
        assert torch.equal(one_pass[name], chunked[name])


def test_the_clean_and_the_masked_image_draw_noise_of_their_own():
    encoded = InpaintEncoder(noise_vae())(indexed(2))
    assert not torch.equal(encoded["latents"], encoded["masked_latents"])


def test_progress_shows_a_bar_only_when_asked(monkeypatch, capsys, recording_vae):
    at_once = lambda *args, **options: tqdm(*args, **(options | {"delay": 0}))  # noqa: E731
    monkeypatch.setattr("latentdm.frozen.chunks.tqdm", at_once)
    for progress in (False, True):
        PlainEncoder(recording_vae, per_batch=2, progress=progress)(indexed(5))
        assert ("encode" in capsys.readouterr().err) == progress


# -------------------------------------------------------------------- what is wrong is said


WRONG_SETTINGS = {
    "per_batch 0": ({"per_batch": 0}, ["per_batch", "at least 1", "got 0", "null"]),
    "per_batch -1": ({"per_batch": -1}, ["per_batch", "at least 1", "got -1"]),
    "per_batch 2.5": ({"per_batch": 2.5}, ["per_batch", "integer", "got 2.5"]),
    "per_batch True": ({"per_batch": True}, ["per_batch", "integer", "got True"]),
    "posterior": ({"posterior": "mean"}, ["posterior must be one of sample, mode", "got 'mean'"]),
}
WRONG_INPAINT_SETTINGS = {
    "grow 65": ({"grow_mask_by": 65}, ["grow_mask_by", "0…64", "got 65", "use mask_offset"]),
    "grow -3": ({"grow_mask_by": -3}, ["grow_mask_by", "0…64", "got -3", "use mask_offset"]),
    "grow 1.5": ({"grow_mask_by": 1.5}, ["grow_mask_by", "integer", "got 1.5"]),
    "offset 129": ({"mask_offset": 129}, ["mask_offset", "−128…128", "got 129"]),
    "both": (
        {"grow_mask_by": 4, "mask_offset": 0},
        ["grow_mask_by=4 and mask_offset=0 exclude each other", "set one of them to null"],
    ),
    "latent_mask": (
        {"latent_mask": "bilinear"},
        ["latent_mask must be one of nearest, area, max, unshuffle", "got 'bilinear'"],
    ),
}


@both
@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_a_wrong_setting_is_named(kind, case, vae):
    options, parts = WRONG_SETTINGS[case]
    with complains(f"{ENCODERS[kind].__name__}: ", *parts):
        ENCODERS[kind](vae, **options)


@pytest.mark.parametrize("case", WRONG_INPAINT_SETTINGS)
def test_a_wrong_inpainting_setting_is_named(case, vae):
    options, parts = WRONG_INPAINT_SETTINGS[case]
    with complains("InpaintEncoder: ", *parts):
        InpaintEncoder(vae, **options)


@pytest.mark.parametrize("wrong", [tiny_kl, lambda: "sdxl", lambda: None], ids=["unwrapped", "str", "None"])
def test_what_is_no_frozen_vae_is_refused_at_once(wrong):
    wrong = wrong()
    with complains("PlainEncoder: vae must be a FrozenVAE", f"got {type(wrong).__name__}", "FrozenVAE(autoencoder)"):
        PlainEncoder(wrong)


def test_a_factory_that_makes_no_frozen_vae_is_refused_when_it_is_called():
    with complains("PlainEncoder: vae must be a FrozenVAE, got AutoencoderKL", "FrozenVAE(autoencoder)"):
        PlainEncoder(tiny_kl)({"pixels": images(1)})


def floats(value):
    pixels = images(2) / 255
    pixels[1, 2, 3, 4] = value
    return pixels


WRONG_PIXELS = {
    "missing": (None, ["pixels", "expected a tensor of shape b c H W", "got NoneType"]),
    "rank": (images(2)[0], ["pixels", "b c H W", "got (3, 32, 32) uint8"]),
    "channels": (images(2, channels=2), ["pixels", "1, 3 or 4 channels", "got (2, 2, 32, 32) uint8"]),
    "channels last": (images(2).movedim(1, -1), ["got (2, 32, 32, 3) uint8", "layout=HWC"]),
    "empty": (images(2)[:0], ["pixels", "the batch is empty", "(0, 3, 32, 32) uint8"]),
    "small": (images(2, 32, 7), ["32×7 is smaller than the autoencoder's factor 8", "at least 8×8"]),
    "int64": (images(2).long(), ["pixels", "uint8 in 0…255 or float in 0…1", "got (2, 3, 32, 32) int64"]),
    "bool": (images(2) > 9, ["pixels", "uint8 in 0…255 or float in 0…1", "bool"]),
    "negative": (floats(-0.5), ["pixels", "must lie in 0…1", "got -0.5…1", "(x + 1) / 2"]),
    "above one": (floats(1.5), ["pixels", "must lie in 0…1", "got 0…1.5", "yield uint8"]),
    "a little above one": (floats(1.01), ["pixels", "got 0…1.01", "clamp them"]),
    "NaN": (floats(float("nan")), ["pixels", "must lie in 0…1", "nan", "float32", "look at how they were made"]),
}


@both
@pytest.mark.parametrize("case", WRONG_PIXELS)
def test_wrong_pixels_are_named(kind, case, vae):
    pixels, parts = WRONG_PIXELS[case]
    with complains(f"{ENCODERS[kind].__name__}: ", *parts):
        ENCODERS[kind](vae)({"pixels": pixels, "mask": masks(2)})


WRONG_MASKS = {
    "count": (masks(3), ["got 3 masks for 4 images", "(3, 1, 32, 32) uint8", "one for all"]),
    "rank 2": (masks(4)[0, 0], ["shape b 1 H W or b H W", "got (32, 32) uint8"]),
    "rank 5": (masks(4)[None], ["shape b 1 H W or b H W", "got (1, 4, 1, 32, 32) uint8"]),
    "channels": (masks(4).expand(-1, 3, -1, -1), ["shape b 1 H W or b H W", "got (4, 3, 32, 32) uint8"]),
    "dtype": (masks(4).long(), ["bool, uint8 in 0…255 or float in 0…1", "got (4, 1, 32, 32) int64"]),
    "array": (masks(4).numpy(), ["shape b 1 H W or b H W", "got ndarray"]),
    "range": (masks(4).float(), ["must lie in 0…1", "got 0…255", "divide by 255"]),
    "NaN": (masks(4) * float("nan"), ["must lie in 0…1", "nan"]),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_wrong_masks_are_named(case, vae):
    mask, parts = WRONG_MASKS[case]
    with complains("InpaintEncoder: mask: ", *parts):
        InpaintEncoder(vae)({"pixels": images(4), "mask": mask})


def test_a_missing_mask_is_named_with_what_there_is(vae):
    with complains("InpaintEncoder: the batch has no 'mask'", "only 'pixels', 'masks'", "white = 1 = repaint"):
        InpaintEncoder(vae)({"pixels": images(2), "masks": masks(2)})


WRONG_INDICES = {
    "short": (torch.arange(3), ["got 3 for 2 images", "(3,) int64", "give one an image"]),
    "float": (torch.arange(2.0), ["expected one integer an image", "(2,) float32"]),
    "none": (None, ["expected one integer an image", "NoneType"]),
    "mixed": ([1, None], ["expected one integer an image", "list"]),
}


@pytest.mark.parametrize("case", WRONG_INDICES)
def test_a_wrong_index_is_named(case, vae):
    index, parts = WRONG_INDICES[case]
    with complains("PlainEncoder: index: ", *parts):
        PlainEncoder(vae)({"pixels": images(2), "index": index})


def test_a_bare_tensor_is_no_batch(vae):
    with complains("PlainEncoder: expected a dict, as in {'pixels': images}", "got (2, 3, 32, 32) uint8"):
        PlainEncoder(vae)(images(2))


def test_floats_of_bytes_are_told_to_be_divided(vae):
    with complains("got 0…255", "divide by 255, or yield uint8"):
        PlainEncoder(vae)({"pixels": torch.linspace(0, 255, 3 * 32 * 32).reshape(1, 3, 32, 32)})
