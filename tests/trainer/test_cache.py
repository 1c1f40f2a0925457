"""The cache in real fits: the same latents, encoded once; what changes is encoded again, and nothing else."""

import os

import numpy as np
import pytest
import torch
from helpers import LatentModel, complains, fit, quiet_trainer, tiny_kl
from PIL import Image

from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.augment import Augment
from latentdm.cache.fill import FillData
from latentdm.cache.wanted import needed_keys
from latentdm.callbacks import EncodeCallback
from latentdm.data import ImageFolderData, SamplesData
from latentdm.masks import AlphaMask, RandomMask
from latentdm.preview import preview
from latentdm.preview.sheet import Sheet

COUNT, SIZE = 6, 32

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Encoded:
    """Counts the images that an autoencoder's encoder is given."""

    def __init__(self, autoencoder):
        self.images = 0
        autoencoder.encoder.register_forward_pre_hook(self.count)

    def __deepcopy__(self, memo):
        return self  # a copy in another dtype counts here too

    def count(self, module, inputs):
        self.images += len(inputs[0])

    def take(self):
        images, self.images = self.images, 0
        return images


def counted_vae(dtype="float32", seed=0, **settings):
    autoencoder = tiny_kl(seed, scaling_factor=0.5)
    encoded = Encoded(autoencoder)
    return FrozenVAE(autoencoder, dtype=dtype, **settings), encoded


def write_photo(path, seed, mask=None, alpha=False):
    generator = np.random.default_rng(seed)
    levels = generator.integers(0, 256, (SIZE + 8 * (seed % 3), SIZE + 9, 4 if alpha else 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    if mask is not None:
        gray = generator.integers(0, 256, levels.shape[:2], dtype=np.uint8)
        Image.fromarray(gray).save(mask)


@pytest.fixture
def photos(tmp_path):
    """Noise photographs of different shapes, each with a caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(COUNT):
        write_photo(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"photograph {number}")
    return folder


def data(folder, **settings):
    return ImageFolderData(folder, **{"size": SIZE, "batch_size": 2, "val_share": 0, "random_crop": False} | settings)


def run(folder, cache, encoder=None, epochs=1, model=None, pixels=None, trainer=None, **settings):
    """A fit; returns the model, which kept all batches."""
    encoder = encoder or PlainEncoder(counted_vae()[0], per_batch=1)
    datamodule = LatentDataModule(pixels or data(folder), encoder, cache=cache, **settings)
    return fit(datamodule, model, max_epochs=epochs, **{"limit_val_batches": 0} | (trainer or {}))


def rows(model, key="latents", stage="train"):
    """(epoch, index) → the sample's value."""
    found = {}
    for epoch, batch in model.seen[stage]:
        for row, index in enumerate(batch["index"].tolist()):
            found[epoch, index] = batch[key][row]
    return found


def assert_same(first, second, *keys, close=None):
    for key in keys:
        one, other = rows(first, key), rows(second, key)
        assert one.keys() == other.keys()
        for at, value in one.items():
            if close is not None:
                torch.testing.assert_close(value, other[at], rtol=0, atol=close)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other[at]), (key, at)
            else:
                assert value == other[at]


# -------------------------------------------------------------------- the same, encoded once


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_those_of_a_run_without(photos, tmp_path, workers, flip):
    def encoder():
        vae, encoded = counted_vae("bfloat16")
        return PlainEncoder(vae, per_batch=1), encoded

    plain, encoded = encoder()
    pixels = {"flip": flip, "num_workers": workers}
    without = run(photos, None, plain, 3, pixels=data(photos, **pixels))
    assert encoded.take() == 3 * COUNT
    cache, (cached, encoded) = Cache(tmp_path / "cache"), encoder()
    model = run(photos, cache, cached, 3, pixels=data(photos, **pixels))
    sides = len({(index, value.sum().item()) for (_, index), value in rows(without, "crop_top_left").items()})
    assert encoded.take() == (COUNT if not flip else cache.misses) <= 2 * COUNT
    assert sides >= COUNT
    keys = ("latents", "caption", "name", "original_size", "crop_top_left", "target_size")
    assert_same(model, without, *keys)
    assert cache.hits + cache.misses == 3 * COUNT
    assert cache.failures == 0
    cached, encoded = encoder()
    again = Cache(tmp_path / "cache")
    model = run(photos, again, cached, 3, pixels=data(photos, **pixels))
    assert encoded.take() == 0 == again.misses
    assert_same(model, without, *keys)


def test_a_hit_opens_no_image(photos, tmp_path, monkeypatch):
    run(photos, Cache(tmp_path / "cache"))
    monkeypatch.setattr(Image, "open", None)
    model = run(photos, Cache(tmp_path / "cache"), epochs=2)
    assert len(rows(model)) == 2 * COUNT


def test_a_float32_encoder_is_kept_in_float16_unless_told(photos, tmp_path):
    without = run(photos, None, epochs=2)
    for dtype, close in {"auto": 2e-3, "float32": 1e-6}.items():
        run(photos, Cache(tmp_path / dtype, dtype=dtype))
        model = run(photos, Cache(tmp_path / dtype, dtype=dtype), epochs=2)
        assert_same(model, without, "latents", close=close)


def test_each_epoch_draws_from_the_posterior_anew(photos, tmp_path):
    model = run(photos, Cache(tmp_path / "cache"), epochs=3)
    first, last = rows(model), rows(model)
    assert not any(torch.equal(first[1, index], last[2, index]) for index in range(COUNT))


def test_in_memory(photos):
    vae, encoded = counted_vae()
    cache = Cache()
    datamodule = LatentDataModule(data(photos), PlainEncoder(vae), cache=cache)
    fit(datamodule, max_epochs=3, limit_val_batches=0)
    assert encoded.take() == COUNT
    fit(datamodule, max_epochs=1, limit_val_batches=0)
    assert encoded.take() == 0
    assert cache.hits == 3 * COUNT


def test_validation_and_training_share_entries(photos, tmp_path):
    cache = Cache(tmp_path / "cache")
    vae, encoded = counted_vae()
    datamodule = LatentDataModule(data(photos, val_share=0.5), PlainEncoder(vae), cache=cache)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(LatentModel(), datamodule=datamodule)
    assert encoded.take() == COUNT
    trainer.predict(LatentModel(), datamodule=datamodule)
    assert encoded.take() == 0


# -------------------------------------------------------------------- crops, augmentation


def test_free_crops_are_not_cached_and_say_so(photos, tmp_path):
    vae, encoded = counted_vae()
    with pytest.warns(UserWarning, match=r"other crops; set cache\.variants"):
        run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae), 2, pixels=data(photos, random_crop=True))
    assert encoded.take() == 2 * COUNT


