"""`VAEOffload` moves all frozen networks: text encoders, and what stages of one's own hold, with the autoencoder."""

import json

import pytest
import torch
from helpers import LatentModel, Photos, Travelling, images, photo_columns, quiet_trainer, tiny_kl
from lightning.pytorch import Callback
from running import write_noise_photos
from torch.utils.data import DataLoader

from latentdm import Cache, FrozenVAE, LatentDataModule, PlainEncoder, TextEncoder
from latentdm.cache.fill import Fill, FillData
from latentdm.callbacks import VAEOffload
from latentdm.captions import Captions
from latentdm.data import ImageFolderData
from latentdm.stages import Stage


@pytest.fixture
def pipeline(folders):
    return folders["sdxl"]


class Prompts(Photos):
    """Photographs to train on, prompts to validate with."""

    def val_dataloader(self):
        return DataLoader(["a cat", "a dog"], batch_size=1, collate_fn="".join)


class TravellingText(TextEncoder):
    """Stays on the CPU, and keeps where it was sent."""

    def to(self, device):
        vars(self).setdefault("journeys", []).append(torch.device(device).type)
        return super().to("cpu")


class Depth(Stage):
    """A stage of one's own with a network."""

    reads, writes = ("pixels",), ("depth",)

    def __init__(self):
        self.network, self.journeys = torch.nn.Conv2d(3, 1, 1), []

    def setup(self, device):
        self.journeys.append(torch.device(device).type)

    def __call__(self, batch, draws):
        return {"depth": self.network(batch["pixels"] / 255).detach()}


class OnTheDevice(Callback):
    """Puts everything where a GPU would have it."""

    def setup(self, trainer, pl_module, stage):
        trainer.datamodule.line.setup("meta")


