"""A worker that is ended by a signal in the middle of a step: the exception of the run says what it was reading."""

import os
import signal
from threading import Event

import pytest
import torch
from helpers import LatentModel, noise_vae, quiet_trainer

from latentdm import LatentDataModule, PlainEncoder
from latentdm.data import PixelDataModule, PixelDataset


class Ended(PixelDataset):
    """What it reads at last ends its worker, as a system that is short of memory does."""

    def __len__(self):
        return 8

    def name(self, position):
        return f"photo {position}.png"

    def sample(self, position, epoch):
        if torch.utils.data.get_worker_info() is not None and position == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            Event().wait()
        return {"pixels": torch.zeros(3, 32, 32, dtype=torch.uint8), "index": position}


class Data(PixelDataModule):
    def setup(self, stage=None):
        self.train_set = Ended()


class Patient(LatentModel):
    """A step that lasts until the worker is gone."""

    def training_step(self, batch, batch_idx):
        Event().wait(1)
        return super().training_step(batch, batch_idx)


def test_a_worker_that_is_told_to_end_is_named_by_the_exception_itself():
    datamodule = LatentDataModule(Data(batch_size=1, num_workers=1), PlainEncoder(noise_vae()))
    told = r"^Data: a process that reads images died while it read photo 5.png \(DataLoader worker .* Terminated"
    with pytest.warns(UserWarning, match=told), pytest.raises(RuntimeError, match=told):
        quiet_trainer(limit_val_batches=0).fit(Patient(), datamodule=datamodule)