def test_variants_make_free_crops_finite(photos, tmp_path):
    vae, encoded = counted_vae("bfloat16")
    pixels = {"random_crop": True, "flip": True}
    cache = Cache(tmp_path / "cache", variants=2)
    model = run(photos, cache, PlainEncoder(vae, posterior="mode"), 5, pixels=data(photos, **pixels))
    assert encoded.take() == 2 * COUNT == cache.misses
    latents, crops = rows(model), rows(model, "crop_top_left")
    for index in range(COUNT):
        assert torch.equal(latents[0, index], latents[2, index])
        assert torch.equal(latents[1, index], latents[3, index])
        assert torch.equal(crops[1, index], crops[3, index])
    assert any(not torch.equal(latents[0, index], latents[1, index]) for index in range(COUNT))


def test_an_image_more_moves_no_variant_of_the_others(photos, tmp_path):
    pixels = {"random_crop": True, "flip": True}
    run(photos, Cache(tmp_path / "cache", variants=2), epochs=2, pixels=data(photos, **pixels))
    write_photo(photos / "00.png", 99)
    (photos / "00.txt").write_text("another")
    cache = Cache(tmp_path / "cache", variants=2)
    run(photos, cache, epochs=2, pixels=data(photos, **pixels))
    assert cache.misses == 2


def test_augmentation_needs_variants(photos, tmp_path):
    vae, encoded = counted_vae()
    with pytest.warns(UserWarning, match=r"augment changes images.*cache\.variants"):
        run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae), 2, augment=Augment(flip=0.5))
    assert encoded.take() == 2 * COUNT
    encoder = PlainEncoder(vae, posterior="mode")
    model = run(photos, Cache(tmp_path / "cache", variants=2), encoder, 4, augment=Augment(crop=(0.3, 0.9)))
    assert encoded.take() == 2 * COUNT
    latents = rows(model)
    for index in range(COUNT):
        torch.testing.assert_close(latents[0, index], latents[2, index], rtol=0, atol=2e-3)
        assert not torch.allclose(latents[0, index], latents[1, index], atol=2e-3)


def test_the_example_needs_no_setting(tmp_path):
    vae, encoded = counted_vae()
    pixels = SamplesData(size=SIZE, batch_size=2, epoch_length=COUNT, val_length=2)
    run(None, Cache(tmp_path / "cache", variants=2), PlainEncoder(vae), 5, pixels=pixels)
    assert encoded.take() == 2 * COUNT