class Where(LatentModel):
    """Notes where the networks were sent last, in each validation and each training step."""

    def __init__(self, networks):
        super().__init__()
        self.networks, self.places = networks, []

    def note(self, stage):
        self.places.append((stage, [network.journeys[-1] for network in self.networks]))

    def training_step(self, batch, batch_idx):
        self.note("train")
        assert {"latents", "prompt_embeds", "pooled_prompt_embeds", "depth"} <= set(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("val")


def test_every_frozen_network_leaves_for_validation_and_comes_back(pipeline):
    vae, text, depth = Travelling(tiny_kl()), TravellingText.from_pretrained(pipeline, dtype="float32"), Depth()
    datamodule = LatentDataModule(
        Prompts(photo_columns(4, caption=list("abcd"))), PlainEncoder(vae, posterior="mode"), text=text, stages=[depth]
    )
    model = Where([vae, text, depth])
    trainer = quiet_trainer(callbacks=[OnTheDevice(), VAEOffload(["validate"])], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=datamodule)
    there, away = ["meta"] * 3, ["cpu"] * 3
    epoch = [("train", there)] * 2 + [("val", away)] * 2
    assert model.places == epoch * 2
    assert [network.journeys[-1] for network in model.networks] == away  # the data module's teardown


@pytest.fixture
def photos(tmp_path):
    """Photographs with two captions each."""
    write_noise_photos(tmp_path / "photos", 4)
    with (tmp_path / "photos" / "metadata.jsonl").open("w") as file:
        file.writelines(json.dumps({"file_name": f"{n:02}.png", "caption": f"{n} anew"}) + "\n" for n in range(4))
    return tmp_path / "photos"


def test_what_was_encoded_ahead_needs_no_network_on_the_device(pipeline, photos, tmp_path):
    """Neither images nor captions, whichever is drawn, in whatever template, or dropped."""

    def datamodule(cache, **more):
        pixels = ImageFolderData(photos, 32, 2, 0, random_crop=False, flip=True)
        vae, text = Travelling(tiny_kl()), TravellingText.from_pretrained(pipeline, dtype="float32")
        captions = Captions(dropout=0.3, templates=["{caption}", "a photo of {caption}"])
        return LatentDataModule(pixels, PlainEncoder(vae), text=text, captions=captions, cache=cache, **more)

    ahead = datamodule(Cache(tmp_path / "cache"))
    ahead.pixels = FillData(ahead.pixels, caption="caption")
    filled = Fill(ahead.cache, ahead.captions)
    quiet_trainer().predict(filled, datamodule=ahead, return_predictions=False)
    assert filled.totals["entries"] == 2 * 4 + 2 * 2 * 4 + 1  # sides; captions in templates; and none

    training = datamodule(Cache(tmp_path / "cache"))
    trainer = quiet_trainer(callbacks=[OnTheDevice(), VAEOffload()], max_epochs=8, limit_val_batches=0)
    model = LatentModel("prompt_embeds")
    trainer.fit(model, datamodule=training)
    captions = {caption for batch in model.batches("train") for caption in batch["caption"]}
    assert len(captions) > 8
    assert "" in captions
    assert training.encoder.vae.journeys == []
    assert not hasattr(training.text, "journeys")  # nobody has sent it anywhere
    assert training.encoder.vae.chunks == 0

    (photos / "02.txt").write_text("one more")
    write_noise_photos(tmp_path / "more", 1)
    (tmp_path / "more" / "00.png").rename(photos / "03.png")  # another file
    training = datamodule(Cache(tmp_path / "cache"))
    trainer = quiet_trainer(callbacks=[OnTheDevice()], max_epochs=8, limit_val_batches=0)
    trainer.fit(model, datamodule=training)
    assert training.encoder.vae.journeys == ["meta", "cpu"]  # there for what was missing; the data module's teardown
    assert "meta" in training.text.journeys


def test_offloading_in_training_moves_the_autoencoder_alone(pipeline, tmp_path):
    """Captions that are drawn anew are no part of the cache, and the user's own stages see pixels in every epoch."""
    columns = photo_columns(4, caption=list("abcd"), cache_key=list("abcd"))
    vae, text, depth = Travelling(tiny_kl()), TravellingText.from_pretrained(pipeline, dtype="float32"), Depth()
    datamodule = LatentDataModule(
        Photos(columns), PlainEncoder(vae), text=text, captions=Captions(shuffle_tags=True), stages=[depth],
        cache=Cache(tmp_path / "cache"),
    )  # fmt: skip
    model = Where([vae, text, depth])
    trainer = quiet_trainer(callbacks=[OnTheDevice(), VAEOffload()], max_epochs=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match="not cached: captions, whose tags"):
        trainer.fit(model, datamodule=datamodule)
    assert vae.journeys == ["meta", "cpu"]  # away once it had nothing to do, and for good
    assert {places[1] for _, places in model.places} == {places[2] for _, places in model.places} == {"meta"}


class OnGPU(LatentModel):
    def training_step(self, batch, batch_idx):
        text = self.trainer.datamodule.text
        self.devices = {text.device.type, self.trainer.datamodule.encoder.vae.device.type}
        self.train_mib = torch.cuda.memory_allocated()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        text = self.trainer.datamodule.text
        self.val_devices = {text.device.type, self.trainer.datamodule.encoder.vae.device.type}
        self.val_mib = torch.cuda.memory_allocated()
        assert text.encode(["a cat"])["prompt_embeds"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is freed")
def test_on_a_gpu_the_text_encoders_memory_is_freed(pipeline):
    vae, text = FrozenVAE(tiny_kl()), TextEncoder.from_pretrained(pipeline, dtype="float32")
    pixels = Prompts({"pixels": images(4), "index": torch.arange(4), "caption": list("abcd")})
    model = OnGPU()
    trainer = quiet_trainer(callbacks=[VAEOffload(["validate"])], accelerator="gpu", max_epochs=2)
    trainer.fit(model, datamodule=LatentDataModule(pixels, PlainEncoder(vae), text=text))
    assert (model.devices, model.val_devices) == ({"cuda"}, {"cpu"})
    assert model.val_mib < model.train_mib
