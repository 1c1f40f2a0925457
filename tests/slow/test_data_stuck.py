"""Processes of the loader that stand still: stopped by a signal, or waiting for storage that does not answer."""

import os
import signal
from time import monotonic, sleep

import pytest
from PIL import Image

from latentdm.data import ImageFolderData, PixelDataModule, PixelDataset
from latentdm.data.watch import working


class Stopping(PixelDataset):
    """Samples one of which stops the process that reads it."""

    def __len__(self):
        return 8

    def name(self, position):
        return f"picture {position}"

    def sample(self, position, epoch):
        if position == 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"index": position}


class StoppingData(PixelDataModule):
    def setup(self, stage=None):
        self.predict_set = Stopping()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_worker_ends_the_run_with_what_it_read(workers):
    data = StoppingData(batch_size=2, num_workers=workers, read_timeout=1)
    data.setup()
    batches = iter(data.predict_dataloader())
    with pytest.raises(
        RuntimeError,
        match=r"^StoppingData: the processes that read images stood still while they read picture 5, for longer than "
        r"read_timeout=1 seconds, and were ended\. .*; for slow storage set a longer read_timeout$",
    ):
        list(batches)


def test_workers_that_only_wait_for_their_turn_go_on(tmp_path):
    """Each sample takes longer than PyTorch's timeout; none takes longer than a file may."""
    for number in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    data = ImageFolderData(tmp_path, size=8, batch_size=4, val_share=0, num_workers=1, read_timeout=0.2)
    data.setup()
    batches = iter(data.predict_dataloader())
    assert len(next(batches)["index"]) == 4


class Downloading(PixelDataset):
    """Samples that a library downloads in silence, longer than a file may take."""

    def __init__(self, works):
        self.works = works

    def __len__(self):
        return 2

    def name(self, position):
        return f"picture {position}"

    def sample(self, position, epoch):
        return {"index": next(working(self.download(position)))}

    def download(self, position):
        ends = monotonic() + 6
        while monotonic() < ends:
            if not self.works:
                sleep(0.1)
        yield position


@pytest.mark.parametrize("works", [True, False])
def test_a_silent_download_is_no_standstill_as_long_as_it_takes_the_processor_s_time(monkeypatch, works):
    monkeypatch.setattr("latentdm.data.watch.DECODING_S", 1.0)
    monkeypatch.setattr("latentdm.data.watch.WORKING_POLL_S", 0.5)
    monkeypatch.setattr("latentdm.data.watch.WORKING_S", 0.05)
    data = StoppingData(batch_size=2, num_workers=1, read_timeout=1)
    data.setup()
    data.predict_set = Downloading(works)
    if works:
        assert [batch["index"].tolist() for batch in data.predict_dataloader()] == [[0, 1]]
    else:
        with pytest.raises(RuntimeError, match="stood still while they read picture 0"):
            list(data.predict_dataloader())
