"""Batches of other forms than one dict: those of several loaders, dataclasses and named tuples, bare tensors."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    LatentModel,
    Photos,
    complains,
    fit,
    images,
    masks,
    noise_vae,
    photo_columns,
    predict,
    quiet_trainer,
)
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from latentdm import Captions, LatentDataModule, PlainEncoder
from latentdm.callbacks import EncodeMonitor
from latentdm.preview import first_samples

CPU = torch.device("cpu")


class Keeping(LatentModel):
    """Takes batches of any form."""

    def training_step(self, batch, batch_idx):
        self.keep("train", batch)
        return self.scale * 1.0


# -------------------------------------------------------------------- several loaders


class Several(Photos):
    """Loaders of the same photographs, joined as ``join`` says; ``other`` is a loader of something else."""

    def __init__(self, join, columns=None, **settings):
        super().__init__(columns or photo_columns(), **settings)
        self.join = join

    def train_dataloader(self):
        return self.join(*(DataLoader(self.dataset, batch_size=size) for size in (2, 1)))


JOINS = {
    "dict": (lambda a, b: {"a": a, "b": b}, lambda batch: (batch["a"], batch["b"])),
    "list": (lambda a, b: [a, b], tuple),
    "tuple": (lambda a, b: (a, b), tuple),
    "one": (lambda a, b: [a], lambda batch: (batch[0], batch[0])),
    "nested": (lambda a, b: {"x": [a], "y": {"z": b}}, lambda batch: (batch["x"][0], batch["y"]["z"])),
    "combined": (lambda a, b: CombinedLoader({"a": a, "b": b}, "min_size"), lambda batch: (batch["a"], batch["b"])),
}


@pytest.mark.parametrize("join", JOINS)
def test_each_training_loader_s_part_is_encoded_in_its_place(join, plain, vae):
    joined, parts = JOINS[join]
    model = fit(LatentDataModule(Several(joined), plain), Keeping())
    for batch in model.batches("train"):
        for part in parts(batch):
            assert set(part) == {"index", "latents"}
            expected = vae.encode(images(4)[part["index"]] / 255, posterior="mode")
            torch.testing.assert_close(part["latents"], expected, rtol=1e-5, atol=1e-5)


def test_the_parts_of_tuple_batches_are_found_by_position(plain):
    pixels = Several(lambda a, b: [a, b], photo_columns(index=False, label=torch.arange(4)), as_tuple=True)
    model = fit(LatentDataModule(pixels, plain, keys={"pixels": 0, "latents": 0}), Keeping())
    first = model.batches("train")[0]
    assert [tuple(part[0].shape) for part in first] == [(2, 4, 4, 4), (1, 4, 4, 4)]
    assert [part[1].tolist() for part in first] == [[0, 1], [0]]


def test_what_lies_beside_the_parts_stays(plain):
    def join(a, b):
        prompts = DataLoader(["a cat", "a dog"], batch_size=1)
        return CombinedLoader({"photos": a, "prompts": prompts, "other": b}, "max_size")

    batches = fit(LatentDataModule(Several(join), plain), Keeping()).batches("train")
    assert [batch["prompts"] for batch in batches] == [["a cat"], ["a dog"], None, None]
    assert [batch["photos"] is None for batch in batches] == [False, False, True, True]
    assert all("latents" in batch["other"] for batch in batches)


def test_parts_without_an_index_draw_each_for_itself():
    joined, parts = JOINS["dict"]
    datamodule = LatentDataModule(Several(joined, photo_columns(index=False)), PlainEncoder(noise_vae()))
    first, second = (fit(datamodule, Keeping()).batches("train") for _ in range(2))
    for batch, again in zip(first, second, strict=True):
        a, b = parts(batch)
        assert not torch.equal(a["latents"][:1], b["latents"])
        assert torch.equal(a["latents"], again["a"]["latents"])


def test_masks_captions_and_names_belong_to_their_part(inpaint):
    columns = photo_columns(mask=True, text=["a", "b", "c", "d"])
    captions = Captions(templates=["a photo of {caption}"])
    pixels = Several(JOINS["dict"][0], columns)
    datamodule = LatentDataModule(pixels, inpaint, captions=captions, keys={"caption": "text"})
    batch = fit(datamodule, Keeping()).batches("train")[1]
    assert batch["a"]["text"] == ["a photo of c", "a photo of d"]
    assert batch["b"]["text"] == ["a photo of b"]
    assert torch.equal(batch["a"]["noise_mask"], inpaint({"pixels": images(2), "mask": masks(4)[2:]})["noise_mask"])
    assert torch.equal(batch["b"]["noise_mask"], inpaint({"pixels": images(1), "mask": masks(4)[1:2]})["noise_mask"])
    *_, titles = first_samples(datamodule, 2, CPU)
    assert titles == ["a photo of a", "a photo of b"]


def test_what_a_part_lacks_is_named(inpaint):
    with complains("the batch has no 'mask', only 'pixels', 'index'"):
        fit(LatentDataModule(Several(JOINS["dict"][0]), inpaint), Keeping())


def test_encoding_is_counted_part_by_part(plain):
    monitor = EncodeMonitor()
    trainer = quiet_trainer(callbacks=[monitor], max_epochs=4, log_every_n_steps=2)
    trainer.fit(Keeping(), datamodule=LatentDataModule(Several(JOINS["dict"][0]), plain))
    assert monitor.totals.batches == 4 * 4 - 1
    assert monitor.totals.images == 4 * 4 * (2 + 1) - 3
    assert monitor.totals.chunks >= 2 * monitor.totals.batches


# -------------------------------------------------------------------- dataclasses and named tuples


@dataclass
class Plain:
    pixels: Any
    index: Any
    note: str = "kept"


@dataclass(frozen=True)
class Frozen:
    pixels: Any
    index: Any
    note: str = "kept"


@dataclass(slots=True)
class Slotted:
    pixels: Any
    index: Any
    note: str = "kept"


class Named(NamedTuple):
    pixels: Any
    index: Any
    note: str = "kept"


@dataclass
class Checked:
    """What is done when it is made is not done again."""

    pixels: Any
    index: Any
    note: str = field(default="kept", repr=False)

    def __post_init__(self):
        assert self.pixels.dtype == torch.uint8


FORMS = (Plain, Frozen, Slotted, Named, Checked)


def loading(collate):
    class Loading(Photos):
        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=2, collate_fn=collate)

        val_dataloader = predict_dataloader = train_dataloader

    return Loading(photo_columns())


def joined(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("form", FORMS)
def test_a_dataclass_or_named_tuple_is_like_a_dict(form, plain, vae):
    model = fit(LatentDataModule(loading(lambda rows: form(**joined(rows))), plain), Keeping())
    expected = vae.encode(images(4) / 255, posterior="mode")
    for stage in ("train", "val"):
        assert torch.allclose(torch.cat([batch["latents"] for batch in model.batches(stage)]), expected, atol=1e-5)
    batch = model.batches("train")[0]
    assert set(batch) == {"index", "note", "latents"}
    assert torch.equal(batch.index, batch["index"])
    assert torch.equal(batch.latents, batch["latents"])
    assert batch.note == "kept"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", [dict, Plain, Frozen])
def test_one_inside_another_is_encoded_in_its_place(outer, form, plain):
    def collate(rows):
        inner = form(**joined(rows))
        return {"sample": inner, "seed": 3} if outer is dict else outer(pixels=inner, index=3)

    (batch, _) = predict(LatentDataModule(loading(collate), plain))
    sample = batch["sample"] if outer is dict else batch.pixels
    assert sample["latents"].shape == (2, 4, 4, 4)
    assert (batch["seed"] if outer is dict else batch.index) == 3


@dataclass
class Renamed:
    image: Any
    hole: Any


def test_fields_may_have_other_names_and_hold_the_results(inpaint, plain):
    batch = Renamed(images(2), masks(2))
    keys = {"pixels": "image", "mask": "hole"}
    encoded = LatentDataModule(Photos(photo_columns()), inpaint, keys=keys).process(batch, CPU)
    assert set(encoded) == {"latents", "masked_latents", "noise_mask", "latent_mask"}
    in_place = LatentDataModule(Photos(photo_columns()), plain, keys={"pixels": "image", "latents": "image"})
    kept = in_place.process(batch, CPU)
    assert type(kept) is Renamed
    assert torch.equal(kept.image, encoded["latents"])
    assert batch.image.dtype == torch.uint8  # the user's own is as it was
    with complains("the batch has no 'pixels', only 'image', 'hole'", "keys={pixels: image}"):
        LatentDataModule(Photos(photo_columns()), plain).process(batch, CPU)


def test_a_named_tuple_still_has_positions(plain):
    datamodule = LatentDataModule(Photos(photo_columns()), plain, keys={"pixels": 0, "latents": 0})
    encoded = datamodule.process(Named(images(2), torch.arange(2)), CPU)
    assert type(encoded) is Named
    assert encoded.pixels.shape == (2, 4, 4, 4)


def test_lists_of_images_are_no_parts(plain):
    """Crops of several sizes, a list in the place of the images: the first must not be taken for all."""
    datamodule = LatentDataModule(Photos(photo_columns()), plain, keys={"pixels": 0, "latents": 0})
    with complains("batch[0]: expected a tensor of shape b c H W, got list of images of different sizes"):
        datamodule.process(([images(2), images(2, 16, 16)], torch.arange(2)), CPU)


# -------------------------------------------------------------------- no batch at all


class Holder:
    """A class of somebody's own."""

    def __init__(self, pixels):
        self.pixels = pixels


