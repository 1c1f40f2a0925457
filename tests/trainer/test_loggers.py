"""Pictures in loggers as people have them: real ones, offline."""

import re

import pytest
from helpers import LatentModel, Photos, photo_columns, quiet_trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from latentdm import InpaintEncoder, LatentDataModule
from latentdm.callbacks import LatentPreview, LatentStats

of_others = pytest.mark.filterwarnings("ignore")  # these packages warn of what they call themselves


def fit(vae, logger):
    """Two steps with a figure and a picture each."""
    dm = LatentDataModule(Photos(photo_columns(4, mask=True)), InpaintEncoder(vae))
    callbacks = [LatentStats(), LatentPreview(every_n_steps=1, samples=1)]
    trainer = quiet_trainer(max_steps=2, log_every_n_steps=1, logger=logger, callbacks=callbacks)
    trainer.fit(LatentModel(), datamodule=dm)
    return trainer


def test_csv_takes_no_pictures_and_the_files_lie_beside_it(vae, tmp_path):
    fit(vae, CSVLogger(tmp_path, name="", version=""))
    assert "latents/std" in (tmp_path / "metrics.csv").read_text(encoding="utf-8")
    assert len(list((tmp_path / "previews").glob("*.png"))) == 2


@of_others
def test_weights_and_biases_offline_has_the_pictures(vae, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="not installed: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    try:
        fit(vae, logger)
        [folder] = tmp_path.glob("wandb/offline-run-*")
        names = sorted(path.name for path in folder.rglob("media/images/*.png"))
        assert [name.partition("_")[0] for name in names] == ["preview"] * 2
        assert "latents/std" in logger.experiment.summary.keys()  # noqa: SIM118
    finally:
        wandb.finish()


@of_others
def test_mlflow_in_a_local_database_has_the_pictures(vae, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="not installed: pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="not installed: pip install mlflow, which mlflow-skinny is not")
    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    fit(vae, logger)
    images = logger.experiment.list_artifacts(logger.run_id, "images")
    steps = {re.search(r"preview\Wstep\W(\d+)", file.path)[1] for file in images if file.path.endswith(".png")}
    assert steps == {"0", "1"}
    assert "latents/std" in logger.experiment.get_run(logger.run_id).data.metrics
