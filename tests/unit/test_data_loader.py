"""The loader: it goes on where a state was saved, and says what a worker that died was reading."""

import os
import signal
import tempfile
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from bucket_ranks import BATCH, COUNT, Sizes

from latentdm.data import GlobalOrder, PixelDataModule, PixelDataset, SampleError
from latentdm.data.loader import PixelLoader, explained, explanation
from latentdm.data.order import RankBatches
from latentdm.data.reading import Reading
from latentdm.errors import UserError


class Indexes(PixelDataset):
    """Samples of nothing but their index and epoch."""

    def __len__(self):
        return COUNT

    def sample(self, position, epoch):
        return {"index": position, "epoch": epoch}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [Sizes, Indexes])
def test_the_loader_goes_on_where_a_state_was_saved(kind, num_workers):
    def make(num_workers):
        order = RankBatches(GlobalOrder(kind(), BATCH, seed=3), BATCH)
        return PixelLoader(kind(), batch_sampler=order, num_workers=num_workers)

    def epoch_of(loader, epoch=0):
        loader.sampler.set_epoch(epoch)
        return [batch["index"].tolist() for batch in loader]

    first, whole = make(num_workers), epoch_of(make(num_workers))
    batches = iter(first)
    seen = [next(batches)["index"].tolist() for _ in range(4)]
    second = make(num_workers)
    second.load_state_dict(first.state_dict())
    assert len(second) == len(whole)
    assert seen + epoch_of(second) == whole
    assert epoch_of(second) == whole  # once
    third = make(num_workers)
    third.load_state_dict(second.state_dict())  # saved at the end of an epoch: the next one is whole
    assert len(epoch_of(third, epoch=1)) == len(whole)


class Deadly(PixelDataset):
    def __len__(self):
        return 4

    def name(self, position):
        return f"photo {position}.png"

    def sample(self, position, epoch):
        if position == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"pixels": torch.zeros(3, 4, 4, dtype=torch.uint8), "index": position}


@pytest.mark.parametrize(("length", "told"), [(75, False), (76, True)])
def test_a_folder_whose_name_leaves_no_room_for_sockets_is_told(length, told, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/".ljust(length, "x"))
    loader = PixelLoader(Indexes(), batch_sampler=RankBatches(GlobalOrder(Indexes(), BATCH), BATCH), num_workers=1)
    if told:
        with pytest.raises(UserError, match=r"PixelLoader: workers .* longer than the 75 bytes .* TMPDIR"):
            next(iter(loader))
    else:
        os.makedirs(tempfile.tempdir, exist_ok=True)
        assert len(next(iter(loader))["index"]) == BATCH
        os.rmdir(tempfile.tempdir)


@pytest.mark.parametrize("buckets", [None, np.zeros(4, dtype=np.int32)])
def test_a_worker_that_dies_is_named_with_what_it_read_and_what_to_do(buckets):
    data = PixelDataModule(batch_size=1, num_workers=1, on_error="skip")
    data.predict_set = Deadly()
    data.predict_set.bucket_of = buckets
    what = r"^PixelDataModule: a process that reads images died while it read photo 2.png \(DataLoader worker.* "
    with pytest.raises(RuntimeError, match=what + r"(exited unexpectedly|killed).*num_workers"):
        list(data.predict_dataloader())


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_explained(error):
    dataset = Deadly()
    dataset.owner, dataset.reading = "PixelDataModule", Reading(1)
    dataset.reading.note(worker=0, process=41, position=2)  # as the worker did before it died
    message = explanation(error, dataset)
    assert message.startswith("PixelDataModule: a process that reads images died while it read photo 2.png (DataLoad")
    assert "num_workers" in message


def test_the_signal_of_a_death_that_comes_after_a_lost_connection_is_waited_for():
    def batches():
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    def killed(number, frame):
        raise RuntimeError("DataLoader worker (pid 41) is killed by signal: Killed. ")

    dataset = Deadly()
    dataset.reading = Reading(1)
    dataset.reading.note(worker=0, process=41, position=2)
    before = signal.signal(signal.SIGALRM, killed)
    try:
        with pytest.raises(
            RuntimeError, match=r"died while it read photo 2.png \(DataLoader worker \(pid 41\) is killed"
        ):
            list(explained(batches(), dataset))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_dies_in_the_middle_of_a_step_is_explained():
    data = PixelDataModule(batch_size=1, num_workers=1)
    data.train_set = Deadly()
    data.train_dataloader()
    with pytest.warns(UserWarning, match=r"^PixelDataModule: a process that reads images died \(DataLoader worker"):
        data.on_exception(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "))
    data.on_exception(RuntimeError("another error"))


class Wrong(PixelDataset):
    def __len__(self):
        return 4

    def sample(self, position, epoch):
        kind = SampleError if position else UserError
        raise kind(f"cannot read photo {position}.png: it is a song; remove it")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("position", "kind"), [(0, UserError), (2, SampleError)])
def test_what_a_worker_raises_is_told_in_its_words_with_the_class_named_once(workers, position, kind):
    data = PixelDataModule(batch_size=1, num_workers=workers)
    data.predict_set = Wrong()
    loader, before = data.predict_dataloader(), active_children()
    loader.load_state_dict(loader.state_dict() | {"steps": [[1, position]]})
    with pytest.raises(kind) as caught:
        list(loader)
    assert set(active_children()) <= set(before)  # though the traceback is kept
    assert type(caught.value) is kind
    assert str(caught.value) == f"PixelDataModule: cannot read photo {position}.png: it is a song; remove it"


def test_a_dataset_by_itself_names_its_own_class():
    with pytest.raises(SampleError, match=r"^Wrong: cannot read photo 1.png"):
        Wrong()[1]
