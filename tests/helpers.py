"""What the tests share: autoencoders that show their input, a data module and a model as users write them."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from latentdm import FrozenVAE

COLUMNS = [
    "image",
    "mask\nover image",
    "masked\nimage",
    "decoded\nlatents",
    "decoded\nmasked_latents",
    "noise_mask\n+ latent_mask",
    "latents\nas colour",
]
"""What a preview of an inpainting batch shows."""


def tiny_kl(seed=0, **config):
    """A real AutoencoderKL with factor 8 and random weights; encoding one 32² image takes milliseconds."""
    widths = (8, 8, 8, 8)
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**config)


class RecordingAutoencoder(nn.Module):
    """Keeps its inputs. Its latents are its pixels folded 8×8 into channels, so that nothing of them is lost."""

    spatial_compression = 8
    latent_channels = 192

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode(self, x):
        self.seen.append(x.clone())
        return SimpleNamespace(latents=F.pixel_unshuffle(x, 8))

    @property
    def pixels(self):
        """All images that it was given, in order."""
        return torch.cat(self.seen)


class NoiseAutoencoder(nn.Module):
    """Its posterior is the standard normal whatever the image, so the latents *are* the noise, bit for bit."""

    spatial_compression = 8
    latent_channels = 4

    def encode(self, x):
        mean = x.new_zeros(len(x), 4, x.shape[-2] // 8, x.shape[-1] // 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean)))


class Travelling(FrozenVAE):
    """Says that it lies wherever it was last sent, and stays on the CPU."""

    def __init__(self, autoencoder):
        super().__init__(autoencoder, dtype="float32")
        self.place, self.lies_on, self.journeys = torch.device("cpu"), "cpu", []

    @property
    def device(self):
        return getattr(self, "place", torch.device("cpu"))

    def to(self, device, rest=False):
        super().to("cpu")
        if hasattr(self, "journeys"):
            self.place = torch.device(device)
            self.arrive("cpu" if rest else self.place.type)
        return self

    def moments(self, *arguments, **settings):
        self.arrive(self.place.type)
        return super().moments(*arguments, **settings)

    def arrive(self, where):
        if where != self.lies_on:
            self.lies_on = where
            self.journeys.append(where)


def noise_vae():
    return FrozenVAE(NoiseAutoencoder())


def images(count, height=32, width=32, channels=3, seed=0):
    """uint8 ``count channels height width``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def masks(count, height=32, width=32):
    """uint8 ``count 1 height width``: a white box in each, in a place of its own."""
    boxes = torch.zeros(count, 1, height, width, dtype=torch.uint8)
    for number, box in enumerate(boxes):
        top, left = 3 + number % 7, 5 + number % 5
        box[:, top : top + 9, left : left + 12] = 255
    return boxes


class Samples(Dataset):
    """Some columns, each a tensor or list of the same length, as dicts or (``as_tuple``) tuples."""

    def __init__(self, columns, as_tuple=False):
        self.columns = columns
        self.as_tuple = as_tuple

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, place):
        row = {name: column[place] for name, column in self.columns.items()}
        return tuple(row.values()) if self.as_tuple else row


def photo_columns(count=4, index=True, mask=False, **columns):
    """Columns of ``count`` images: pixels and what else is asked for."""
    columns = {"pixels": images(count), **columns}
    if mask:
        columns["mask"] = masks(count)
    if index:
        columns["index"] = torch.arange(count)
    return columns


class Photos(LightningDataModule):
    """A data module as somebody else writes it. The same columns serve every stage, in order."""

    def __init__(self, columns, batch_size=2, as_tuple=False, order=None, **loader):
        super().__init__()
        self.dataset = Samples(columns, as_tuple)
        self.loader = {"batch_size": batch_size, "sampler": order, **loader}

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.loader)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class LatentModel(LightningModule):
    """Trains on latents alone and keeps every batch that a step received."""

    def __init__(self, key="latents"):
        super().__init__()
        self.key = key
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def keep(self, stage, batch):
        self.seen[stage].append((self.current_epoch, batch))
        return batch

    def training_step(self, batch, batch_idx):
        self.keep("train", batch)
        return ((self.scale * batch[self.key]).float() - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.keep("val", batch)

    def test_step(self, batch, batch_idx):
        self.keep("test", batch)

    def predict_step(self, batch, batch_idx):
        return self.keep("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def batches(self, stage):
        return [batch for _, batch in self.seen[stage]]

    def column(self, stage, key="latents", epoch=None):
        """One key of all batches of a stage, or of one of its epochs, joined."""
        return torch.cat([batch[key] for at, batch in self.seen[stage] if epoch in (None, at)])


def quiet_trainer(**settings):
    """A real Trainer on the CPU that writes nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | settings))


def fit(datamodule, model=None, ckpt_path=None, **settings):
    """Fit and return the model."""
    model = model or LatentModel()
    quiet_trainer(**settings).fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return model


def predict(datamodule, model=None, **settings):
    """The batches that predict_step received."""
    return quiet_trainer(**settings).predict(model or LatentModel(), datamodule=datamodule)


def by_index(latents, index):
    """Latents sorted by their samples' ids."""
    return latents[torch.argsort(index)]


@contextmanager
def complains(*parts, error=ValueError):
    """The block raises an error of one line that holds all the parts."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
