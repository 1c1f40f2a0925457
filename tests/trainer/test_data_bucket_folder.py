"""A folder in buckets: images, masks and transparency stay aligned, and the sizes that ride along are true."""

import logging

import numpy as np
import pytest
import torch
from helpers import LatentModel, noise_vae, quiet_trainer
from PIL import Image

from latentdm import LatentDataModule, PlainEncoder
from latentdm.data import ImageFolderData

SIZES = [(90, 60), (60, 90), (64, 64), (130, 128), (200, 80), (80, 201), (91, 62), (300, 100), (61, 60), (120, 80)]
BUCKETS = {"area": 64 * 64, "step": 16}


def ramps(width, height):
    """``height width``: 20…235 from left to right, and from top to bottom."""
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return x, y


@pytest.fixture
def folder(tmp_path):
    """Images of many sizes whose colours are their coordinates; the mask is the one, transparency the other."""
    for number, (width, height) in enumerate(SIZES):
        x, y = ramps(width, height)
        levels = np.stack([x, y, x, y], axis=-1).round().astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{number:02}.png")
        Image.fromarray(levels[..., 0]).save(tmp_path / f"{number:02}-mask.png")
    return tmp_path


def batches(folder, epoch=0, **settings):
    data = ImageFolderData(folder, **({"batch_size": 3, "val_share": 0, "buckets": BUCKETS} | settings))
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("settings", [{}, {"random_crop": False}, {"flip": True}, {"num_workers": 1}])
def test_image_mask_and_transparency_stay_aligned_in_every_bucket(folder, settings):
    indices, shapes = [], set()
    for epoch in range(3):
        for batch in batches(folder, epoch, alpha=True, **settings):
            indices += batch["index"].tolist()
            pixels, mask = batch["pixels"].float(), batch["mask"].float()
            shapes.add(pixels.shape[-2:])
            assert pixels.shape[-2:] == mask.shape[-2:]
            assert (pixels[:, 0] - mask[:, 0]).abs().max() <= 6  # one is resized smoothly, the other is not
            assert (pixels[:, 1] - pixels[:, 3]).abs().max() <= 6
    assert sorted(indices) == sorted([*range(len(SIZES))] * 3)
    assert len(shapes) >= 4
    assert all(side % 16 == 0 for shape in shapes for side in shape)


@pytest.mark.parametrize("settings", [{}, {"random_crop": False}, {"flip": True}])
def test_the_sizes_that_ride_along_say_where_each_pixel_came_from(folder, settings):
    corners = []
    for batch in (batch for epoch in range(4) for batch in batches(folder, epoch, **settings)):
        for name in ("original_size", "crop_top_left", "target_size"):
            assert batch[name].dtype == torch.int64
            assert batch[name].shape == (len(batch["index"]), 2)
        for row, index in enumerate(batch["index"].tolist()):
            (height, width), (top, left), target = (
                batch[name][row].tolist() for name in ("original_size", "crop_top_left", "target_size")
            )
            assert (width, height) == SIZES[index]
            assert target == list(batch["pixels"].shape[-2:])
            scale = max(target[0] / height, target[1] / width)
            full = max(target[0], round(height * scale)), max(target[1], round(width * scale))
            assert full[0] - target[0] < 1 or full[1] - target[1] < 1  # it just covers the bucket
            x, y = ramps(full[1], full[0])
            red, green = batch["pixels"][row, :2].numpy().astype(float)
            if red[0, 0] > red[0, -1]:
                assert settings == {"flip": True}
                x = x[:, ::-1]
            window = np.s_[top : top + target[0], left : left + target[1]]
            assert np.abs(red - x[window]).max() < 4
            assert np.abs(green - y[window]).max() < 4
            corners.append((index, top, left))
    assert (len(set(corners)) > len(SIZES)) == (settings != {"random_crop": False})


def test_validation_and_prediction_keep_every_image_in_order(folder):
    data = ImageFolderData(folder, batch_size=3, val_share=0.4, buckets=BUCKETS, random_crop=False)
    data.setup()
    validated = [batch["index"].tolist() for batch in data.val_dataloader()]
    assert validated == [batch["index"].tolist() for batch in data.val_dataloader()]
    assert sorted(index for batch in validated for index in batch) == sorted(data.val_set.rows.tolist())
    assert sorted(index for batch in data.predict_dataloader() for index in batch["index"].tolist()) == [*range(10)]


def test_the_table_is_printed_and_images_of_val_root_use_the_same_buckets(folder, tmp_path_factory, caplog):
    held_out = tmp_path_factory.mktemp("held_out")
    Image.new("RGB", (75, 50)).save(held_out / "a.png")
    Image.new("RGB", (64, 64)).save(held_out / "b.png")
    data = ImageFolderData(folder, batch_size=3, val_root=held_out, masks="ignore", buckets=BUCKETS)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert "ImageFolderData: 10 images in " in caplog.text
    assert "width × height" in caplog.text
    shapes = {tuple(batch["pixels"].shape[-2:]) for batch in data.val_dataloader()}
    assert shapes == {(48, 80), (64, 64)}
    assert sum(len(batch["index"]) for batch in data.predict_dataloader()) == 12


def test_a_folder_that_has_changed_is_measured_anew_and_one_that_has_not_is_not(folder, monkeypatch):
    data = ImageFolderData(folder, batch_size=3, val_share=0, masks="ignore", buckets=BUCKETS)
    data.setup()
    before = [data.train_set[position]["pixels"].shape[1:] for position in range(len(SIZES))]
    with monkeypatch.context() as patched:
        patched.setattr("latentdm.data.index.read_size", None)
        data.setup()
    (folder / "00.png").rename(folder / "99.png")
    Image.new("RGB", (40, 200)).save(folder / "98.png")
    data.setup()
    after = [sample["pixels"].shape[1:] for sample in data.train_set]
    assert after == [*before[1:], (128, 32), before[0]]


def test_a_broken_image_is_replaced_by_one_of_its_size(folder):
    content = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(content[: len(content) // 2])
    settings = {"batch_size": 3, "val_share": 0, "on_error": "skip", "max_skipped_share": 0.5}
    datamodule = LatentDataModule(ImageFolderData(folder, buckets=BUCKETS, **settings), PlainEncoder(noise_vae()))
    model = LatentModel()
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, default_root_dir=folder)
    with pytest.warns(UserWarning, match=r"03\.png"):
        trainer.fit(model, datamodule=datamodule)
    for batch in model.batches("train"):
        assert batch["latents"].shape[-2:] == tuple((batch["target_size"][0] // 8).tolist())
    assert sum(len(batch["index"]) for batch in model.batches("train")) == 20
    assert all(3 not in batch["index"].tolist() for batch in model.batches("train"))
