"""The cache with every source of images: buckets, data sets, shards, exports, and data modules of somebody else."""

import json
import os
import tarfile
from shutil import rmtree

import numpy as np
import pytest
import torch
from helpers import LatentModel, Photos, complains, fit, images, photo_columns, quiet_trainer, tiny_kl
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from running import add_file, quiet_datasets
from test_cache import COUNT, SIZE, counted_vae, data, inpainting, photos, rows, run, write_photo  # noqa: F401

from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.cache.export import export
from latentdm.cache.fill import Fill, FillData
from latentdm.cache.ray import EncodeActor, jobs
from latentdm.cache.wanted import needed_keys
from latentdm.data import HuggingFaceData, ImageFolderData, LatentsData, WebDatasetData
from latentdm.masks import RandomMask

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_buckets(photos, tmp_path):  # noqa: F811
    pixels = {"buckets": {"area": SIZE * SIZE, "step": 8, "min_images": 1}}
    encoded = []
    for _ in range(2):
        vae, count = counted_vae("bfloat16")
        model = run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae, per_batch=1), pixels=data(photos, **pixels))
        encoded.append((count.take(), rows(model)))
    assert [count for count, _ in encoded] == [COUNT, 0]
    assert all(torch.equal(value, encoded[1][1][at]) for at, value in encoded[0][1].items())
    write_photo(photos / "00.png", 50)
    vae, count = counted_vae("bfloat16")
    run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae, per_batch=1), pixels=data(photos, **pixels))
    assert count.take() == 1