@pytest.mark.parametrize(("count", "epochs"), [(1024, 2), (100, 3), (5, 40)])
def test_the_example_meets_its_crops_again(tmp_path, count, epochs):
    """As it does with a cache: so many crops of each photograph, in however many epochs."""
    pixels = SamplesData(size=SIZE, batch_size=16, epoch_length=count, val_length=0)
    cache = Cache(tmp_path / "cache", variants=20, mask_variants=1)
    datamodule = LatentDataModule(pixels, inpainting()[0], masks=RandomMask(), cache=cache)
    datamodule.pixels = FillData(pixels)
    datamodule.pixels.setup()
    datamodule.line.setup("cpu")
    cache.setup(datamodule)
    [crops] = datamodule.pixels.able()
    photographs = len({crops.record(position).name for position in range(len(crops))})
    seen = [
        key
        for epoch in range(epochs)
        for position in range(count)
        for key in crops.crops.keys(crops.record(position), epoch)[0].values()
    ]
    assert len(set(seen)) == 2 * 20 * photographs
    needed = list(needed_keys([crops]))
    assert len(needed) == len(set(needed))
    assert set(needed) == set(seen)


# -------------------------------------------------------------------- never stale


def settings(photos, tmp_path, change=None):
    """Everything that an entry depends on, with one of them changed."""
    chosen = {
        "seed": 0, "dtype": "float32", "tiling": "never", "size": SIZE, "alpha": False, "cache dtype": "auto",
        "identity": "stat", "multiple": None, "max_pixels": 10**6,
    }  # fmt: skip
    chosen |= change or {}
    vae, encoded = counted_vae(chosen["dtype"], chosen["seed"], tiling=chosen["tiling"])
    encoder = PlainEncoder(vae, multiple=chosen["multiple"])
    pixels = data(photos, size=chosen["size"], alpha=chosen["alpha"], max_pixels=chosen["max_pixels"])
    cache = Cache(tmp_path / "cache", dtype=chosen["cache dtype"], identity=chosen["identity"])
    run(photos, cache, encoder, pixels=pixels)
    assert encoded.take() == cache.misses
    return cache.misses


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"tiling": "always"},
        {"size": SIZE + 8},
        {"alpha": True},
        {"cache dtype": "float32"},
        {"identity": "content"},
        {"multiple": 16},
        {"max_pixels": 10**7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_what_an_entry_depends_on_misses(photos, tmp_path, change):
    assert settings(photos, tmp_path) == COUNT
    assert settings(photos, tmp_path, change) == COUNT
    assert settings(photos, tmp_path) == 0
    assert settings(photos, tmp_path, change) == 0


def test_only_what_has_changed_misses(photos, tmp_path):
    assert settings(photos, tmp_path) == COUNT
    content = (photos / "3.png").read_bytes()
    status = (photos / "3.png").stat()
    write_photo(photos / "3.png", 3 + 3)
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[: len(content)].ljust(len(content), b"\0"))
    os.utime(photos / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert settings(photos, tmp_path) == 1
    write_photo(photos / "00.png", 77)
    (photos / "00.txt").write_text("another")
    assert settings(photos, tmp_path) == 1
    (photos / "0.png").unlink()
    (photos / "0.txt").unlink()
    assert settings(photos, tmp_path) == 0


def test_one_weight_of_the_encoder_misses_and_the_decoder_does_not(photos, tmp_path):
    def misses(change):
        autoencoder = tiny_kl()
        with torch.no_grad():
            change(autoencoder)
        cache = Cache(tmp_path / "cache")
        run(photos, cache, PlainEncoder(FrozenVAE(autoencoder, dtype="float32")))
        return cache.misses

    assert misses(lambda autoencoder: None) == COUNT
    assert misses(lambda autoencoder: autoencoder.decoder.conv_in.weight.add_(1)) == 0
    assert misses(lambda autoencoder: autoencoder.encoder.conv_in.bias[0].add_(1e-3)) == COUNT
    assert misses(lambda autoencoder: autoencoder.quant_conv.bias[0].add_(1e-3)) == COUNT


def test_what_an_entry_does_not_depend_on_hits(photos, tmp_path):
    def misses(batch_size=2, scaling=0.5, **encoder):
        autoencoder = tiny_kl(scaling_factor=scaling)
        cache = Cache(tmp_path / "cache")
        vae = FrozenVAE(autoencoder, dtype="float32", encoder_only=encoder.pop("encoder_only", False))
        run(photos, cache, PlainEncoder(vae, **encoder), pixels=data(photos, batch_size=batch_size))
        return cache.misses

    assert misses() == COUNT
    assert misses(batch_size=3) == misses(per_batch=1) == misses(posterior="mode") == misses(encoder_only=True) == 0
    assert misses(scaling=0.2) == 0
    (photos / "2.txt").write_text("another caption")
    assert misses() == 0


def test_captions_are_never_cached(photos, tmp_path):
    run(photos, Cache(tmp_path / "cache"))
    (photos / "2.txt").write_text("another caption")
    assert rows(run(photos, Cache(tmp_path / "cache")), "caption")[0, 2] == "another caption"


def test_scaling_is_applied_to_what_is_read(photos, tmp_path):
    latents = []
    for scaling in (0.5, 1.0):
        vae = FrozenVAE(tiny_kl(scaling_factor=scaling), dtype="float32")
        latents.append(rows(run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae, posterior="mode"))))
    for at, value in latents[0].items():
        torch.testing.assert_close(2 * value, latents[1][at], rtol=2e-3, atol=2e-3)


