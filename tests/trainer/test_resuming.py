"""A fit that is broken off and goes on sees what it would have seen: samples, noise and weights."""

import re
import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
from four_sources import digests
from helpers import LatentModel, Samples, noise_vae, photo_columns, quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from latentdm import LatentDataModule, PlainEncoder
from latentdm.data import PixelDataModule, PixelDataset
from latentdm.draws import sample_generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model:UserWarning"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint:UserWarning"),
]
COUNT, BATCH = 26, 4
STEPS = COUNT // BATCH  # an epoch's


class Tiles(PixelDataset):
    """Tiny noise images that follow from (index, epoch)."""

    def __init__(self, count, bucket_of=None):
        self.count, self.bucket_of = count, bucket_of

    def __len__(self):
        return self.count

    def sample(self, position, epoch):
        generator = sample_generator(0, epoch, position, "crop")
        return {"pixels": torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8), "index": position}


class TilesData(PixelDataModule):
    def __init__(self, batch_size=BATCH, num_workers=0, seed=0, count=COUNT, buckets=False):
        super().__init__(batch_size, num_workers, seed)
        self.count, self.buckets = count, buckets

    def setup(self, stage=None):
        self.train_set = Tiles(self.count, np.arange(self.count) % 3 if self.buckets else None)
        self.val_set = Tiles(5)


class Stopped(Exception):
    pass


class Learner(LatentModel):
    """Keeps digests of what it trained on; fails at one of its batches, in its step or after it."""

    def __init__(self, fail_at=None, after=False):
        super().__init__()
        self.fail_at, self.after, self.trained = fail_at, after, []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.fail_at and not self.after:
            raise Stopped
        self.trained.append((self.trainer.fit_loop.epoch_progress.current.processed, digests(batch)))
        return ((self.scale * batch["latents"]).float() - 1).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.trained) == self.fail_at and self.after:
            raise Stopped


def fit(tmp_path=None, callbacks=(), fail_at=None, after=False, ckpt_path=None, data=None, pixels=None, **settings):
    """The model, trained or stopped."""
    model = Learner(fail_at, after)
    datamodule = LatentDataModule(pixels or TilesData(**(data or {})), PlainEncoder(noise_vae()))
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0, "callbacks": list(callbacks)} | settings
    trainer = quiet_trainer(enable_checkpointing=bool(callbacks), default_root_dir=tmp_path, **settings)
    if fail_at is None:
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    else:
        with pytest.raises(Stopped):
            trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return model


def saving(kind, folder):
    """The callbacks that save, and the batches of the last checkpoint where the fit fails after ``2 · STEPS − 1``."""
    name = {"dirpath": folder, "filename": "saved", "save_top_k": 1, "monitor": None}
    if kind == "steps":
        return [ModelCheckpoint(**name, every_n_train_steps=3)]
    if kind == "epochs":
        return [ModelCheckpoint(**name, every_n_epochs=1, save_on_train_epoch_end=True)]
    if kind == "validation":
        return [ModelCheckpoint(**name, every_n_epochs=1, save_on_train_epoch_end=False)]
    return [OnExceptionCheckpoint(folder, "saved")]


RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_epochs": -1, "max_steps": 3 * STEPS - 2},
    "time": {"max_time": timedelta(hours=1), "max_epochs": 3},
}
SETTINGS = {
    "plain": {},
    "validation in between": {"val_check_interval": 0.5},
    "limited": {"limit_train_batches": STEPS - 1},
    "accumulating": {"accumulate_grad_batches": 2},
}


def resumed_equals_straight(kind, tmp_path, at, **settings):
    straight = fit(**settings)
    first = fit(tmp_path, saving(kind, tmp_path), fail_at=at, after=kind == "callback", **settings)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    rest = fit(tmp_path, ckpt_path=tmp_path / "saved.ckpt", **settings)
    begun = len(straight.trained) - len(rest.trained)
    assert first.trained[:begun] + rest.trained == straight.trained
    assert 0 < begun <= len(first.trained)
    if kind in ("exception", "callback"):
        assert begun == len(first.trained)
    return straight, rest, saved


