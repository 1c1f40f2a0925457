"""The line of stages: a user's own see the pixels, the host's run before the transfer, and names are checked."""

import pytest
import torch
from helpers import Photos, complains, fit, images, masks, photo_columns, predict, tiny_kl

from latentdm import Captions, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.augment import Augment
from latentdm.batch import EPOCH
from latentdm.draws import Draws
from latentdm.stages import Line, Stage


class Depth(Stage):
    """A user's stage: features of the pixels, at latent resolution."""

    reads, writes = ("pixels",), ("depth",)

    def __init__(self):
        self.devices = []

    @property
    def channels(self):
        return {"depth": 1}

    def setup(self, device):
        self.devices.append(str(device))

    def __call__(self, batch, draws):
        return {"depth": batch["pixels"].float().mean(1, keepdim=True)[..., ::8, ::8] / 255}


class Words(Stage):
    """On the host: what has no tensor yet becomes one."""

    reads, writes, on_host = ("caption",), ("words",), True

    def __call__(self, batch, draws):
        return {"words": torch.tensor([len(caption.split()) for caption in batch["caption"]])}


class Jitter(Stage):
    reads, writes, training_only = ("latents",), ("latents",), True

    def __call__(self, batch, draws):
        return {"latents": batch["latents"] + draws.normal("jitter", batch["latents"].shape[1:], torch.device("cpu"))}


@pytest.fixture
def encoder(vae):
    return PlainEncoder(vae, posterior="mode")


def test_a_stage_of_ones_own_sees_the_pixels_and_reaches_the_model(encoder):
    depth = Depth()
    datamodule = LatentDataModule(Photos(photo_columns()), encoder, stages=[depth])
    model = fit(datamodule)
    assert torch.equal(model.column("train", "depth"), images(4).float().mean(1, keepdim=True)[..., ::8, ::8] / 255)
    assert "pixels" not in model.batches("train")[0]
    assert datamodule.channels == {"latents": 4, "depth": 1}
    assert depth.devices[0] == depth.devices[-1] == "cpu"


def test_a_stage_of_the_host_runs_before_the_transfer_and_its_result_travels_along(encoder):
    captions = ["a cat", "a", "one two three", ""]
    columns = photo_columns(caption=captions)
    datamodule = LatentDataModule(Photos(columns), encoder, stages=[Words()])
    model = fit(datamodule)
    assert model.column("train", "words").tolist() == [2, 1, 3, 0]
    assert torch.equal(datamodule.process({"pixels": images(1), "caption": ["x y"]}, "cpu")["words"], torch.tensor([2]))


def test_a_stage_for_training_alone_is_left_out_in_validation(encoder):
    plain = fit(LatentDataModule(Photos(photo_columns()), encoder))
    jittered = fit(LatentDataModule(Photos(photo_columns()), encoder, stages=[Jitter()]))
    assert torch.equal(jittered.column("val"), plain.column("val"))
    assert not torch.allclose(jittered.column("train"), plain.column("train"), atol=0.1)


def test_outputs_of_a_stage_are_renamed_and_left_out_as_all_others(encoder):
    keys = {"depth": "hint", "latents": None}
    (batch, _) = predict(LatentDataModule(Photos(photo_columns()), encoder, stages=[Depth()], keys=keys))
    assert set(batch) == {"index", "hint"}
    with complains("keys: unknown name 'depth'"):
        LatentDataModule(Photos(photo_columns()), encoder, keys=keys)


def test_what_a_stage_misses_is_named_with_the_stage(encoder):
    datamodule = LatentDataModule(Photos(photo_columns()), encoder, stages=[Words()], keys={"caption": "text"})
    with complains("the batch has no 'text', only 'pixels', 'index'", "keys={caption: text}", "Words reads it"):
        predict(datamodule)


def test_an_order_that_cannot_be_is_refused(encoder):
    with complains("Words runs on the host (on_host), but stands behind Depth"):
        Line([Depth(), Words()])
    with complains("Depth and Depth both write 'depth'"):
        Line([Depth(), Depth()])
    with complains("stages[1] must be a Stage, got function", error=TypeError):
        LatentDataModule(Photos(photo_columns()), encoder, stages=[Depth(), lambda batch, draws: {}])


@pytest.mark.parametrize("mask", [False, True])
def test_process_gives_what_a_step_gets(vae, mask):
    encoder = InpaintEncoder(vae) if mask else PlainEncoder(vae)
    datamodule = LatentDataModule(Photos(photo_columns(mask=mask)), encoder, seed=3)
    (first, _) = predict(datamodule)
    batch = {"pixels": images(4)[:2], "index": torch.arange(2)} | ({"mask": masks(4)[:2]} if mask else {})
    again = datamodule.process(batch, "cpu")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