# -------------------------------------------------------------------- inpainting


@pytest.fixture
def masked_photos(tmp_path):
    """Photographs with soft masks beside them."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for number in range(COUNT):
        write_photo(folder / f"{number}.png", number, folder / f"{number}-mask.png")
    return folder


def inpainting(**settings):
    vae, encoded = counted_vae("bfloat16")
    return InpaintEncoder(vae, per_batch=1, **settings), encoded


INPAINTED = ("latents", "masked_latents", "noise_mask", "latent_mask")


def test_fresh_masks_encode_the_masked_image_alone(photos, tmp_path):
    encoder, _ = inpainting()
    without = run(photos, None, encoder, 3, masks=RandomMask())
    encoder, encoded = inpainting()
    cache = Cache(tmp_path / "cache")
    model = run(photos, cache, encoder, 3, masks=RandomMask())
    assert encoded.take() == COUNT + 3 * COUNT
    assert (cache.hits, cache.misses) == (2 * COUNT, COUNT)
    assert_same(model, without, *INPAINTED)
    masks = rows(model, "noise_mask")
    assert not any(torch.equal(masks[1, index], masks[2, index]) for index in range(COUNT))


def test_mask_variants_encode_nothing_in_the_end(photos, tmp_path, monkeypatch):
    encoder, encoded = inpainting(posterior="mode")
    cache = Cache(tmp_path / "cache", mask_variants=2)
    model = run(photos, cache, encoder, 2, masks=RandomMask())
    assert encoded.take() == COUNT + 2 * COUNT
    monkeypatch.setattr(Image, "open", None)
    again = run(photos, Cache(tmp_path / "cache", mask_variants=2), encoder, 4, masks=RandomMask())
    assert encoded.take() == 0
    for key in INPAINTED:
        first, later = rows(model, key), rows(again, key)
        for epoch, index in first:
            assert torch.equal(first[epoch, index], later[epoch, index])
            assert torch.equal(first[epoch, index], later[epoch + 2, index])
    assert any(not torch.equal(rows(model, "noise_mask")[0, i], rows(model, "noise_mask")[1, i]) for i in range(COUNT))


@pytest.mark.parametrize("moved", [{"grow_mask_by": 6}, {"mask_offset": -2}])
def test_own_masks_are_cached_with_their_images(masked_photos, tmp_path, moved, monkeypatch):
    encoder, _ = inpainting(**moved)
    without = run(masked_photos, None, encoder, 2)
    encoder, encoded = inpainting(**moved)
    run(masked_photos, Cache(tmp_path / "cache"), encoder)
    assert encoded.take() == 2 * COUNT
    with monkeypatch.context() as context:
        context.setattr(Image, "open", None)
        model = run(masked_photos, Cache(tmp_path / "cache"), encoder, 2)
    assert encoded.take() == 0
    assert_same(model, without, *INPAINTED)
    write_photo(tmp_path / "other.png", 52, masked_photos / "1-mask.png")
    run(masked_photos, Cache(tmp_path / "cache"), encoder)
    assert encoded.take() == 1  # under its new mask; the clean image is there


def test_masks_of_another_setting_miss(masked_photos, tmp_path):
    for setting in ({}, {"grow_mask_by": 3}, {"mask_offset": 3}, {"fill": 0.0}):
        encoder, encoded = inpainting(**setting)
        cache = Cache(tmp_path / "cache")
        run(masked_photos, cache, encoder)
        assert encoded.take() == cache.misses == (COUNT if setting else 2 * COUNT)


def test_latent_masks_of_any_kind_come_from_one_entry(masked_photos, tmp_path):
    run(masked_photos, Cache(tmp_path / "cache"), inpainting()[0])
    for latent_mask in ("area", "max", "unshuffle"):
        encoder, encoded = inpainting(latent_mask=latent_mask)
        without = run(masked_photos, None, inpainting(latent_mask=latent_mask)[0])
        model = run(masked_photos, Cache(tmp_path / "cache"), encoder)
        assert encoded.take() == 0
        assert_same(model, without, *INPAINTED)


def test_transparency_is_a_mask_of_the_image(tmp_path):
    folder = tmp_path / "cutouts"
    folder.mkdir()
    for number in range(COUNT):
        write_photo(folder / f"{number}.png", number, alpha=True)
    encoder, encoded = inpainting()
    pixels = {"alpha": True}
    without = run(folder, None, encoder, 2, pixels=data(folder, **pixels), masks=AlphaMask())
    encoded.take()
    model = run(folder, Cache(tmp_path / "c"), encoder, 2, pixels=data(folder, **pixels), masks=AlphaMask())
    assert encoded.take() == 2 * COUNT
    assert_same(model, without, *INPAINTED)


@pytest.mark.parametrize("kind", ["plain", "inpaint"])
def test_sources_are_cached_with_their_images(masked_photos, tmp_path, kind):
    for number in range(COUNT):
        with Image.open(masked_photos / f"{number}.png") as image:
            image.transpose(Image.Transpose.ROTATE_180).save(masked_photos / f"{number}-source.png")

    def encoder():
        vae, encoded = counted_vae("bfloat16")
        return (PlainEncoder if kind == "plain" else InpaintEncoder)(vae, per_batch=1), encoded

    shown = "source_latents" if kind == "plain" else "masked_latents"
    without = run(masked_photos, None, encoder()[0], 2)
    cached, encoded = encoder()
    model = run(masked_photos, Cache(tmp_path / "cache"), cached, 2)
    assert encoded.take() == 2 * COUNT
    assert_same(model, without, "latents", shown)
    with Image.open(masked_photos / "0-source.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(masked_photos / "0-source.png")
    run(masked_photos, Cache(tmp_path / "cache"), cached)
    assert encoded.take() == 1


# -------------------------------------------------------------------- what else runs


class Failing(LatentModel):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyError("a bug of the model")
        return super().training_step(batch, batch_idx)


def test_a_run_that_fails_keeps_what_it_encoded(photos, tmp_path):
    with pytest.raises(KeyError, match="a bug"):
        run(photos, Cache(tmp_path / "cache"), model=Failing())
    cache = Cache(tmp_path / "cache")
    run(photos, cache)
    assert cache.hits == COUNT


class Drawing(EncodeCallback):
    """Draws each batch as the preview does."""

    def __init__(self):
        self.pictures = []

    def on_encode_end(self, trainer, pl_module, inputs, outputs, batch):
        self.pictures.append(preview(trainer.datamodule.encoder, inputs, outputs))


def test_a_preview_of_what_was_read_shows_the_latents_decoded(photos, tmp_path):
    run(photos, Cache(tmp_path / "cache"))
    drawing = Drawing()
    run(photos, Cache(tmp_path / "cache"), trainer={"callbacks": [drawing]})
    sheet = Sheet(["image"], (SIZE, SIZE))
    for picture in drawing.pictures:
        assert np.asarray(picture.crop(sheet.box(0, 0))).std() > 1


# -------------------------------------------------------------------- what cannot be cached


def test_kept_pixels_are_read(photos, tmp_path):
    vae, encoded = counted_vae()
    model = run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae), 2, keep_pixels=True)
    assert encoded.take() == COUNT
    pixels = rows(model, "pixels")
    assert all(torch.equal(pixels[0, index], pixels[1, index]) and pixels[1, index].any() for index in range(COUNT))


class Brighter(ImageFolderData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"pixels": batch["pixels"] // 2}


def test_hooks_of_a_data_module_are_no_secret(photos, tmp_path):
    vae, encoded = counted_vae()
    with pytest.warns(UserWarning, match="Brighter overrides on_after_batch_transfer"):
        run(photos, Cache(tmp_path / "c"), PlainEncoder(vae), 2, pixels=Brighter(photos, SIZE, 2, 0, random_crop=False))
    assert encoded.take() == 2 * COUNT


def test_settings_are_checked():
    with complains("Cache: variants must be an integer of at least 1, got 0"):
        Cache(variants=0)
    with complains("Cache: identity must be one of stat, content, got 'name'"):
        Cache(identity="name")