@pytest.mark.parametrize("kind", ["steps", "epochs", "validation", "exception", "callback"])
@pytest.mark.parametrize("run", RUNS)
def test_a_fit_goes_on_from_any_checkpoint_of_any_run(run, kind, tmp_path):
    straight, rest, _ = resumed_equals_straight(kind, tmp_path, 2 * STEPS - 2, **RUNS[run])
    assert torch.equal(rest.scale, straight.scale)


@pytest.mark.parametrize("kind", ["epochs", "exception"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "plain"])
@pytest.mark.parametrize("run", ["epochs", "steps"])
def test_and_with_any_setting(setting, kind, run, tmp_path):
    settings = {**RUNS[run], **SETTINGS[setting]}
    if setting == "accumulating" and run == "steps":
        settings["max_steps"] = 7
    resumed_equals_straight(kind, tmp_path, 2 * STEPS - 3, **settings)


@pytest.mark.parametrize("kind", ["steps", "epochs"])
@pytest.mark.parametrize("data", [{"buckets": True}, {"num_workers": 2}], ids=["buckets", "workers"])
def test_and_with_buckets_or_workers(data, kind, tmp_path):
    resumed_equals_straight(kind, tmp_path, 10, data=data, **RUNS["steps"])


@pytest.mark.parametrize("at", [1, STEPS, STEPS + 1])
@pytest.mark.parametrize("kind", ["exception", "callback"])
def test_at_either_side_of_an_epoch_s_end(kind, at, tmp_path):
    resumed_equals_straight(kind, tmp_path, at, **RUNS["steps"])


class AtEpochStart(Callback):
    """Saves where an epoch begins, and stops there."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_start(self, trainer, pl_module):
        if pl_module.trained:
            trainer.save_checkpoint(self.path)
            raise Stopped


def test_a_checkpoint_of_an_epoch_s_start_leaves_nothing_out(tmp_path):
    straight = fit()
    first = fit(tmp_path, [AtEpochStart(tmp_path / "saved.ckpt")], fail_at=99)
    rest = fit(ckpt_path=tmp_path / "saved.ckpt")
    assert first.trained + rest.trained == straight.trained


@pytest.mark.parametrize("settings", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": STEPS + 2}])
def test_two_fits_one_after_the_other_see_the_same(settings):
    datamodule = LatentDataModule(TilesData(num_workers=1), PlainEncoder(noise_vae()))
    seen = []
    for _ in range(2):
        model = Learner()
        quiet_trainer(**settings).fit(model, datamodule=datamodule)
        seen.append(model.trained)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "stops",
    [
        [("exception", 3), ("callback", 2), ("callback", 3), ("exception", 1)],
        [("callback", STEPS), ("callback", 2), ("exception", 2)],
        [("exception", STEPS - 1), ("callback", 1), ("callback", 1)],
    ],
)
@pytest.mark.parametrize("run", ["epochs", "steps"])
def test_a_resumed_fit_may_be_resumed_again(run, stops, tmp_path):
    straight = fit(**RUNS[run])
    trained, path = [], None
    for kind, at in stops:
        some = fit(tmp_path, saving(kind, tmp_path), at, kind == "callback", path, **RUNS[run])
        trained += some.trained
        path = (tmp_path / "saved.ckpt").rename(tmp_path / f"{len(trained)}.ckpt")
    assert trained + fit(ckpt_path=path, **RUNS[run]).trained == straight.trained


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("buckets", [False, True])
def test_with_another_batch_size_the_epoch_s_other_samples_follow(batch_size, buckets, tmp_path):
    data = {"count": 48, "buckets": buckets}
    first = fit(tmp_path, saving("exception", tmp_path), fail_at=5, data=data)
    with pytest.warns(UserWarning, match=f"^TilesData: .*had 4 samples a step.*now {batch_size}. The 28 of 48 samples"):
        rest = fit(ckpt_path=tmp_path / "saved.ckpt", data={**data, "batch_size": batch_size}, max_epochs=2)
    of_epoch = [[sample for at, samples in rest.trained if at == epoch for sample in samples] for epoch in (0, 1)]
    straight = fit(data=data, max_epochs=2)
    whole = [{sample for at, samples in straight.trained if at == epoch for sample in samples} for epoch in (0, 1)]
    seen = [sample for _, samples in first.trained for sample in samples]
    assert set(seen + of_epoch[0]) <= whole[0]
    assert len(set(seen + of_epoch[0])) == len(seen + of_epoch[0]) >= 48 - batch_size
    assert set(of_epoch[1]) == whole[1]


class Foreign(LightningDataModule):
    """Shuffles as PyTorch's own sampler does; its loader keeps no state."""

    def train_dataloader(self):
        tiles = Samples(photo_columns(COUNT))
        order = DistributedSampler(tiles, num_replicas=1, rank=0)
        return DataLoader(tiles, BATCH, sampler=order, drop_last=True)

    def val_dataloader(self):
        return DataLoader(Samples(photo_columns(2)))


