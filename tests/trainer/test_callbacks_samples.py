"""`SamplePreview`: what a model samples of validation images, drawn before and after."""

import numpy as np
import pytest
import torch
from helpers import LatentModel, Photos, complains, fit, photo_columns, quiet_trainer, tiny_kl
from lightning.pytorch import LightningModule
from PIL import Image

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.callbacks import SamplePreview
from latentdm.preview.sheet import Sheet

COLUMNS = ["image", "masked\nimage", "sampled", "sampled,\nin the image"]


class Sampler(LatentModel):
    """Samples the clean latents themselves, so that what comes out is known; keeps the batches it was asked for."""

    def __init__(self, key="latents"):
        super().__init__(key)
        self.asked = []

    def predict_step(self, batch, batch_idx):
        torch.rand(3)  # from the generator that training uses
        self.asked.append(batch)
        return batch[self.key]


def inpainting(vae, count=6, batch_size=3, **settings):
    return LatentDataModule(Photos(photo_columns(count, mask=True), batch_size), InpaintEncoder(vae), **settings)


def tile(path, columns, row, column):
    """float64 ``h w 3``, at the images' own 32 by 32."""
    with Image.open(path) as picture:
        part = picture.crop(Sheet(columns, (32, 32)).box(row, columns.index(column)))
    return np.asarray(part).astype(float)[1::3, 1::3]


def test_sampled_latents_are_decoded_and_put_where_the_mask_is(vae, tmp_path):
    model, preview, datamodule = Sampler(), SamplePreview(samples=2, dirpath=tmp_path), inpainting(vae)
    quiet_trainer(callbacks=[preview]).validate(model, datamodule, verbose=False)
    assert preview.latest == tmp_path / "step_000000.png"
    [batch] = model.asked
    decoded = torch.cat([vae.decode(row) for row in batch["latents"].split(1)])  # one at a time, as they are drawn
    decoded = decoded.mul(255).permute(0, 2, 3, 1).numpy()
    pixels = photo_columns(2)["pixels"].permute(0, 2, 3, 1).numpy()
    for row in range(2):
        hole = batch["noise_mask"][row, 0].bool().numpy()
        image, masked, sampled, inside = (tile(preview.latest, COLUMNS, row, column) for column in COLUMNS)
        assert np.array_equal(image, pixels[row])
        assert np.abs(sampled - decoded[row]).max() < 0.51  # rounded to a level
        assert np.array_equal(inside[hole], sampled[hole])
        assert np.array_equal(inside[~hole], image[~hole])
        assert not np.array_equal(masked, image)


