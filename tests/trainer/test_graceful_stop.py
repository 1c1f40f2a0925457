"""`GracefulStop` and `WholeCheckpoints` in one process: a signal ends a stage after its step, with a checkpoint."""

import os
import signal

import pytest
import torch
from helpers import LatentModel, Photos, complains, photo_columns, quiet_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from latentdm.callbacks import GracefulStop
from latentdm.checkpoints import WholeCheckpoints


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl+C counts, where the tests run in the background of a shell too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Send(Callback):
    """Sends a signal to its own process in one of the hooks, once."""

    def __init__(self, hook, number=signal.SIGTERM, times=1):
        self.number = number
        self.times = times
        setattr(self, hook, self.send)

    def send(self, *_):
        while self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


class Count(LatentModel):
    def __init__(self):
        super().__init__(key="pixels")


def trainer_of(folder, *callbacks, **settings):
    saving = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_exception=True)
    return quiet_trainer(
        callbacks=[*callbacks, GracefulStop(), saving],
        plugins=[WholeCheckpoints()],
        enable_checkpointing=True,
        max_epochs=2,
        **settings,
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end"])
def test_a_fit_ends_after_its_step(hook, number, status, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer, model = trainer_of(tmp_path, Send(hook, number), limit_val_batches=0), Count()
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(model, datamodule=Photos(photo_columns(8)))
    assert stopped.value.code == status
    assert trainer.global_step == len(model.seen["train"]) == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("batch", ["first", "last"])
def test_other_stages_end_after_their_batch(batch, stage, tmp_path):
    """After the last batch Lightning alone forgets the signal, and whatever the program does next begins."""
    hook = {"validate": "validation"}.get(stage, stage)
    send = Send({"first": f"on_{hook}_batch_start", "last": f"on_{hook}_epoch_end"}[batch])
    trainer, model = trainer_of(tmp_path, send), Count()
    with pytest.raises(SystemExit) as stopped:
        getattr(trainer, stage)(model, datamodule=Photos(photo_columns(8)))
    assert stopped.value.code == 143


def test_a_validation_within_a_fit_ends_after_its_batch(tmp_path):
    trainer, model = trainer_of(tmp_path, Send("on_validation_batch_end"), num_sanity_val_steps=0), Count()
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(model, datamodule=Photos(photo_columns(8)))
    assert stopped.value.code == 143
    assert (len(model.seen["train"]), len(model.seen["val"])) == (4, 1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_second_interrupt_ends_a_fit_within_its_step(tmp_path):
    trainer, model = trainer_of(tmp_path, Send("on_before_backward", signal.SIGINT, times=2)), Count()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            trainer.fit(model, datamodule=Photos(photo_columns(8)))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored, as the program is to end
    assert stopped.value.code == 1
    assert trainer.global_step == 0


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    saved, plugin = tmp_path / "last.ckpt", WholeCheckpoints()
    plugin.save_checkpoint({"step": 1}, saved)
    with complains("last.ckpt", "the one before stays", "No space left", "ckpt_path=last"):
        plugin.save_checkpoint({"step": 2, "full": Full()}, saved)
    assert plugin.load_checkpoint(saved) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    with complains("new.ckpt", "there is none before it"):
        plugin.save_checkpoint({"full": Full()}, tmp_path / "new.ckpt")


class Full:
    """Something during whose writing the disk is full."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")