class ForeignStream(Foreign):
    """Has no length."""

    def train_dataloader(self):
        return DataLoader(Stream(), BATCH)


class Stream(IterableDataset):
    def __iter__(self):
        tiles = Samples(photo_columns(STEPS * BATCH))
        return (tiles[number] for number in range(STEPS * BATCH))


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")  # Lightning's
@pytest.mark.parametrize(
    ("kind", "run", "validations", "told"),
    [
        ("exception", "epochs", 1, "goes on after 2 batches of this epoch.*stateful_dataloader.StatefulDataLoader"),
        ("exception", "steps", 1, "goes on after 2 batches of this epoch.*stateful_dataloader.StatefulDataLoader"),
        ("epochs", "steps", 1, "from the end of an epoch.*where DataLoader is.*Set max_epochs"),
        ("epochs", "steps", 0, "from the end of an epoch.*where DataLoader is.*Set max_epochs"),
        ("epochs", "epochs", 1, None),
    ],
)
def test_a_foreign_loader_without_a_state_is_told_of_once_and_keeps_one_clock(kind, run, validations, told, tmp_path):
    settings = {"pixels": Foreign(), "limit_val_batches": validations, **RUNS[run]}
    whole = fit(**settings | {"max_epochs": 4, "max_steps": -1})
    fit(tmp_path, saving(kind, tmp_path), fail_at=STEPS + 2, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = fit(ckpt_path=tmp_path / "saved.ckpt", **settings)
    # Whatever of an epoch is seen again or left out, a batch meets the noise of the epoch that ordered it.
    assert all(batch in whole.trained for batch in rest.trained)
    ours = [text for text in map(str, (each.message for each in caught)) if text.startswith("LatentDataModule")]
    assert len(ours) == (told is not None)
    assert told is None or re.search(told, ours[0])


def test_of_a_foreign_stream_nothing_is_lost_and_nothing_told(tmp_path):
    settings = {"pixels": ForeignStream(), "limit_val_batches": 0, **RUNS["steps"]}
    straight = fit(**settings)
    fit(tmp_path, saving("epochs", tmp_path), fail_at=STEPS + 2, **settings)
    assert fit(ckpt_path=tmp_path / "saved.ckpt", **settings).trained == straight.trained[STEPS:]


def test_a_state_holds_plain_values(tmp_path):
    fit(tmp_path, saving("exception", tmp_path), fail_at=5)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    (state,) = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state == {"epoch": 0, "steps": [[BATCH, 5]], "samples": 5 * BATCH}
    settings = {"seed": 0, "count": COUNT, "buckets": False, "training samples": COUNT}
    assert saved["LatentDataModule"] == {"settings": settings}


@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_settings_that_have_changed_are_named_whenever_the_checkpoint_was_saved(kind, tmp_path):
    fit(tmp_path, saving(kind, tmp_path), fail_at=STEPS + 2)
    with pytest.warns(UserWarning, match=r"^TilesData: .* seed=0 \(now 1\)\. What"):
        fit(ckpt_path=tmp_path / "saved.ckpt", data={"seed": 1})


@pytest.mark.parametrize("run", ["epochs", "steps"])
def test_without_a_state_of_ours_lightning_s_count_of_batches_serves(run, tmp_path):
    straight = fit(**RUNS[run])
    first = fit(tmp_path, saving("exception", tmp_path), fail_at=STEPS + 2, **RUNS[run])
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    del saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(saved, tmp_path / "foreign.ckpt")
    with pytest.warns(
        UserWarning, match="^TilesData: .* no state of this loader, so it goes on after 2 batches of epoch 1"
    ):
        rest = fit(ckpt_path=tmp_path / "foreign.ckpt", **RUNS[run])
    assert first.trained + rest.trained == straight.trained
