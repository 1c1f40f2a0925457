"""What Lightning sees of a wrapped data module: settings, loaders and attributes are those of whoever has them."""

import pickle
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers import LatentModel, Photos, Samples, fit, photo_columns, quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from latentdm import LatentDataModule, PlainEncoder

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


class Data(LightningDataModule):
    """Its settings have names that the wrapper's have too."""

    def __init__(self, batch_size=3, seed=5, masks="auto", logged=True):
        super().__init__()
        self.save_hyperparameters(ignore="logged", logger=logged)

    def train_dataloader(self):
        return DataLoader(Samples(photo_columns()), batch_size=self.hparams["batch_size"])

    val_dataloader = train_dataloader


class Mine(LatentDataModule):
    """A subclass with settings of its own."""

    def __init__(self, pixels, encoder, batch_size=7, logged=True, **settings):
        super().__init__(pixels, encoder, **settings)
        self.save_hyperparameters("batch_size", logger=logged)


@pytest.fixture
def encoder(vae):
    return PlainEncoder(vae, posterior="mode")


# -------------------------------------------------------------------- settings


def logged_by(datamodule, folder):
    """What a fit writes of the settings, and the checkpoint that it saves."""
    trainer = quiet_trainer(logger=CSVLogger(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an interval of logging that is not reached
        trainer.fit(LatentModel(), datamodule=datamodule)
    trainer.save_checkpoint(folder / "last.ckpt")
    return "".join(file.read_text() for file in folder.rglob("hparams.yaml")), folder / "last.ckpt"


def test_whether_settings_are_logged_is_said_by_whoever_saved_them(encoder, tmp_path):
    cases = {
        "data": LatentDataModule(Data(), encoder),
        "silent data": LatentDataModule(Data(logged=False), encoder),
        "mine": Mine(Data(logged=False), encoder),
        "mine is silent": Mine(Data(), encoder, logged=False),
        "both": Mine(Data(), encoder),
    }
    logged = {}
    for name, datamodule in cases.items():
        text, _ = logged_by(datamodule, tmp_path / name)
        logged[name] = ("seed: 5" in text, "batch_size: 7" in text)
    assert logged == {
        "data": (True, False),
        "silent data": (False, False),
        "mine": (False, True),
        "mine is silent": (False, False),
        "both": (True, True),
    }


def test_settings_of_the_pixels_are_theirs_whenever_they_change(encoder):
    data = Data()
    wrapped = LatentDataModule(data, encoder)
    data.hparams["batch_size"] = 4
    data.save_hyperparameters({"late": True})
    assert wrapped.hparams == data.hparams == {"batch_size": 4, "seed": 5, "masks": "auto", "late": True}
    assert wrapped.hparams_initial == data.hparams_initial
    assert LatentDataModule(Photos(photo_columns()), encoder).hparams == {}


def test_a_subclass_never_writes_into_the_settings_of_the_pixels(encoder):
    data = Data()
    mine = Mine(data, encoder)
    assert mine.hparams == {"batch_size": 7}
    assert data.hparams["batch_size"] == 3
    mine.save_hyperparameters({"late": True})
    mine.hparams["batch_size"] = 9
    assert "late" not in data.hparams
    assert data.hparams["batch_size"] == data.hparams_initial["batch_size"] == 3
    assert mine.hparams_initial == {"batch_size": 7, "seed": 5, "masks": "auto", "late": True}  # what loggers are given


def test_a_checkpoint_gives_each_its_own_settings_back(encoder, tmp_path):
    _, checkpoint = logged_by(LatentDataModule(Data(), encoder, seed=1), tmp_path / "plain")
    assert torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]["seed"] == 5
    restored = LatentDataModule.load_from_checkpoint(checkpoint, pixels=Data(), encoder=encoder)
    assert (restored.seed, restored.masks) == (0, None)
    assert Data.load_from_checkpoint(checkpoint).hparams["batch_size"] == 3

    _, checkpoint = logged_by(Mine(Data(), encoder, batch_size=8), tmp_path / "mine")
    restored = Mine.load_from_checkpoint(checkpoint, pixels=Data(), encoder=encoder)
    assert restored.hparams == {"batch_size": 8}
    assert restored.seed == 0


def test_a_tuner_reaches_settings_that_the_pixels_read(encoder, tmp_path):
    data = Data(batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = Tuner(quiet_trainer(default_root_dir=tmp_path))  # it saves the model while it tries
        wrapped = LatentDataModule(data, encoder)
        size = tuner.scale_batch_size(LatentModel(), datamodule=wrapped, max_trials=2, steps_per_trial=1)
    assert data.hparams["batch_size"] == wrapped.hparams["batch_size"] == size > 2


def test_attributes_that_lightning_gives_to_all_are_the_pixels_own(encoder):
    data = Data()
    wrapped = LatentDataModule(data, encoder)
    data.prepare_data_per_node = False
    data.allow_zero_length_dataloader_with_multiple_devices = True
    data.name = "photos"
    assert wrapped.prepare_data_per_node is False
    assert wrapped.allow_zero_length_dataloader_with_multiple_devices is True
    assert wrapped.name == "photos"
    wrapped.prepare_data_per_node = True
    assert data.prepare_data_per_node is True
    assert not hasattr(wrapped, "batch_size")  # it has none but among its hyperparameters


# -------------------------------------------------------------------- loaders


class TrainOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Samples(photo_columns()), batch_size=2)


def loader_of_four():
    return DataLoader(Samples(photo_columns()), batch_size=2)


class WithValidation(LatentDataModule):
    """A subclass that brings the loader that the pixels lack."""

    def val_dataloader(self):
        return loader_of_four()


class WithAttribute(LatentDataModule):
    """The same, set on the instance."""

    def __init__(self, *args):
        super().__init__(*args)
        self.val_dataloader = loader_of_four


def with_attribute_on_the_pixels(pixels, encoder):
    pixels.val_dataloader = loader_of_four
    return LatentDataModule(pixels, encoder)


@pytest.mark.parametrize("make", [WithValidation, WithAttribute, with_attribute_on_the_pixels])
def test_a_loader_is_found_wherever_it_is_defined(make, encoder):
    assert len(fit(make(TrainOnly(), encoder)).batches("val")) == 2


def test_a_subclass_may_wrap_the_loader_of_the_pixels(encoder):
    class Twice(LatentDataModule):
        def train_dataloader(self):
            return [super().train_dataloader(), super().train_dataloader()]

    assert [len(loader) for loader in Twice(Photos(photo_columns()), encoder).train_dataloader()] == [2, 2]


@pytest.mark.parametrize("copy", [lambda wrapped: pickle.loads(pickle.dumps(wrapped)), deepcopy])
def test_a_copy_has_the_loaders_of_the_pixels_and_no_others(copy, encoder):
    def defined(module):
        return [name for name in LOADERS if is_overridden(name, module)]

    assert defined(copy(LatentDataModule(TrainOnly(), encoder))) == ["train_dataloader"]
    assert defined(copy(WithValidation(TrainOnly(), encoder))) == ["train_dataloader", "val_dataloader"]
    assert defined(copy(LatentDataModule(Photos(photo_columns()), encoder))) == list(LOADERS)
    wrapped = copy(LatentDataModule(Data(), encoder))
    assert wrapped.hparams["seed"] == 5
    wrapped.hparams["seed"] = 6
    assert wrapped.pixels.hparams["seed"] == 6  # shared by the copies, not with the original
    with pytest.warns(UserWarning, match="Skipping val loop"):
        assert fit(copy(LatentDataModule(TrainOnly(), encoder))).batches("train")


def test_lightning_s_partial_loaders_are_seen_as_without_the_wrapper(encoder):
    pixels = TrainOnly()
    pixels.test_dataloader = partial(loader_of_four)
    assert is_overridden("test_dataloader", LatentDataModule(pixels, encoder))
    pixels.test_dataloader = None
    assert not is_overridden("test_dataloader", LatentDataModule(pixels, encoder))
