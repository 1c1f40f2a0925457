"""A data module of numbered noise images, and a model that keeps what every step received."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from latentdm.data import PixelDataModule, PixelDataset
from latentdm.draws import sample_generator


class Numbers(PixelDataset):
    """Tiny noise images that follow from (index, epoch)."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def sample(self, position, epoch):
        generator = sample_generator(0, epoch, position, "crop")
        pixels = torch.randint(256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        return {"pixels": pixels, "index": position, "name": f"{position}", "epoch": epoch}


class NumbersData(PixelDataModule):
    def __init__(self, train=10, val=5, **settings):
        super().__init__(**{"batch_size": 4, **settings})
        self.counts = train, val

    def setup(self, stage=None):
        train, val = self.counts
        self.train_set = Numbers(train)
        self.val_set = self.test_set = self.predict_set = Numbers(val) if val else None


class Recorder(LightningModule):
    """Keeps what every step received, as it was received."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append((self.current_epoch, batch))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append((self.current_epoch, batch))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append((self.current_epoch, batch))

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append((self.current_epoch, batch))
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def of(self, stage, key, epoch=None):
        values = [batch[key] for e, batch in self.seen[stage] if epoch in (None, e)]
        return torch.cat(values)


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0, **quiet, **settings}
    )


def fit(data, **settings):
    recorder = Recorder()
    trainer(**settings).fit(recorder, datamodule=data)
    return recorder
