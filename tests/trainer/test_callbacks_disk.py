"""A full disk, or a folder that cannot be written, costs pictures and not the run."""

import logging
import os

import pytest
from helpers import LatentModel, Photos, photo_columns, quiet_trainer
from lightning.pytorch.loggers import Logger

from latentdm import InpaintEncoder, LatentDataModule
from latentdm.callbacks import LatentPreview, SamplePreview

FULL = "/dev/full"
pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason="Linux has a device that is always full")


class Sampling(LatentModel):
    def predict_step(self, batch, batch_idx):
        return batch["latents"]


class Wandb(Logger):
    """Takes images, as the logger of Weights & Biases does."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.images = []

    def log_image(self, key, images, step=None):
        self.images.append((key, step))

    def log_metrics(self, metrics, step=None):
        pass

    log_hyperparams = log_metrics


def full(folder, steps):
    """A folder whose files of these steps end on a full disk."""
    folder.mkdir()
    for step in steps:
        (folder / f"step_{step:06d}.png").symlink_to(FULL)
    return folder


def run(vae, callback, **settings):
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "log_every_n_steps": 1} | settings
    trainer = quiet_trainer(callbacks=[callback], **settings)
    encoder = InpaintEncoder(vae, posterior="mode")
    trainer.fit(Sampling(), datamodule=LatentDataModule(Photos(photo_columns(mask=True)), encoder))
    return trainer


def test_a_full_disk_is_warned_of_once_and_pictures_are_counted(vae, tmp_path, caplog):
    folder, wandb = full(tmp_path / "pictures", (0, 2)), Wandb()
    expected = r"LatentPreview: cannot write .*step_000000.png: No space left on device; training goes on"
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=expected) as caught:
        trainer = run(vae, LatentPreview(every_n_steps=2, dirpath=folder), logger=wandb)
    assert trainer.global_step == 6
    assert len([warning for warning in caught if "LatentPreview" in str(warning.message)]) == 1
    assert any("LatentPreview: 2 pictures could not be written" in record.message for record in caplog.records)
    assert (folder / "step_000004.png").stat().st_size > 1000  # there was room again
    assert wandb.images == [("preview", 0), ("preview", 2), ("preview", 4)]


class Full(Wandb):
    """A logger that writes to a full disk."""

    def log_image(self, key, images, step=None):
        super().log_image(key, images, step)
        raise OSError(28, "No space left on device")


def test_a_logger_on_a_full_disk_is_no_end_either(vae, tmp_path):
    loggers = [Full(), Wandb()]
    with pytest.warns(UserWarning, match="LatentPreview: cannot write to Full: No space left on device") as caught:
        run(vae, LatentPreview(every_n_steps=2, dirpath=tmp_path), logger=loggers)
    assert len([warning for warning in caught if "LatentPreview" in str(warning.message)]) == 1
    assert loggers[0].images == loggers[1].images == [("preview", 0), ("preview", 2), ("preview", 4)]
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_samples_too(vae, tmp_path):
    folder = full(tmp_path / "samples", (4,))
    callback = SamplePreview(dirpath=folder)
    with pytest.warns(UserWarning, match="SamplePreview: cannot write .*step_000004.png: No space left"):
        run(vae, callback)
    assert callback.latest == folder / "step_000006.png"
    with pytest.warns(UserWarning, match="cannot write"):
        run(vae, last := SamplePreview(dirpath=full(tmp_path / "none", (2,))), max_epochs=1)
    assert last.latest is None


def test_a_file_where_the_folder_should_be_is_no_end_either(vae, tmp_path):
    (tmp_path / "pictures").write_text("a file")
    with pytest.warns(UserWarning, match="LatentPreview: cannot write .*exists"):
        assert run(vae, LatentPreview(dirpath=tmp_path / "pictures"), max_epochs=1).global_step == 2


def test_a_command_that_cannot_write_its_picture_says_so_in_a_line(tmp_path, capsys, monkeypatch):
    from latentdm.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.png").symlink_to(FULL)
    options = ["--samples", "1", "--device", "cpu", "pixels.size=32", "pixels.batch_size=1"]
    assert main(["preview", "--output", "full.png", *options]) == 1
    assert "latentdm preview: --output full.png: cannot write it: No space left on device" in capsys.readouterr().err