@pytest.mark.filterwarnings("ignore:Cache. not cached. HuggingFaceData's train_set:UserWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_and_streams(workplace, streaming):
    def pixels():
        if streaming:
            path = str(workplace / "shards" / "train-{0000..0001}.tar")
            return WebDatasetData(path, size=SIZE, batch_size=2, epoch_length=4, parts=1)
        return HuggingFaceData(str(workplace / "dataset"), size=SIZE, batch_size=2, val_share=0)

    encoded = []
    for _ in range(2):
        vae, count = counted_vae()
        cache = Cache(workplace / "cache", variants=1)
        run(None, cache, PlainEncoder(vae), epochs=2, pixels=pixels())
        encoded.append(count.take())
    assert encoded[0] == 4
    assert encoded[1] == 0


# -------------------------------------------------------------------- data modules of somebody else


@pytest.mark.parametrize("kind", ["plain", "fresh masks", "own masks", "mask variants"])
def test_batches_are_looked_up_by_their_key(tmp_path, kind):
    columns = photo_columns(4, mask=kind == "own masks", cache_key=["a", "b", "c", "d"])

    def once(cache, columns=columns, epochs=2):
        vae, encoded = counted_vae("bfloat16")
        plain = kind == "plain"
        encoder = PlainEncoder(vae, per_batch=1) if plain else InpaintEncoder(vae, per_batch=1)
        source = None if kind in ("plain", "own masks") else RandomMask()
        datamodule = LatentDataModule(Photos(columns), encoder, masks=source, cache=cache)
        model = fit(datamodule, max_epochs=epochs, limit_val_batches=0)
        return model, encoded.take()

    def cache():
        return Cache(tmp_path / "cache", mask_variants=1 if kind == "mask variants" else None)

    without, _ = once(None)
    cached, encoded = once(cache())
    assert encoded == {"plain": 4, "fresh masks": 12, "own masks": 8, "mask variants": 8}[kind]
    if kind != "mask variants":
        for key in ("latents",) if kind == "plain" else ("latents", "masked_latents", "noise_mask"):
            assert torch.equal(cached.column("train", key), without.column("train", key))
    _, encoded = once(cache())
    assert encoded == {"plain": 0, "fresh masks": 8, "own masks": 0, "mask variants": 0}[kind]
    other = columns | {"cache_key": ["a", "b", "c", "another"]}
    _, encoded = once(cache(), other, epochs=1)
    assert encoded == {"plain": 1, "fresh masks": 5, "own masks": 2, "mask variants": 2}[kind]


def test_batches_without_a_key_say_what_to_give(tmp_path):
    with pytest.warns(UserWarning, match="give each sample a cache_key"):
        run(None, Cache(tmp_path / "cache"), pixels=Photos(photo_columns(4)))


def test_a_wrong_number_of_keys_is_an_error(tmp_path):
    class Short(Photos):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch | {"cache_key": ["a"]}

    with pytest.warns(UserWarning, match="overrides on_before_batch_transfer"):  # and then nothing is looked up
        run(None, Cache(tmp_path / "cache"), pixels=Short(photo_columns(4)))
    with complains("cache_key: expected a list of texts, one an image", "for 2 images"):
        keyed = photo_columns(4) | {"cache_key": [["a", "b"]] * 4}
        run(None, Cache(tmp_path / "cache"), pixels=Photos(keyed, collate_fn=collate_columns))


def collate_columns(samples):
    return {"pixels": images(2), "index": torch.arange(2), "cache_key": ["a"]}


# -------------------------------------------------------------------- filled by an actor, exported


def make_inpainting(folder, cache):
    def make():
        settings = {"mask_variants": 2}
        return LatentDataModule(
            data(folder), inpainting(posterior="mode")[0], masks=RandomMask(), cache=Cache(cache, **settings)
        )

    return make


def test_an_actor_fills_what_a_training_reads(photos, tmp_path):  # noqa: F811
    make = make_inpainting(photos, tmp_path / "cache")
    (photos / "3.png").write_bytes(b"no image")
    numbers = [row["job"] for row in jobs(make)]
    assert len(numbers) == 2 * COUNT
    actor = EncodeActor(make, "cpu")
    why = [text for first in (0, 5) for text in actor({"job": numbers[first : first + 5]})["why"]]
    assert sum("3.png" in text for text in why) == sum(text != "" for text in why) == 2
    EncodeActor(make, "cpu")({"job": numbers})
    write_photo(photos / "3.png", 3)
    encoder, encoded = inpainting(posterior="mode")
    run(photos, Cache(tmp_path / "cache", mask_variants=2), encoder, 3, masks=RandomMask())
    assert encoded.take() == 1 + 2  # the one that was broken: itself, and under each of its masks


@pytest.mark.parametrize("kind", ["safetensors", "webdataset", "comfyui"])
def test_exports_give_the_latents_of_the_cache(photos, tmp_path, kind):  # noqa: F811
    def vae():
        return counted_vae("bfloat16")[0]

    first = run(photos, Cache(tmp_path / "cache"), PlainEncoder(vae(), posterior="mode", per_batch=1))
    datamodule = LatentDataModule(data(photos), PlainEncoder(vae()), cache=Cache(tmp_path / "cache"))
    datamodule.pixels = FillData(datamodule.pixels)
    datamodule.pixels.setup()
    datamodule.line.setup("cpu")
    datamodule.cache.setup(datamodule)
    found = export(datamodule.pixels.able(), kind, tmp_path / kind)
    assert found["entries"] == COUNT
    assert found["misses"] == 0
    again = run(None, None, PlainEncoder(vae(), posterior="mode"), pixels=LatentsData(tmp_path / kind, None, 2, 0))
    latents, captions = rows(again), rows(again, "caption")
    assert len(latents) == COUNT
    for (_, index), value in rows(first).items():
        assert captions[0, index] == f"photograph {index}"
        assert torch.equal(latents[0, index], value)


def test_latents_without_what_an_encoder_needs_say_so(photos, tmp_path):  # noqa: F811
    test_exports_give_the_latents_of_the_cache(photos, tmp_path, "safetensors")
    pixels = LatentsData(tmp_path / "safetensors", None, 2, 0)
    with complains("latents without images", "'masked_latents' is not among them", "encoder=plain"):
        run(None, None, inpainting()[0], pixels=pixels, masks=RandomMask())


def test_latents_that_are_none_name_their_file(tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a.safetensors").write_bytes(b"nothing")
    with complains("LatentsData: cannot read a.safetensors"):
        run(None, None, pixels=LatentsData(tmp_path / "latents", val_share=0))
    with complains("LatentsData: root", "does not exist; give a folder of what latentdm cache export wrote"):
        LatentsData(tmp_path / "none")


# -------------------------------------------------------------------- the disk fails


def test_a_folder_that_cannot_be_written_to_trains_on(photos, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot write to dir") as said:
        model = run(photos, cache, epochs=2)
    assert len([warning for warning in said if "cache" in str(warning.message).lower()]) == 1
    assert len(rows(model)) == 2 * COUNT


def test_a_folder_that_is_a_pipe_trains_on(photos, tmp_path):  # noqa: F811
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(UserWarning, match="cannot write to dir"):
        model = run(photos, Cache(tmp_path / "pipe"), epochs=2)
    assert len(rows(model)) == 2 * COUNT


def test_a_cache_among_the_images_is_none_of_them(photos):  # noqa: F811
    for expected in (COUNT, 0):
        vae, encoded = counted_vae()
        model = run(photos, Cache(photos / "latents"), PlainEncoder(vae))
        assert encoded.take() == expected
        assert len(rows(model)) == COUNT
    assert list((photos / "latents").rglob("*.safetensors"))


class Removing(LatentModel):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            rmtree(self.trainer.datamodule.cache.dir)


def test_a_cache_that_is_removed_in_the_middle_is_filled_again(photos, tmp_path):  # noqa: F811
    vae, encoded = counted_vae("bfloat16")
    without = run(photos, None, PlainEncoder(vae, per_batch=1), 4)
    encoded.take()
    cache = Cache(tmp_path / "cache")
    model = run(photos, cache, PlainEncoder(vae, per_batch=1), 4, model=Removing())
    assert encoded.take() in (COUNT, 2 * COUNT)  # files that are open are there until they are closed
    assert all(torch.equal(value, rows(without)[at]) for at, value in rows(model).items())


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path:UserWarning")
def test_ids_and_draws_are_those_without_a_cache(photos, tmp_path):  # noqa: F811
    """Of a run that goes on from a checkpoint in the middle of an epoch, with another number of workers."""

    def once(cache, workers, ckpt_path=None, max_steps=7):
        vae = FrozenVAE(tiny_kl(), dtype="bfloat16")
        pixels = data(photos, flip=True, num_workers=workers)
        datamodule = LatentDataModule(pixels, InpaintEncoder(vae, per_batch=1), masks=RandomMask(), cache=cache)
        model = LatentModel()
        saves = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=4, save_top_k=-1)
        saving = {"callbacks": [saves], "enable_checkpointing": True} if max_steps == 4 else {}
        trainer = quiet_trainer(max_epochs=-1, max_steps=max_steps, limit_val_batches=0, **saving)
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        return model

    without = once(None, 0)
    once(Cache(tmp_path / "cache"), 2, max_steps=4)
    resumed = once(Cache(tmp_path / "cache"), 1, tmp_path / "saved" / "step=4.ckpt")
    for key in ("index", "latents", "masked_latents", "noise_mask"):
        expected = without.column("train", key)[8:]
        assert torch.equal(resumed.column("train", key), expected)


# -------------------------------------------------------------------- several captions an image


def write_described(folder, kind):
    """``COUNT`` square photographs with three captions each, which name their image."""
    made = []
    for number in range(COUNT):
        levels = np.random.default_rng(number).integers(0, 256, (SIZE + 8, SIZE + 8, 3), dtype=np.uint8)
        made.append((f"{number}", Image.fromarray(levels), [f"{way} of {number}" for way in ("photo", "view", "scan")]))
    folder.mkdir()
    if kind == "folder":
        with (folder / "metadata.jsonl").open("w") as file:
            for name, image, texts in made:
                image.save(folder / f"{name}.png")
                file.writelines(json.dumps({"file_name": f"{name}.png", "caption": text}) + "\n" for text in texts)
    elif kind.startswith("huggingface"):
        import datasets

        columns = {"image": [image for _, image, _ in made], "caption": [texts for *_, texts in made]}
        features = {"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))}
        with quiet_datasets():
            datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder)
    else:
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for name, image, texts in made[shard::2]:
                    add_file(tar, f"{name}.png", image)
                    add_file(tar, f"{name}.json", {"caption": texts})


def described(folder, kind, **more):
    settings = {"size": SIZE, "batch_size": 2, "random_crop": False, "flip": True, "num_workers": 1} | more
    if kind == "folder":
        return ImageFolderData(folder, val_share=0, **settings)
    stream = {"epoch_length": COUNT, "shuffle_buffer": 3, "parts": 1}
    if kind == "webdataset":
        return WebDatasetData(str(folder / "{0..1}.tar"), **settings, **stream)
    streaming = {"streaming": True, **stream} if kind.endswith("stream") else {"val_share": 0}
    return HuggingFaceData(str(folder), **settings, **streaming)


SOURCES = ["folder", "huggingface", "huggingface stream", "webdataset"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", SOURCES)
def test_every_image_keeps_its_captions_and_latents(tmp_path, kind):
    """Shuffled, mirrored, in a worker: bit for bit the run without a cache."""
    write_described(tmp_path / "data", kind)

    def once(cache):
        vae, encoded = counted_vae("bfloat16")
        model = run(None, cache, PlainEncoder(vae, per_batch=1), 3, pixels=described(tmp_path / "data", kind))
        return model.batches("train"), encoded.take()

    without, _ = once(None)
    first, encoded = once(Cache(tmp_path / "cache"))
    again, encoded_again = once(Cache(tmp_path / "cache"))
    assert encoded <= 2 * COUNT
    assert encoded_again == 0
    assert len(without) == 3 * COUNT // 2
    for plain, *others in zip(without, first, again, strict=True):
        for cached in others:
            for key in ("index", "latents", "original_size", "crop_top_left"):
                assert torch.equal(plain[key], cached[key])
            assert plain["caption"] == cached["caption"]
            assert plain["name"] == cached["name"]
    captions = {(caption.split()[-1], caption) for batch in again for caption in batch["caption"]}
    assert len(captions) > COUNT  # several of an image were drawn
    of_image = {
        (int(index), text.split()[-1]) for b in again for index, text in zip(b["index"], b["caption"], strict=True)
    }
    assert len(of_image) == len({index for index, _ in of_image})  # and each is of its own


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_each_source_is_encoded_ahead_of_time(tmp_path, kind, workers):
    write_described(tmp_path / "data", kind)
    vae, encoded = counted_vae()
    cache = Cache(tmp_path / "cache", variants=2)
    pixels = described(tmp_path / "data", kind, random_crop=True, num_workers=workers)
    ahead = LatentDataModule(FillData(pixels), PlainEncoder(vae), cache=cache)
    model = Fill(cache)
    quiet_trainer().predict(model, datamodule=ahead, return_predictions=False)
    assert encoded.take() == model.totals["entries"] == model.totals["images"] == 2 * COUNT
    run(
        None,
        Cache(tmp_path / "cache", variants=2),
        PlainEncoder(vae),
        2,
        pixels=described(tmp_path / "data", kind, random_crop=True),
    )
    assert encoded.take() == 0
    keys = set(needed_keys(ahead.pixels.able()))
    assert len(keys) == 2 * COUNT
    assert all(key in cache.store for key in keys)
    found = export(ahead.pixels.able(), "safetensors", tmp_path / "exported")
    assert (found["entries"], found["misses"]) == (2 * COUNT, 0)