def test_the_model_is_given_the_first_samples_alone(vae, tmp_path):
    columns = photo_columns(4, caption=list("abcd"), size=torch.arange(8).view(4, 2))
    model = Sampler()
    datamodule = LatentDataModule(Photos(columns, batch_size=4), PlainEncoder(vae))
    quiet_trainer(callbacks=[SamplePreview(samples=3, dirpath=tmp_path)]).validate(model, datamodule, verbose=False)
    [batch] = model.asked
    assert batch["caption"] == ["a", "b", "c"]
    assert batch["size"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert len(batch["latents"]) == 3
    with Image.open(tmp_path / "step_000000.png") as picture:
        assert picture.width == Sheet(["image", "sampled"], (32, 32)).box(0, 1)[2] + 14


def test_every_validation_has_its_picture_but_the_sanity_check(vae, tmp_path):
    model = Sampler()
    fit(
        inpainting(vae),
        model,
        callbacks=[SamplePreview(dirpath=tmp_path)],
        max_epochs=2,
        num_sanity_val_steps=1,
        limit_val_batches=2,
    )
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["step_000002.png", "step_000004.png"]
    assert len(model.asked) == 2  # the first batch of each


def test_training_draws_the_numbers_it_would_have_drawn(vae, tmp_path):
    def numbers(callbacks):
        torch.manual_seed(0)
        fit(inpainting(vae), Sampler(), callbacks=callbacks, max_epochs=1)
        return torch.rand(4)

    assert torch.equal(numbers([]), numbers([SamplePreview(dirpath=tmp_path)]))


def test_where_decoding_does_not_fit_the_picture_is_skipped(vae, tmp_path, monkeypatch):
    def decode(latents):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(vae, "decode", decode)
    with pytest.warns(UserWarning, match="SamplePreview: no memory to decode"):
        quiet_trainer(callbacks=[SamplePreview(dirpath=tmp_path)]).validate(Sampler(), inpainting(vae), verbose=False)
    assert list(tmp_path.glob("*.png")) == []


def test_a_model_that_cannot_sample_is_told(vae):
    class Silent(LatentModel):
        predict_step = LightningModule.predict_step

    with complains("SamplePreview", "Silent has no predict_step"):
        quiet_trainer(callbacks=[SamplePreview()]).validate(Silent(), inpainting(vae), verbose=False)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda batch: None, "NoneType"),
        (lambda batch: batch["latents"][:1], "(1, 4, 4, 4)"),
        (lambda batch: torch.zeros(3, 3, 16, 16), "(3, 3, 16, 16) float32"),
        (lambda batch: torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "(3, 3, 32, 32) uint8"),
    ],
)
def test_samples_that_are_neither_latents_nor_pixels_are_refused(vae, tmp_path, returned, got):
    class Wrong(Sampler):
        def predict_step(self, batch, batch_idx):
            return returned(batch)

    with complains(
        "SamplePreview: Wrong.predict_step must return latents of shape (3, 4, 4, 4), or float pixels in 0…1 of shape "
        "(3, 3, 32, 32)",
        f"got {got}",
    ):
        quiet_trainer(callbacks=[SamplePreview(dirpath=tmp_path)]).validate(Wrong(), inpainting(vae), verbose=False)


class Painter(LatentModel):
    """Samples pixels of one level, as a model that samples through a pipeline with an autoencoder of its own."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def predict_step(self, batch, batch_idx):
        latents = batch["latents"]
        return torch.full((len(latents), 3, *(8 * side for side in latents.shape[-2:])), self.level)


def test_a_decoder_is_missed_where_latents_are_sampled_and_not_where_pixels_are(tmp_path):
    vae = FrozenVAE(tiny_kl(), dtype="float32", encoder_only=True)
    preview = SamplePreview(dirpath=tmp_path)
    with complains("SamplePreview", "Sampler.predict_step returns latents", "no decoder", "encoder_only=false"):
        quiet_trainer(callbacks=[preview]).validate(Sampler(), inpainting(vae), verbose=False)
    quiet_trainer(callbacks=[preview]).validate(Painter(0.25), inpainting(vae), verbose=False)
    assert (tile(preview.latest, COLUMNS, 2, "sampled") == 64).all()


@pytest.mark.parametrize("level", [0.25, 1.005])
def test_sampled_pixels_are_drawn_as_they_are_and_put_where_the_mask_is(vae, tmp_path, level):
    preview = SamplePreview(samples=2, dirpath=tmp_path)
    quiet_trainer(callbacks=[preview]).validate(Painter(level), inpainting(vae), verbose=False)
    shown = min(round(level * 255), 255)
    pixels = photo_columns(2)["pixels"].permute(0, 2, 3, 1).numpy()
    for row in range(2):
        image, sampled, inside = (tile(preview.latest, COLUMNS, row, COLUMNS[column]) for column in (0, 2, 3))
        changed = (inside != image).any(-1)
        assert np.array_equal(image, pixels[row])
        assert (sampled == shown).all()
        assert 0.1 < changed.mean() < 0.5
        assert (inside[changed] == shown).all()


@pytest.mark.parametrize("level", [-1.0, 255.0])
def test_sampled_pixels_of_another_range_are_refused(vae, tmp_path, level):
    with complains("SamplePreview: Painter.predict_step must return pixels in 0…1", f"got {level:g}", "(x + 1) / 2"):
        quiet_trainer(callbacks=[SamplePreview(dirpath=tmp_path)]).validate(
            Painter(level), inpainting(vae), verbose=False
        )


@pytest.mark.parametrize("samples", [0, 1.5, True])
def test_samples_are_checked(samples):
    with complains("SamplePreview", "samples", str(samples)):
        SamplePreview(samples=samples)
