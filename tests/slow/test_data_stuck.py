"""Processes of the loader that stand still: stopped by a signal, or waiting for storage that does not answer."""

import os
import signal

import pytest
from PIL import Image

from latentdm.data import ImageFolderData, PixelDataModule, PixelDataset


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
