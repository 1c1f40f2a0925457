"""Trains on buckets and writes down what each rank saw."""

import json
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from latentdm.data import Buckets, PixelDataset
from latentdm.data.loader import PixelLoader
from latentdm.data.order import GlobalOrder, InOrder, RankBatches

torch.set_num_threads(1)
COUNT, BATCH, EPOCHS = 53, 4, 2
SIZES = np.random.default_rng(0).integers(20, 60, (COUNT, 2))
PLAN = Buckets(area=32 * 32, step=8).plan(SIZES)


class Sizes(PixelDataset):
    """Images of the size of their bucket."""

    bucket_of = PLAN.bucket_of

    def __len__(self):
        return COUNT

    def sample(self, position, epoch):
        width, height = PLAN.shape(*SIZES[position].tolist())
        return {"pixels": torch.zeros(3, height, width, dtype=torch.uint8), "index": position, "epoch": epoch}


class Data(LightningDataModule):
    """Buckets for training and predicting."""

    def loader(self, training):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        order = (GlobalOrder if training else InOrder)(Sizes(), BATCH, training, seed=3, **ranks)
        return PixelLoader(Sizes(), batch_sampler=RankBatches(order, BATCH))

    def train_dataloader(self):
        return self.loader(training=True)

    def predict_dataloader(self):
        return self.loader(training=False)


class Witness(LightningModule):
    """Writes down the batches of its rank."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def note(self, stage, batch):
        with Path(f"{self.path}.rank{self.global_rank}").open("a") as file:
            seen = [stage, *batch["pixels"].shape[-2:], batch["index"].tolist(), int(batch["epoch"][0])]
            file.write(json.dumps(seen) + "\n")

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight * 1.0

    def predict_step(self, batch, batch_idx):
        self.note("predict", batch)
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, devices, use_distributed_sampler):
    """Train and predict on ranks that are forks of this process; rank → what it saw."""
    model, data = Witness(f"{folder}/seen"), Data()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        use_distributed_sampler=use_distributed_sampler,
        max_epochs=EPOCHS,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    trainer.predict(model, data)
    files = [Path(f"{folder}/seen.rank{rank}") for rank in range(devices)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
