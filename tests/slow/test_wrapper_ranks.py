"""The wrapper where it is pickled: processes that Lightning spawns."""

import os
import subprocess
import sys

from running import ABORTED_AT_EXIT, ROOT

SCRIPT = """
import warnings

import torch
from helpers import LatentModel, Samples, noise_vae, photo_columns, quiet_trainer
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from latentdm import LatentDataModule, PlainEncoder


class TrainOnly(LightningDataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(Samples(photo_columns(8)), batch_size=self.hparams.batch_size)


class Model(LatentModel):
    def training_step(self, batch, batch_idx):
        assert self.trainer.datamodule.hparams.batch_size == 2
        assert batch["latents"].shape == (2, 4, 4, 4)
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        print(f"rank {self.global_rank}: {self.trainer.global_step} steps", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    datamodule = LatentDataModule(TrainOnly(), PlainEncoder(noise_vae()))
    quiet_trainer(devices=2, strategy="ddp_spawn").fit(Model(), datamodule=datamodule)
"""


def test_train_only_pixels_train_in_spawned_processes(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or ABORTED_AT_EXIT in done.stderr, done.stderr
    for rank in range(2):  # both write at once: where a line ends is chance
        assert f"rank {rank}: 2 steps" in done.stdout
