"""Folders of images and masks, written into a temporary folder: pairing, geometry, split, and what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentdm.batch import EPOCH
from latentdm.data import ImageFolderData, PixelDataModule

SIZES = ("original_size", "crop_top_left", "target_size")


def coordinates(height, width):
    """Red is x, green is y; the mask below is a function of both, so that any shift between them shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.full_like(x, 77)], axis=-1).astype(np.uint8)


def coordinate_mask(height, width):
    y, x = np.mgrid[:height, :width]
    return ((3 * x + 7 * y) % 250 + 2).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(path, height=20, width=24, seed=0):
    save(path, np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Ten images of several sizes and formats, without masks, in two levels."""
    for number in range(10):
        ending = ["png", "jpg", "webp", "bmp", "tif"][number % 5]
        noise(tmp_path / f"{'abc'[number % 3]}" / f"{number}.{ending}", 20 + number, 40 - number, number)
    (tmp_path / "a" / "0.txt").write_text("a caption")
    noise(tmp_path / "a" / "._0.png")
    noise(tmp_path / ".thumbnails" / "0.png")
    return tmp_path


def loaded(root, **settings):
    data = ImageFolderData(root, **{"size": 16, "batch_size": 4, **settings})
    data.setup()
    return data


def everything(data, epoch=0):
    return [data.predict_set[position, epoch] for position in range(len(data.predict_set))]


def names(dataset):
    return [] if dataset is None else [dataset.name(position) for position in range(len(dataset))]


def test_the_images_of_a_folder_sorted_and_recursive(photos):
    data = loaded(photos)
    assert isinstance(data, PixelDataModule)
    samples = everything(data)
    expected = ["a/0.png", "a/3.bmp", "a/6.jpg", "a/9.tif", "b/1.jpg", "b/4.tif", "b/7.webp"]
    assert [sample["name"] for sample in samples] == [*expected, "c/2.webp", "c/5.png", "c/8.bmp"]
    assert [sample["index"] for sample in samples] == list(range(10))
    assert {sample["pixels"].shape for sample in samples} == {(3, 16, 16)}
    assert all("mask" not in sample for sample in samples)


def test_a_batch(photos):
    noise(photos / "a" / "0-mask.png")
    batch = next(iter(loaded(photos, masks="ignore").train_dataloader()))
    assert set(batch) == {"pixels", "index", "name", "caption", EPOCH, *SIZES}
    assert batch["pixels"].shape == (4, 3, 16, 16)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["index"].dtype == torch.int64


def test_training_and_validation_share_the_folder(photos):
    data = loaded(photos, val_share=0.3)
    train, val = names(data.train_set), names(data.val_set)
    assert train
    assert val
    assert sorted(train + val) == names(data.predict_set)
    indices = {name: position for position, name in enumerate(names(data.predict_set))}
    for dataset in (data.train_set, data.val_set):
        assert all(sample["index"] == indices[sample["name"]] for sample in dataset)


def test_the_split_stays_when_images_are_added(tmp_path):
    for number in range(40):
        noise(tmp_path / f"{number}.png", seed=number)
    before = loaded(tmp_path, val_share=0.25)
    for number in range(40, 60):
        noise(tmp_path / f"0{number}.png", seed=number)
    after = loaded(tmp_path, val_share=0.25)
    assert set(names(before.val_set)) <= set(names(after.val_set))
    assert set(names(before.train_set)) <= set(names(after.train_set))
    assert 4 <= len(before.val_set) <= 16
    assert names(loaded(tmp_path, val_share=0.25, seed=5).val_set) == names(after.val_set)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("val_share", [0.001, 0.999])
def test_neither_side_of_a_small_folder_is_empty(tmp_path, count, val_share):
    for number in range(count):
        noise(tmp_path / f"{number}.png")
    data = loaded(tmp_path, val_share=val_share)
    assert len(data.train_set) + len(data.val_set) == count
    assert min(len(data.train_set), len(data.val_set)) == 1


def test_one_image_is_for_training(tmp_path):
    noise(tmp_path / "only.png")
    for val_share in (0, 0.1, 0.999):
        data = loaded(tmp_path, val_share=val_share)
        assert names(data.train_set) == ["only.png"]
        assert data.val_dataloader() == []


def test_no_validation_share(photos):
    data = loaded(photos, val_share=0)
    assert len(data.train_set) == 10
    assert data.val_set is None


def test_a_folder_for_validation(tmp_path):
    for number in range(4):
        noise(tmp_path / "train" / f"{number}.png")
        noise(tmp_path / "train" / "held out" / f"v{number}.png")
    data = loaded(tmp_path / "train", val_root=tmp_path / "train" / "held out")
    assert names(data.train_set) == [f"{number}.png" for number in range(4)]
    assert names(data.val_set) == [f"v{number}.png" for number in range(4)]
    assert [sample["index"] for sample in everything(data)] == list(range(8))


def test_links_are_followed_but_not_in_circles(tmp_path):
    noise(tmp_path / "elsewhere" / "1.png")
    noise(tmp_path / "root" / "0.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert names(loaded(tmp_path / "root").predict_set) == ["0.png", "link/1.png"]


# Masks


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("1.png", "1-mask.png"),
        ("1.jpg", "1-mask.png"),
        ("in/1.png", "in/1-mask.tif"),
        ("1.png", "masks/1.png"),
        ("1.jpg", "masks/1.bmp"),
        ("in/1.png", "masks/in/1.png"),
        ("in/1.png", "masks/in/1-mask.png"),
        ("a.b-c.png", "a.b-c-mask.png"),
    ],
)
@pytest.mark.parametrize("masks", ["auto", "require"])
def test_where_a_mask_may_lie(tmp_path, image, mask, masks):
    noise(tmp_path / image, 16, 16)
    save(tmp_path / mask, coordinate_mask(16, 16))
    (sample,) = everything(loaded(tmp_path, masks=masks))
    assert sample["name"] == image
    assert sample["mask"].dtype == torch.uint8
    assert torch.equal(sample["mask"], torch.from_numpy(coordinate_mask(16, 16))[None])
    assert "mask" not in everything(loaded(tmp_path, masks="ignore"))[0]


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 90), (90, 16)])
def test_image_and_mask_are_cropped_and_mirrored_alike(tmp_path, height, width, alpha):
    save(tmp_path / "1.png", coordinates(height, width))
    save(tmp_path / "masks" / "1.png", coordinate_mask(height, width))
    data = loaded(tmp_path, flip=True, val_share=0, alpha=alpha)
    mask = torch.from_numpy(coordinate_mask(height, width))
    corners, mirrored = set(), 0
    for epoch in range(60):
        sample = data.train_set[0, epoch]
        x, y = sample["pixels"][:2].long()
        assert torch.equal(sample["mask"][0], mask[y, x])
        assert (sample["pixels"][2] == 77).all()
        assert sample["pixels"].shape == (4 if alpha else 3, 16, 16)
        if alpha:
            assert (sample["pixels"][3] == 255).all()
        corners.add((int(x.min()), int(y.min())))
        mirrored += bool(x[0, 0] > x[0, 1])
    assert len(corners) > 30
    assert max(max(corner) for corner in corners) > 65
    assert min(max(corner) for corner in corners) < 9
    assert 15 < mirrored < 45


@pytest.mark.parametrize("mask_scale", [1, 2, 0.5])
@pytest.mark.parametrize("size", [24, 64, 100])
def test_image_and_mask_are_resized_alike(tmp_path, size, mask_scale):
    x = np.linspace(10, 240, 96)[None].repeat(64, 0).round().astype(np.uint8)
    save(tmp_path / "1.png", np.stack([x, x, x], axis=-1))
    mask_size = int(96 * mask_scale), int(64 * mask_scale)
    Image.fromarray(x).resize(mask_size, Image.Resampling.BICUBIC).save(tmp_path / "1-mask.png")
    data = loaded(tmp_path, size=size, val_share=0)
    for epoch in range(10):
        sample = data.train_set[0, epoch]
        # A slope of 230/96 a pixel, and 3.6 where 64 pixels become 24; a shift by one pixel would show.
        assert (sample["pixels"][0].int() - sample["mask"][0].int()).abs().max() <= 2


def test_validation_takes_the_centre(tmp_path):
    save(tmp_path / "1.png", coordinates(16, 61))
    save(tmp_path / "2.png", coordinates(61, 16))
    (wide, tall) = everything(loaded(tmp_path, flip=True))
    assert wide["pixels"][0, 0].tolist() == list(range(22, 38))
    assert tall["pixels"][1, :, 0].tolist() == list(range(22, 38))


ODD = next(side for side in range(17, 500) if int(side * (16 / side)) < 16)  # where the product falls below 16


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40)])
def test_the_sizes_that_ride_along_say_what_was_cropped(tmp_path, height, width):
    save(tmp_path / "1.png", coordinates(height, width))
    data = loaded(tmp_path, size=40, flip=True, val_share=0)
    for epoch in range(10):
        sample = data.train_set[0, epoch]
        x, y = sample["pixels"][:2]
        top, left = sample["crop_top_left"].tolist()
        assert {sample[name].dtype for name in SIZES} == {torch.int64}
        assert sample["original_size"].tolist() == [height, width]
        assert sample["target_size"].tolist() == [40, 40]
        mirrored = bool(x[0, 0] > x[0, 1])
        assert top == y.min()
        assert left == (width - 1 - x.max() if mirrored else x.min())


def test_the_short_side_is_resized_and_never_shrinks_below_size(tmp_path):
    for number, (height, width) in enumerate(
        [(300, 301), (301, 300), (7, 5), (33, 500), (16, 16), (1, 40), (ODD, ODD)]
    ):
        noise(tmp_path / f"{number}.png", height, width)
    assert {sample["pixels"].shape for sample in everything(loaded(tmp_path))} == {(3, 16, 16)}


def test_a_mask_is_first_resized_to_its_image(tmp_path):
    noise(tmp_path / "1.png", 32, 32)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 31:33] = 255  # two columns of 64: the mean of each with its dark neighbour, in two of the 32 columns
    save(tmp_path / "1-mask.png", mask)
    (sample,) = everything(loaded(tmp_path, size=32))
    assert sample["mask"][0, 5, 14:18].tolist() == [0, 127, 127, 0]
    mask[:] = 0
    mask[:, 0] = 255
    save(tmp_path / "1-mask.png", mask)
    # From 64 to 16 in one step the first column would be skipped; by way of the image's 32 it counts as a quarter.
    assert everything(loaded(tmp_path, size=16))[0]["mask"][0, 5, :2].tolist() == [63, 0]


def test_the_faint_edge_of_a_soft_mask_is_no_mask_of_ones(tmp_path):
    noise(tmp_path / "1.png", 16, 16)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[0, 0], mask[0, 1] = 1, 2
    save(tmp_path / "1-mask.png", mask)
    assert everything(loaded(tmp_path))[0]["mask"][0, 0, :3].tolist() == [0, 2, 0]


# Alpha


def test_alpha_is_kept_when_asked_for_and_colours_under_it_stay(tmp_path):
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[..., :3] = (200, 100, 50)
    rgba[:32, :, 3] = 255
    save(tmp_path / "1.png", rgba)
    noise(tmp_path / "2.png", 64, 64)
    for size in (64, 32):
        with_alpha, opaque = everything(loaded(tmp_path, size=size, alpha=True))
        assert with_alpha["pixels"].shape == (4, size, size)
        assert (with_alpha["pixels"][3, : size // 2] == 255).all()
        assert (with_alpha["pixels"][3, size // 2 :] == 0).all()
        assert (with_alpha["pixels"][:3].permute(1, 2, 0) == torch.tensor([200, 100, 50])).all()
        assert (opaque["pixels"][3] == 255).all()
        without = everything(loaded(tmp_path, size=size))[0]
        assert torch.equal(without["pixels"], with_alpha["pixels"][:3])


# Randomness


def two_epochs(root, **settings):
    """The training batches of two epochs, and the validation batches after each."""
    data, batches = loaded(root, **{"batch_size": 3, "flip": True, **settings}), []
    train, val = data.train_dataloader(), data.val_dataloader()
    for epoch in range(2):
        train.sampler.set_epoch(epoch)
        batches += [*train, *val]
    return batches


@pytest.fixture
def masked_photos(tmp_path):
    for number in range(8):
        noise(tmp_path / f"{number}.png", 20, 60, number)
        save(tmp_path / "masks" / f"{number}.png", coordinate_mask(20, 60))
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(masked_photos, workers):
    mine, theirs = two_epochs(masked_photos), two_epochs(masked_photos, num_workers=workers)
    for one, other in zip(mine, theirs, strict=True):
        assert one["name"] == other["name"]
        assert all(torch.equal(one[key], other[key]) for key in ("pixels", "mask", "index"))


def test_crops_follow_the_seed_the_epoch_and_the_index(masked_photos):
    data, other = loaded(masked_photos, val_share=0.3), loaded(masked_photos, val_share=0.3, seed=1)
    same = loaded(masked_photos, val_share=0.3)
    changed = {"epoch": 0, "seed": 0}
    for position in range(len(data.train_set)):
        crop = data.train_set[position, 0]["pixels"]
        assert torch.equal(crop, same.train_set[position, 0]["pixels"])
        changed["epoch"] += not torch.equal(crop, data.train_set[position, 1]["pixels"])
        changed["seed"] += not torch.equal(crop, other.train_set[position, 0]["pixels"])
    assert min(changed.values()) >= len(data.train_set) - 1
    for position in range(len(data.val_set)):
        assert torch.equal(data.val_set[position, 0]["pixels"], data.val_set[position, 1]["pixels"])


def test_a_sample_s_crop_does_not_depend_on_the_batch_size(masked_photos):
    def by_index(batches):
        return {
            int(i): pixels for batch in batches[:1] for i, pixels in zip(batch["index"], batch["pixels"], strict=True)
        }

    small, large = by_index(two_epochs(masked_photos, batch_size=1)), by_index(two_epochs(masked_photos, batch_size=6))
    assert len(small) == 1
    for index, pixels in small.items():
        assert torch.equal(pixels, large[index])


# What is wrong


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"^ImageFolderData: root='.*nowhere' does not exist; give a folder of images"):
        ImageFolderData(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^ImageFolderData: val_root='.*file' is a file; give a folder of images"):
        ImageFolderData(tmp_path, val_root=str(tmp_path / "file"))


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"^ImageFolderData: no images in root='.*'; expected files ending in .png, .jpg"
    ):
        loaded(tmp_path)


@pytest.mark.parametrize("mask", ["7-mask.png", "masks/7.png"])
def test_a_mask_without_an_image(photos, mask):
    noise(photos / mask)
    with pytest.raises(
        ValueError, match=rf"^ImageFolderData: a mask without an image: .*{mask}; name it after its image"
    ):
        loaded(photos)
    assert len(loaded(photos, masks="ignore").predict_set) == 10


def test_an_image_without_a_mask(masked_photos):
    (masked_photos / "masks" / "5.png").unlink()
    (masked_photos / "masks" / "6.png").unlink()
    message = (
        r"^ImageFolderData: an image without a mask: .*5.png \(and 1 more of 8\); add 5-mask.png to .*masks=ignore$"
    )
    with pytest.raises(ValueError, match=message):
        loaded(masked_photos)


def test_masks_that_are_required(photos):
    with pytest.raises(ValueError, match=r"^ImageFolderData: an image without a mask: .*a/0.png \(and 9 more of 10\)"):
        loaded(photos, masks="require")


def test_two_masks_for_one_image(masked_photos):
    noise(masked_photos / "3-mask.png")
    assert len(loaded(masked_photos, masks="ignore").predict_set) == 8
    with pytest.raises(
        ValueError, match=r"^ImageFolderData: two masks for one image, .*3-mask.png and .*masks/3.png; remove"
    ):
        loaded(masked_photos)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", ["2.png", "masks/2.png"])
def test_a_truncated_file_is_named(masked_photos, broken, workers):
    path = masked_photos / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=rf"ImageFolderData: cannot read .*{broken}: .*truncated.*; repair or remove the file"
    ):
        list(loaded(masked_photos, num_workers=workers).predict_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": 51.2}, "size must be an integer of at least 1, got 51.2"),
        ({"val_share": 1.0}, "val_share must be a number below 1, got 1.0"),
        ({"val_share": -0.1}, "val_share must be a number in 0…1, got -0.1"),
        ({"masks": "yes"}, "masks must be one of auto, require, ignore, got 'yes'"),
        ({"sources": True}, "sources must be one of auto, require, ignore, got True"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"^ImageFolderData: {message}$"):
        ImageFolderData(tmp_path, **settings)
