"""What is told badly elsewhere: wrong packages, wrong kinds, values of megabytes, configs in a notebook."""

import pytest
from helpers import Photos, Samples, complains, images, photo_columns
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import open_dict, read_write
from running import ROOT
from torch.utils.data import DataLoader

from latentdm import LatentDataModule, PlainEncoder
from latentdm.data import PixelDataModule, PixelDataset
from latentdm.data.reading import Reading
from latentdm.data.skips import SampleError
from latentdm.errors import RunError, UserError

OF_THE_OTHER_PACKAGE = type("Base", (), {"__module__": "pytorch_lightning.core.datamodule"})
PIXELS = {
    "pytorch_lightning": (
        type("Data", (OF_THE_OTHER_PACKAGE,), {})(),
        ["got Data of the package pytorch_lightning", "import LightningDataModule and Trainer from lightning.pytorch"],
    ),
    "class": (Photos, ["got the class Photos", "call it"]),
    "loader": (DataLoader(Samples(photo_columns())), ["got DataLoader", "whose train_dataloader returns it"]),
    "dataset": (Samples(photo_columns()), ["got Samples", "LightningDataModule.from_datasets(train_dataset="]),
    "path": ("photos", ["got str"]),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_what_is_no_data_module_is_told_how_to_become_one(kind, vae):
    pixels, parts = PIXELS[kind]
    with complains("LatentDataModule: pixels must be a LightningDataModule, ", *parts, error=TypeError):
        LatentDataModule(pixels, PlainEncoder(vae))


def test_an_encoder_is_asked_for_by_name(vae):
    with complains("encoder must be an Encoder, got FrozenVAE", "PlainEncoder(vae)", error=TypeError):
        LatentDataModule(Photos(photo_columns()), vae)


# -------------------------------------------------------------------- errors cut what they quote

LONG = "x" * 2_000_000


@pytest.mark.parametrize("kind", [UserError, RunError, SampleError])
def test_a_long_error_keeps_its_beginning_and_its_end(kind):
    error = kind(f"cannot read {LONG}; remove it")
    error.owner = "Data"
    assert len(str(error)) < 2_100
    assert str(error).startswith("Data: cannot read xxx")
    assert str(error).endswith("xxx; remove it")
    assert str(kind("short")) == "short"


def test_an_error_of_a_worker_keeps_its_text_whole():
    """Torch puts a traceback in front, of any length, and the loader takes it off."""
    text = f"Caught UserError in worker.\nTraceback (most recent call last):\n{LONG}\nUserError: {'y' * 1500}"
    assert str(UserError(text)) == text


def test_values_of_megabytes_do_not_fill_the_screen(vae, tmp_path):
    datamodule = LatentDataModule(Photos(photo_columns()), PlainEncoder(vae))
    tries = [
        lambda: datamodule.process({f"column {number}": 1 for number in range(100_000)}, "cpu"),
        lambda: PlainEncoder(vae, posterior=LONG),
        lambda: LatentDataModule(Photos(photo_columns()), PlainEncoder(vae), keys={LONG: "x"}),
        lambda: LatentDataModule(Photos(photo_columns()), PlainEncoder(vae), pixel_range=[0] * 1_000_000),
        lambda: datamodule.process({"pixels": images(1), "index": [LONG, LONG]}, "cpu"),
    ]
    for attempt in tries:
        with pytest.raises(UserError) as caught:
            attempt()
        assert 20 < len(str(caught.value)) < 2_100


# -------------------------------------------------------------------- a notebook


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A folder where no Hydra app runs."""
    monkeypatch.chdir(tmp_path)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = None
    yield tmp_path
    HydraConfig.instance().cfg = before


def test_trainer_loggers_and_callbacks_composed_in_a_notebook_work(notebook):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=["trainer.accelerator=cpu"])
    assert cfg.trainer.default_root_dir == "outputs"
    callbacks = {name: instantiate(part) for name, part in cfg.callbacks.items()}
    loggers = [instantiate(part) for part in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=loggers)
    assert trainer.default_root_dir == str(notebook / "outputs") or trainer.default_root_dir == "outputs"
    assert callbacks["latent_preview"].dirpath == "outputs/previews"


def test_in_an_app_it_is_the_run_s_folder(notebook, tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    assert cfg.trainer.default_root_dir == "outputs"  # known of an app alone
    with read_write(cfg.hydra), open_dict(cfg.hydra):
        cfg.hydra.runtime.output_dir = str(tmp_path / "run")
    HydraConfig.instance().set_config(cfg)
    assert cfg.callbacks.sample_preview.dirpath == str(tmp_path / "run" / "samples")


# -------------------------------------------------------------------- a worker's death


class Photographs(PixelDataset):
    def __len__(self):
        return 4

    def name(self, position):
        return f"photo {position}.png"

    def sample(self, position, epoch):
        return {}


def test_a_worker_s_death_in_the_middle_of_a_step_is_in_the_exception_itself():
    data = PixelDataModule(batch_size=1, num_workers=1)
    data.train_set = Photographs()
    data.train_set.owner, data.train_set.reading = "PixelDataModule", Reading(1)
    data.train_set.reading.note(worker=0, process=41, position=2)  # as the worker did before it died
    error = RuntimeError("DataLoader worker (pid 41) is killed by signal: Terminated. ")
    with pytest.warns(UserWarning, match="died while it read photo 2.png"):
        data.on_exception(error)
    assert str(error).startswith("PixelDataModule: a process that reads images died while it read photo 2.png (DataLoa")
    other = RuntimeError("another error")
    data.on_exception(other)
    assert str(other) == "another error"
