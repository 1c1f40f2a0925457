"""A folder in a fit: neither workers nor the batch size change a sample."""

import numpy as np
import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch import LightningModule
from PIL import Image

from latentdm.data import ImageFolderData


class Recorder(LightningModule):
    """Keeps the batches of every step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches = []

    def training_step(self, batch, _):
        self.batches.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, _):
        self.batches.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def photos(tmp_path):
    """Eight images of noise, each with a mask of noise."""
    (tmp_path / "masks").mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        for path, shape in ((f"{number}.png", (20, 60, 3)), (f"masks/{number}.png", (20, 60))):
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / path)
    return tmp_path


def batches_of_a_fit(root, **settings):
    recorder = Recorder()
    data = ImageFolderData(root, **{"size": 16, "batch_size": 3, "flip": True, **settings})
    quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(recorder, datamodule=data)
    return recorder.batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(photos, workers):
    mine, theirs = batches_of_a_fit(photos), batches_of_a_fit(photos, num_workers=workers)
    for one, other in zip(mine, theirs, strict=True):
        assert one["name"] == other["name"]
        assert all(torch.equal(one[key], other[key]) for key in ("pixels", "mask", "index"))


def test_a_sample_s_crop_does_not_depend_on_the_batch_size(photos):
    def by_index(batches):
        return {int(i): pixels for i, pixels in zip(batches[0]["index"], batches[0]["pixels"], strict=True)}

    small, large = (by_index(batches_of_a_fit(photos, batch_size=size)) for size in (1, 6))
    assert len(small) == 1
    for index, pixels in small.items():
        assert torch.equal(pixels, large[index])
