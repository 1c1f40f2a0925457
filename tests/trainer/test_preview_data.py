"""The preview as a person calls it in a notebook, where no app runs, and trains afterwards."""

import io

import numpy as np
import pytest
import torch
from helpers import COLUMNS, LatentModel, Photos, complains, fit, photo_columns
from PIL import Image

from latentdm import InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.data import ImageFolderData
from latentdm.preview import describe, preview, preview_data
from latentdm.preview.sheet import Sheet


@pytest.fixture
def datamodule(vae, workplace):
    pixels = ImageFolderData("photos", size=64, batch_size=2, random_crop=False)
    return LatentDataModule(pixels, InpaintEncoder(vae))


def test_one_call_draws_what_the_model_would_see(datamodule, workplace):
    before, state = set(workplace.rglob("*")), torch.get_rng_state()
    picture = preview_data(datamodule, samples=2, device="cpu")
    assert picture.width == Sheet(COLUMNS, (64, 64)).box(0, len(COLUMNS) - 1)[2] + 14
    assert picture.crop(Sheet(COLUMNS, (64, 64)).box(1, 0)).getextrema() != ((0, 0),) * 3
    assert set(workplace.rglob("*")) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert preview_data(datamodule, samples=2, device="cpu").tobytes() == picture.tobytes()


def test_a_notebook_shows_it(datamodule):
    with Image.open(io.BytesIO(preview_data(datamodule, samples=1)._repr_png_())) as shown:
        assert shown.format == "PNG"


def test_what_was_drawn_can_be_trained_on_as_if_it_had_not_been(datamodule, vae):
    preview_data(datamodule, samples=2, device="cpu")
    drawn = fit(datamodule).column("train")
    pixels = ImageFolderData("photos", size=64, batch_size=2, random_crop=False)
    fresh = fit(LatentDataModule(pixels, InpaintEncoder(vae))).column("train")
    assert torch.equal(drawn, fresh)


def test_what_was_trained_on_can_be_drawn(datamodule):
    fit(datamodule, LatentModel())
    assert preview_data(datamodule, samples=1, stage="val", device="cpu").width > 0


def test_samples_limit_the_rows_and_a_stage_is_chosen(vae):
    datamodule = LatentDataModule(Photos(photo_columns(4), batch_size=4), PlainEncoder(vae))
    heights = [preview_data(datamodule, samples, "cpu").height for samples in (1, 2, 4, 9)]
    assert heights[0] < heights[1] < heights[2] == heights[3]
    for samples in (0, 2.0, True):
        with complains("preview_data: samples must be an integer of at least 1"):
            preview_data(datamodule, samples)
    with complains("preview_data: stage must be one of train, val, got 'test'"):
        preview_data(datamodule, stage="test")


def test_a_batch_by_hand_needs_no_data_module(vae):
    """As README has it: an encoder, a batch, and what the encoder made of it."""
    batch = photo_columns(2, mask=True)
    encoder = InpaintEncoder(vae)
    outputs = encoder(batch)
    plain, told = (preview(encoder, batch, outputs, notes=notes) for notes in ((), describe(encoder, batch, outputs)))
    assert told.height > plain.height
    assert np.array_equal(np.asarray(told)[: plain.height - 40], np.asarray(plain)[:-40])
