"""The callbacks on two ranks: files and log rows once, one choice of ``per_batch``, ranks that read the same images."""

import csv

import pytest
import torch
from running import fork_ranks

SCRIPT = """
import sys
import warnings

import torch
from helpers import LatentModel, Photos, photo_columns, quiet_trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import latentdm.demo_vae
from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule
from latentdm.callbacks import EncodeMonitor, LatentPreview, LatentStats, PerBatchFinder, SamplePreview, VAEOffload
from latentdm.callbacks import latent_preview
from latentdm.preview import preview

torch.set_num_threads(1)
folder = sys.argv[1]
vae = FrozenVAE.from_pretrained(latentdm.demo_vae.__path__[0], dtype="float32")


def fit(name, **settings):
    finder = PerBatchFinder(rounds=1)
    trainer = quiet_trainer(
        strategy="ddp",
        devices=2,
        max_steps=10,
        max_epochs=-1,
        limit_val_batches=0,
        log_every_n_steps=2,
        logger=[TensorBoardLogger(folder, name=name, version="tb"), CSVLogger(folder, name=name, version="csv")],
        callbacks=[EncodeMonitor(), LatentStats(std_range=(0, 99)), LatentPreview(every_n_steps=5), finder],
        **settings,
    )
    finder.candidates = [1] if trainer.global_rank else [2]
    datamodule = LatentDataModule(Photos(photo_columns(48, mask=True), batch_size=2), InpaintEncoder(vae))
    drawn = []
    latent_preview.preview = lambda *batch: drawn.append(trainer.global_step) or preview(*batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(LatentModel(), datamodule=datamodule)
    said = [str(warning.message) for warning in caught if "LatentStats" in str(warning.message)]
    seen = {"said": said, "per_batch": datamodule.encoder.per_batch, "drawn": drawn}
    torch.save(seen, f"{folder}/{name}{trainer.global_rank}.pt")


class Sampler(LatentModel):
    def predict_step(self, batch, batch_idx):
        return batch["latents"]


def fit_and_validate(name):
    trainer = quiet_trainer(
        strategy="ddp",
        devices=2,
        max_steps=2,
        max_epochs=-1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        logger=TensorBoardLogger(folder, name=name, version="tb"),
        callbacks=[SamplePreview(samples=2), VAEOffload(stages=["test"])],
    )
    datamodule = LatentDataModule(Photos(photo_columns(48, mask=True), batch_size=2), InpaintEncoder(vae))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Sampler(), datamodule=datamodule)
    said = [str(warning.message) for warning in caught if "VAEOffload" in str(warning.message)]
    torch.save({"said": said}, f"{folder}/{name}{trainer.global_rank}.pt")


fit("shared")
fit("same", use_distributed_sampler=False)
fit_and_validate("others")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two ranks wrote to."""
    folder = tmp_path_factory.mktemp("ranks")
    fork_ranks(SCRIPT, folder)
    return folder


def seen(ranks, name):
    return [torch.load(ranks / f"{name}{rank}.pt") for rank in (0, 1)]


def test_pictures_are_written_once(ranks):
    written = sorted(path.relative_to(ranks).as_posix() for path in ranks.rglob("previews/*.png"))
    assert written == [f"{name}/tb/previews/step_00000{step}.png" for name in ("same", "shared") for step in (0, 5)]
    assert [rank["drawn"] for rank in seen(ranks, "shared")] == [[0, 5], []]
    assert len(list(ranks.rglob("events.out.tfevents.*"))) == 3


def test_samples_are_written_once_and_offloading_speaks_once(ranks):
    written = sorted(path.name for path in (ranks / "others").rglob("samples/*.png"))
    assert written == ["step_000001.png", "step_000002.png"]
    said = [rank["said"] for rank in seen(ranks, "others")]
    assert [len(messages) for messages in said] == [1, 0]
    assert "has no effect" in said[0][0]


def test_log_rows_are_written_once(ranks):
    with (ranks / "shared" / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for metric in ("encode/batch_ms", "encode/share_of_step_pct", "latents/std", "masks/share_pct"):
        assert [int(row["step"]) for row in rows if row[metric]] == [1, 3, 5, 7, 9]


def test_ranks_agree_on_per_batch(ranks):
    assert [rank["per_batch"] for rank in seen(ranks, "shared")] == [2, 2]  # rank 0's


def test_ranks_that_read_the_same_images_are_noticed_once(ranks):
    said = [rank["said"] for rank in seen(ranks, "same")]
    assert [len(messages) for messages in said] == [1, 0]
    assert "several ranks read the same image" in said[0][0]


def test_ranks_that_share_the_data_set_are_not_warned_of(ranks):
    assert [rank["said"] for rank in seen(ranks, "shared")] == [[], []]
