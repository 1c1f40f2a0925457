"""Augmentation: image, mask and label map stay aligned, each sample has its own draws, and only training changes."""

import pytest
import torch
from helpers import LatentModel, Photos, RecordingAutoencoder, fit, photo_columns, quiet_trainer

from latentdm import Augment, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.masks import RandomMask

COLOURS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}
KINDS = {
    "flip": {"flip": 0.5},
    "crop": {"crop": [0.3, 0.9]},
    "all": {"flip": 0.5, "crop": [0.3, 0.9], **COLOURS},
}


def draws(ids, seed=0, epoch=0):
    return Draws(seed, epoch, list(ids))


def coordinates(count, height=48, width=64):
    """Images whose red and green are their own coordinates; the mask is made of them, and so are the labels."""
    x, y = torch.arange(width) * 255 // (width - 1), torch.arange(height) * 255 // (height - 1)
    x, y = x.expand(height, width), y[:, None].expand(height, width)
    pixels = torch.stack([x, y, (x + y) // 2]).to(torch.uint8).expand(count, -1, -1, -1)
    return {"pixels": pixels, "mask": (x / 255).expand(count, 1, -1, -1), "segmentation": y.expand(count, -1, -1)}


@pytest.mark.parametrize("settings", [KINDS["flip"], KINDS["crop"], KINDS["flip"] | KINDS["crop"]])
def test_an_image_of_its_own_coordinates_stays_with_its_mask_and_its_labels(settings):
    batch = coordinates(40)
    moved = Augment(**settings)(batch, draws(range(40)))
    assert moved["pixels"].dtype == torch.uint8
    assert moved["segmentation"].dtype == torch.int64
    for name, value in batch.items():
        assert moved[name].shape == value.shape
    changed = (moved["pixels"] != batch["pixels"]).flatten(1).any(dim=1)
    assert changed.sum() >= 10
    red, green = moved["pixels"][:, 0].float(), moved["pixels"][:, 1].float()
    assert (red / 255 - moved["mask"][:, 0]).abs().max() <= 1 / 255
    assert (green - moved["segmentation"]).abs().max() <= 4  # the nearest row: rows lie 5.4 levels apart
    assert len(moved["pixels"].flatten(1).unique(dim=0)) == (2 if "crop" not in settings else 40)


def test_mirroring_alone_is_exact_and_changes_no_dtype():
    batch = coordinates(20) | {"mask": torch.randint(2, (20, 24, 32), dtype=torch.uint8)}
    moved = Augment(flip=0.5)(batch, draws(range(20)))
    flipped = (moved["pixels"] != batch["pixels"]).flatten(1).any(dim=1)
    assert 4 < flipped.sum() < 16
    for name, value in batch.items():
        assert moved[name].dtype == value.dtype
        assert torch.equal(moved[name][flipped], value[flipped].flip(-1))
        assert torch.equal(moved[name][~flipped], value[~flipped])


def test_crops_have_the_share_and_the_aspect_asked_for():
    batch = {"pixels": coordinates(200, 64, 64)["pixels"].float() / 255}
    seen = Augment(crop=[0.3, 0.6], aspect=1.5)(batch, draws(range(200)))["pixels"][:, :2].flatten(2)
    width, height = ((seen.amax(dim=2) - seen.amin(dim=2)) * 64 / 64).unbind(1)
    assert 0.24 < (width * height).min() < 0.33
    assert 0.55 < (width * height).max() < 0.63
    assert 0.6 < (width / height).min() < 0.75
    assert 1.35 < (width / height).max() < 1.6
    assert seen.amin(dim=2).min() < 0.05  # crops lie everywhere
    assert seen.amax(dim=2).max() > 0.95
    whole = Augment(crop=[1, 1])(batch, draws(range(200)))["pixels"]
    assert (whole - batch["pixels"]).abs().max() < 1e-5


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_sample_depends_on_its_own_draws_alone(settings):
    batch = coordinates(9)
    augment = Augment(**settings)
    together = augment(batch, draws(range(9)))
    for index in (0, 5, 8):
        alone = augment({name: value[index : index + 1] for name, value in batch.items()}, draws([index]))
        assert torch.equal(alone["pixels"][0], together["pixels"][index])
        assert torch.equal(alone["mask"][0], together["mask"][index])
    assert not torch.equal(augment(batch, draws(range(9), epoch=1))["pixels"], together["pixels"])
    assert not torch.equal(augment(batch, draws(range(9), seed=1))["pixels"], together["pixels"])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Augment(**KINDS["all"])(coordinates(3), draws(range(3)))
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_waits_for_the_device():
    # The meta device has no values: whatever looked at one would fail, as it would make an accelerator wait.
    batch = {name: value.to("meta") for name, value in coordinates(4).items()}
    assert Augment(**KINDS["all"])(batch, draws(range(4)))["pixels"].device.type == "meta"


@pytest.mark.parametrize("colour", COLOURS)
def test_each_colour_changes_images_and_nothing_else(colour):
    batch = coordinates(12)
    alpha = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 48, 64)
    batch["pixels"] = torch.cat([batch["pixels"], alpha], dim=1)
    changed = Augment(**{colour: COLOURS[colour]})(batch, draws(range(12)))
    assert changed["pixels"].dtype == torch.uint8
    away = (changed["pixels"][:, :3].float() - batch["pixels"][:, :3]).abs().flatten(1).mean(dim=1)
    assert len(away.round(decimals=2).unique()) > 9
    assert 1 < away.max() < 60
    assert torch.equal(changed["pixels"][:, 3:], alpha)
    assert changed["mask"] is batch["mask"]


def test_brightness_is_a_factor_in_its_range():
    levels = torch.full((100, 3, 2, 2), 0.5)
    factor = Augment(brightness=0.2)({"pixels": levels}, draws(range(100)))["pixels"][:, 0, 0, 0] / 0.5
    assert 0.8 <= factor.min() < 0.83
    assert 1.17 < factor.max() <= 1.2


def test_gray_images_and_clips():
    gray = Augment(**KINDS["all"])({"pixels": torch.rand(4, 1, 8, 8)}, draws(range(4)))["pixels"]
    assert gray.shape == (4, 1, 8, 8)
    frame = torch.rand(4, 3, 16, 16)
    clip = frame[:, :, None].expand(-1, -1, 5, -1, -1)
    moved = Augment(**KINDS["all"])({"pixels": clip}, draws(range(4)))["pixels"]
    assert moved.shape == clip.shape
    single = Augment(**KINDS["all"])({"pixels": frame}, draws(range(4)))["pixels"]
    assert torch.allclose(moved, single[:, :, None].expand_as(moved), atol=1e-5)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_source_is_moved_and_coloured_with_its_image(settings):
    batch = coordinates(12)
    pixels = batch["pixels"].contiguous()
    source = pixels.clone()
    source[:, :, 16:32, 16:32] = 0  # what is to be removed, or added
    moved = Augment(**settings)(batch | {"pixels": pixels, "source": source}, draws(range(12)))
    assert set(moved) == {"pixels", "source", "mask", "segmentation"}
    assert (moved["pixels"] != pixels).flatten(1).any(dim=1).sum() >= 3
    marked = {"pixels": pixels, "mask": (source != pixels).any(dim=1, keepdim=True).float()}
    touched = Augment(**settings)(marked, draws(range(12)))["mask"] > 0  # bilinear: all that the change can reach
    same = ~touched.expand(-1, 3, -1, -1)
    assert torch.equal(moved["source"][same], moved["pixels"][same])
    assert not torch.equal(moved["source"], moved["pixels"])


def test_the_contrast_of_a_pair_is_counted_from_one_gray():
    pixels, source = torch.full((1, 3, 8, 8), 0.2), torch.full((1, 3, 8, 8), 0.2)
    source[..., :4] = 0.8
    moved = Augment(contrast=0.5)({"pixels": pixels, "source": source}, draws([0]))
    assert torch.equal(moved["source"][..., 4:], moved["pixels"][..., 4:])
    alone = Augment(contrast=0.5)({"pixels": pixels}, draws([0]))
    assert (moved["pixels"] - alone["pixels"]).abs().max() > 0.01


def test_a_gray_source_and_one_with_alpha_take_the_colours_too():
    gray, alpha = torch.rand(2, 1, 8, 8), torch.rand(2, 4, 8, 8)
    moved = Augment(**COLOURS)({"pixels": alpha, "source": gray}, draws(range(2)))
    assert moved["pixels"].shape == (2, 4, 8, 8)
    assert moved["source"].shape == (2, 3, 8, 8)
    assert torch.equal(moved["pixels"][:, 3], alpha[:, 3])


def test_a_source_of_another_size_is_refused():
    batch = {"pixels": torch.zeros(2, 3, 8, 8), "source": torch.zeros(2, 3, 8, 9)}
    with pytest.raises(UserError, match=r"^Augment: source: expected one an image, of its size, got \(2, 3, 8, 9\)"):
        Augment(flip=0.5)(batch, draws(range(2)))


def test_what_is_no_picture_is_left_out():
    moved = Augment(flip=1.0)(coordinates(2) | {"index": torch.arange(2), "caption": ["a", "b"]}, draws(range(2)))
    assert set(moved) == {"pixels", "mask", "segmentation"}
    assert Augment().training_only


def test_one_mask_for_all_images_is_moved_with_each():
    batch = coordinates(10)
    moved = Augment(flip=0.5)(batch | {"mask": batch["mask"][:1]}, draws(range(10)))
    assert torch.equal(moved["mask"], Augment(flip=0.5)(batch, draws(range(10)))["mask"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 2}, "flip must be a probability in 0…1, got 2"),
        (
            {"crop": [0.0, 1.0]},
            r"crop must be two numbers above 0 and at most 1, in order, the share of the area, got \[0.0, 1.0\]; ",
        ),
        ({"crop": [0.9, 0.5]}, "crop must be two numbers"),
        ({"aspect": 0.5}, "aspect must be a number of at least 1, got 0.5"),
        ({"hue": 0.6}, "hue must be a number in 0…0.5, got 0.6"),
        ({"contrast": -1}, "contrast must be a number in 0…1, got -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^Augment: {message}"):
        Augment(**settings)


def test_kornia_is_asked_for_where_colours_are(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kornia.enhance", None)
    Augment(flip=0.5, crop=[0.5, 1])
    with pytest.raises(ImportError, match=r"^Augment needs the package .*latentdm\[augment\]"):
        Augment(hue=0.1)


def wrapped(encoder, **settings):
    columns = photo_columns(8) | {name: value.contiguous() for name, value in coordinates(8, 32, 32).items()}
    return LatentDataModule(Photos(columns, batch_size=4), encoder(FrozenVAE(RecordingAutoencoder())), **settings)


def test_training_alone_is_augmented_and_what_stays_in_the_batch_lies_where_its_image_does():
    datamodule = wrapped(PlainEncoder, augment=Augment(flip=0.5, crop=[0.3, 0.9]), keep_pixels=True)
    model = LatentModel()
    trainer = quiet_trainer()
    trainer.fit(model, datamodule=datamodule)
    trained, validated = model.column("train", "pixels"), model.column("val", "pixels")
    assert torch.equal(validated, coordinates(8, 32, 32)["pixels"])
    assert (trained != validated).flatten(1).any(dim=1).all()
    folded = torch.nn.functional.pixel_unshuffle(trained.float() / 127.5 - 1, 8)
    assert torch.allclose(model.column("train"), folded, atol=1e-5)  # the encoder saw them too
    assert (trained[:, :1].float() / 255 - model.column("train", "mask")).abs().max() <= 1 / 255
    assert (trained[:, 1].float() - model.column("train", "segmentation")).abs().max() <= 8
    assert torch.equal(model.column("val", "segmentation"), coordinates(8, 32, 32)["segmentation"])


def test_the_mask_of_an_inpainting_encoder_is_moved_with_its_image():
    columns = coordinates(8, 32, 32)
    model = fit(wrapped(InpaintEncoder, augment=Augment(flip=0.5), keep_pixels=True))
    flipped = (model.column("train", "pixels") != columns["pixels"]).flatten(1).any(dim=1)
    assert 0 < flipped.sum() < 8
    grown, still = model.column("train", "noise_mask"), model.column("val", "noise_mask")
    assert torch.equal(grown[~flipped], still[~flipped])
    assert (grown[flipped][..., :8] == 1).all()
    assert (still[..., :8] == 0).all()


def test_a_source_is_moved_before_the_encoder_masks_it_and_a_mask_source_may_write_the_mask_anew():
    columns = coordinates(8, 32, 32)
    source = (columns["pixels"] // 2).contiguous()
    photos = Photos(photo_columns(8) | {name: value.contiguous() for name, value in columns.items()}, batch_size=4)
    photos.dataset.columns["source"] = source
    encoder = InpaintEncoder(FrozenVAE(RecordingAutoencoder()), grow_mask_by=0)
    model = fit(LatentDataModule(photos, encoder, augment=Augment(flip=0.5), masks=RandomMask(), keep_pixels=True))
    pixels = model.column("train", "pixels")
    flipped = (pixels != columns["pixels"]).flatten(1).any(dim=1)
    assert 0 < flipped.sum() < 8
    seen = torch.nn.functional.pixel_shuffle(model.column("train", "masked_latents"), 8)
    kept = (model.column("train", "noise_mask") == 0).expand_as(seen)
    expected = torch.where(flipped[:, None, None, None], source.flip(-1), source) / 127.5 - 1
    assert torch.allclose(seen[kept], expected[kept], atol=1e-5)
    assert torch.equal(seen[~kept], torch.zeros_like(seen[~kept]))
