"""`VAEOffload` moves all frozen networks: text encoders, and what stages of one's own hold, with the autoencoder."""

import pytest
import torch
from helpers import LatentModel, Photos, Travelling, images, photo_columns, quiet_trainer, tiny_kl
from lightning.pytorch import Callback
from tiny_pipelines import save_pipeline
from torch.utils.data import DataLoader

from latentdm import FrozenVAE, LatentDataModule, PlainEncoder, TextEncoder
from latentdm.callbacks import VAEOffload
from latentdm.stages import Stage


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline("sdxl", tmp_path_factory.mktemp("pipeline"))


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
