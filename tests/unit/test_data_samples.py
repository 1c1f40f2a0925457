"""Crops of the sample photographs: where they come from, what repeats and what does not."""

import numpy as np
import pytest
import torch

from latentdm.data import PixelDataModule, SamplesData
from latentdm.data import samples as samples_module
from latentdm.data.photographs import NAMES, photographs


def loaded(**settings):
    data = SamplesData(**{"size": 32, "batch_size": 4, "epoch_length": 12, "val_length": 10, **settings})
    data.setup()
    return data


def samples(dataset, epoch=0):
    return [dataset[position, epoch] for position in range(len(dataset))]


def test_a_batch():
    data = loaded()
    assert isinstance(data, PixelDataModule)
    batch = next(iter(data.train_dataloader()))
    assert batch["pixels"].shape == (4, 3, 32, 32)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["index"].dtype == torch.int64
    assert set(batch["name"]) <= set(NAMES)
    assert "mask" not in batch
    assert batch["pixels"].float().std() > 10  # photographs, not a flat field


def test_indices_are_distinct_over_training_and_validation():
    data = loaded()
    seen = [sample["index"] for dataset in (data.train_set, data.val_set) for sample in samples(dataset)]
    assert seen == list(range(22))
    assert data.test_set is data.predict_set is data.val_set


def test_the_photographs_take_turns():
    assert [sample["name"] for sample in samples(loaded().train_set)] == [*NAMES, *NAMES[:4]]


def test_training_crops_change_with_the_epoch_and_the_seed_and_validation_crops_with_the_seed_alone():
    first, again, other = loaded(), loaded(), loaded(seed=1)
    for position in range(10):
        train = first.train_set[position, 0]["pixels"]
        assert torch.equal(train, again.train_set[position, 0]["pixels"])
        assert not torch.equal(train, first.train_set[position, 1]["pixels"])
        assert not torch.equal(train, other.train_set[position, 0]["pixels"])
        val = first.val_set[position, 0]["pixels"]
        assert torch.equal(val, first.val_set[position, 1]["pixels"])
        assert not torch.equal(val, other.val_set[position, 0]["pixels"])
        assert not torch.equal(val, train)


def test_validation_crops_stay_when_the_lengths_change():
    longer = loaded(epoch_length=30, val_length=16)
    assert all(torch.equal(longer.val_set[i]["pixels"], loaded().val_set[i]["pixels"]) for i in range(10))


def encoded_coordinates(split):
    """One photograph whose red is x and whose green is y; blue tells the split."""
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    return {"grid": np.stack([x, y, np.full_like(x, 200 if split == "train" else 50)], axis=-1)}


def test_crops_lie_inside_the_photograph_with_sides_between_size_and_twice_size(monkeypatch):
    monkeypatch.setattr(samples_module, "photographs", encoded_coordinates)
    data = loaded(size=64, epoch_length=200, val_length=20)
    sides, lefts, flipped = [], [], []
    for sample in samples(data.train_set):
        pixels = sample["pixels"].float()
        assert pixels.shape == (3, 64, 64)
        assert (pixels[2] == 200).all()
        flipped.append(bool(pixels[0, 0, 0] > pixels[0, 0, -1]))
        # Without the rims, whose filter is cut off, both coordinates grow by the same step: the crop is a square.
        along_x = (pixels[0, 32, 54] - pixels[0, 32, 10]).abs() / 44
        along_y = (pixels[1, 54, 32] - pixels[1, 10, 32]) / 44
        assert abs(along_x - along_y) < 0.05
        sides.append(float(along_x) * 64)
        lefts.append(float(pixels[0, 32].min()))
    assert 62 < min(sides) < 70
    assert 120 < max(sides) < 130
    assert min(lefts) < 10
    assert max(lefts) > 140
    assert 70 < sum(flipped) < 130
    assert all((sample["pixels"][2] == 50).all() for sample in samples(data.val_set))


def test_the_sizes_that_ride_along_say_where_each_pixel_came_from(monkeypatch):
    monkeypatch.setattr(samples_module, "photographs", encoded_coordinates)
    for sample in samples(loaded(size=64, epoch_length=50).train_set):
        assert sample["original_size"].tolist() == [200, 250]
        assert sample["target_size"].tolist() == [64, 64]
        assert {sample[name].dtype for name in ("original_size", "crop_top_left", "target_size")} == {torch.int64}
        x, y = sample["pixels"][:2].float()
        mirrored = bool(x[0, 0] > x[0, -1])
        per_pixel = float(y[54, 32] - y[10, 32]) / 44
        # The centre of the crop is at the same point of the photograph, whichever way it is computed.
        middle = 249 - x[32, 31:33].mean() if mirrored else x[32, 31:33].mean()
        top, left = sample["crop_top_left"].tolist()
        assert abs((top + 32) * per_pixel - float(y[31:33, 32].mean())) < 4
        assert abs((left + 32) * per_pixel - float(middle)) < 4


def test_a_photograph_smaller_than_the_crop_is_enlarged():
    assert min(min(image.shape[:2]) for image in photographs("val").values()) < 200
    assert loaded(size=200, val_length=8).val_set[1]["pixels"].shape == (3, 200, 200)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    def epochs(data):
        seen = []
        loaders = data.train_dataloader(), data.val_dataloader()
        for epoch in range(2):
            for loader in loaders:
                loader.sampler.set_epoch(epoch)
                seen += list(loader)
        return seen

    for mine, theirs in zip(epochs(loaded()), epochs(loaded(num_workers=workers)), strict=True):
        assert torch.equal(mine["pixels"], theirs["pixels"])
        assert torch.equal(mine["index"], theirs["index"])
        assert mine["name"] == theirs["name"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"epoch_length": 0}, "epoch_length must be an integer of at least 1, got 0"),
        ({"val_length": -1}, "val_length must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^SamplesData: {message}$"):
        SamplesData(**settings)


def test_without_validation():
    assert loaded(val_length=0).val_dataloader() == []