class Drawing(Stage):
    """What of the draws a stage sees."""

    reads, writes, on_host = ("index",), ("drawn",), True

    def __call__(self, batch, draws):
        return {"drawn": [(draws.training, draws.epoch)] * len(draws.ids)}


def test_process_draws_as_training_does_where_it_is_told_to(encoder):
    captions = Captions(dropout=0.5, shuffle_tags=True)
    columns = photo_columns(caption=["a, b, c, d, e", "f, g, h", "i, j, k, l", "m, n, o, p"])
    datamodule = LatentDataModule(
        Photos(columns), encoder, augment=Augment(flip=0.5), captions=captions, stages=[Jitter(), Drawing()], seed=3
    )
    batches = fit(datamodule).batches("train")
    given = {"pixels": images(4)[:2], "index": torch.arange(2), "caption": columns["caption"][:2]}
    again = datamodule.process(given, "cpu", training=True)
    assert again["drawn"] == [(True, 0)] * 2
    assert again["caption"] == batches[0]["caption"] != given["caption"]
    assert torch.equal(again["latents"], batches[0]["latents"])
    later = datamodule.process(given, "cpu", training=True, epoch=5)
    assert later["drawn"] == [(True, 5)] * 2
    assert not torch.equal(later["latents"], again["latents"])
    plain = datamodule.process(given, "cpu")
    assert plain["drawn"] == [(False, 0)] * 2
    assert plain["caption"] == given["caption"]
    assert datamodule.process({**given, EPOCH: torch.tensor([7, 7])}, "cpu", True, 5)["drawn"] == [(True, 7)] * 2
    with complains("LatentDataModule: epoch must be", "got -1"):
        datamodule.process(given, "cpu", epoch=-1)
    with complains("LatentDataModule: "):  # and what comes after it is by its own rules again
        datamodule.process({"index": torch.arange(2)}, "cpu", training=True)
    assert datamodule.process(given, "cpu")["drawn"] == [(False, 0)] * 2


def test_encode_gives_inputs_and_outputs_under_our_names(vae):
    datamodule = LatentDataModule(Photos(photo_columns()), InpaintEncoder(vae), keys={"pixels": "image"})
    inputs, outputs = datamodule.encode({"image": images(2), "mask": masks(2)}, "cpu")
    assert torch.equal(inputs["pixels"], images(2))
    assert set(outputs) == {"latents", "masked_latents", "noise_mask", "latent_mask"}


@pytest.mark.parametrize("inpaint", [False, True])
def test_a_source_is_what_the_model_sees(vae, inpaint):
    encoder = InpaintEncoder(vae, posterior="mode") if inpaint else PlainEncoder(vae, posterior="mode")
    seen = images(2, seed=9)
    batch = {"pixels": images(2), "source": seen} | ({"mask": masks(2)} if inpaint else {})
    encoded = encoder(batch)
    other = encoder(batch | {"pixels": seen, "source": seen})
    assert "source" not in encoded
    key = "masked_latents" if inpaint else "source_latents"
    torch.testing.assert_close(encoded[key], other[key], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(encoded["latents"], other["latents"], atol=1e-2)
    with complains("source: expected the size of pixels ((2, 3, 32, 32) uint8), got (2, 3, 24, 32) uint8"):
        encoder(batch | {"source": seen[:, :, :24]})


def test_the_crop_is_to_what_the_model_packs_and_the_fill_is_what_it_knows():
    vae = FrozenVAE(tiny_kl(), dtype="float32")
    encoder = InpaintEncoder(vae, grow_mask_by=0, multiple=16, fill=0.0, posterior="mode")
    batch = {"pixels": images(1, 40, 56), "mask": torch.ones(1, 1, 40, 56)}
    assert encoder(batch)["latents"].shape == (1, 4, 4, 6)
    assert torch.equal(encoder.images(batch)["masked_latents"], torch.zeros(1, 3, 32, 48))
    with complains("InpaintEncoder: multiple must be a multiple of AutoencoderKL's factor 8, got 12"):
        InpaintEncoder(vae, multiple=12)
    with complains("InpaintEncoder: fill must be a number in 0…1, got 2"):
        InpaintEncoder(vae, fill=2)
    with complains("pixels: 15×40 is smaller than"):
        encoder({"pixels": images(1, 15, 40), "mask": torch.ones(1, 1, 15, 40)})


def test_draws_know_whether_they_are_for_training(encoder):
    seen = []

    class Look(Stage):
        def __call__(self, batch, draws):
            seen.append((draws.training, draws.epoch, tuple(draws.ids)))
            return {}

    fit(LatentDataModule(Photos(photo_columns()), encoder, stages=[Look()]), max_epochs=2, num_sanity_val_steps=0)
    expected = [(True, 0), (False, 0), (True, 1), (False, 0)]
    assert [(training, epoch) for training, epoch, _ in seen[::2]] == expected
    assert seen[0][2] == (0, 1)
    assert Draws(0, 0, [1]).training