def test_images_that_are_no_batch_never_pass_in_silence(plain):
    datamodule = LatentDataModule(Photos(photo_columns()), plain)
    for bare in (images(2), images(2).float() / 255, images(2, channels=1), images(2, channels=4)):
        with complains("the batch is a bare tensor ((2, ", "yield a dict, as in {'pixels': images}"):
            datamodule.process(bare, CPU)
    with complains("the batch is a bare tensor"):
        LatentDataModule(Photos(photo_columns()), plain, layout="HWC").process(images(2).movedim(1, -1), CPU)
    with complains("the batch is of the class Holder", "a dict, a tuple, a list or a dataclass"):
        datamodule.process(Holder(images(2)), CPU)


def test_a_loader_of_bare_images_is_told_at_its_first_batch(plain):
    pixels = Photos(photo_columns())
    pixels.dataset = list(images(4))
    with complains("the batch is a bare tensor ((2, 3, 32, 32) uint8)"):
        predict(LatentDataModule(pixels, plain))


def test_what_holds_no_images_passes(plain):
    datamodule = LatentDataModule(Photos(photo_columns()), plain)
    for thing in (None, "a prompt", 3, torch.arange(2), torch.ones(2, 16, 8, 8), torch.ones(2, 4, 4, 4), Holder(None)):
        assert datamodule.process(thing, CPU) is thing


@pytest.mark.parametrize("form", [Plain, Slotted, Named])
def test_what_the_model_receives_is_of_the_trainer_s_dtype(form, plain):
    pixels = loading(lambda rows: form(**joined(rows)))
    (batch, _) = predict(LatentDataModule(pixels, plain), precision="bf16-true")
    assert batch.latents.dtype == torch.bfloat16
