"""The preview of a batch: its picture, the words below it, and the samples of any data module."""

import numpy as np
import pytest
import torch
from helpers import COLUMNS, Photos, images, masks, photo_columns
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from tiny_models import CONFIGS, VIDEO, frozen

from latentdm import Captions, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.data import ImageFolderData
from latentdm.preview import before_and_after, captions_of, describe, first_samples, preview
from latentdm.preview.sheet import Sheet

CPU = torch.device("cpu")


def width_of(columns, size):
    """The width of a sheet of these columns."""
    return Sheet(columns, size).box(0, len(columns) - 1)[2] + 14


# -------------------------------------------------------------------- any encoder and batch


def drawn(encoder, batch, **settings):
    """A preview of a batch as an encoder gets it, and the headers it should have."""
    return preview(encoder, batch, encoder(batch), **settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_a_preview(name):
    vae = frozen(name)
    side = 4 * vae.spatial_compression
    batch = {"pixels": images(2, side, side), "mask": masks(2, side, side)}
    encoder = InpaintEncoder(vae)
    picture = drawn(encoder, batch)
    assert picture.width == width_of(COLUMNS, (side, side))
    assert vae.class_name in describe(encoder, batch, encoder(batch))[0]


@pytest.mark.parametrize("name", VIDEO[:1])
def test_of_clips_the_first_frame_is_shown(name):
    vae = frozen(name)
    side = 4 * vae.spatial_compression
    clips = images(2 * 5, side, side).view(2, 5, 3, side, side).transpose(1, 2)
    columns = [COLUMNS[0], COLUMNS[3], COLUMNS[6]]
    picture = drawn(PlainEncoder(vae), {"pixels": clips})
    sheet = Sheet(columns, (side, side))
    shown = np.asarray(picture.crop(sheet.box(1, 0)).resize((side, side), Image.Resampling.NEAREST))
    assert np.array_equal(shown, clips[1, :, 0].permute(1, 2, 0).numpy())


def test_without_a_decoder_nothing_is_decoded():
    from tiny_models import build

    vae = FrozenVAE(build("kl"), dtype="float32", encoder_only=True)
    batch = {"pixels": images(1), "mask": masks(1)}
    assert drawn(InpaintEncoder(vae), batch).width == width_of(COLUMNS[:3] + COLUMNS[5:], (32, 32))
    assert not any("ecoded" in note for note in describe(InpaintEncoder(vae), batch, InpaintEncoder(vae)(batch)))


def test_one_mask_serves_every_row(vae):
    batch = {"pixels": images(3), "mask": masks(1)}
    encoder = InpaintEncoder(vae)
    alone = drawn(encoder, {"pixels": images(3), "mask": masks(1).repeat(3, 1, 1, 1)}, captions=["a", "b", "c"])
    sheet = Sheet(COLUMNS, (32, 32))
    picture = drawn(encoder, batch, captions=["a", "b", "c"])
    assert picture.crop(sheet.box(2, 1)).tobytes() == alone.crop(sheet.box(2, 1)).tobytes()


def test_an_unshuffled_latent_mask_lies_exactly_on_the_noise_mask(vae):
    batch = {"pixels": images(1, 96, 96), "mask": masks(1, 96, 96)}
    picture = drawn(InpaintEncoder(vae, latent_mask="unshuffle"), batch)
    colours = np.asarray(picture.crop(Sheet(COLUMNS, (96, 96)).box(0, 5))).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 2  # neither white nor dark orange sticks out


@pytest.mark.parametrize("latent_mask", ["nearest", "area", "max", "unshuffle"])
def test_the_offset_of_the_nearest_latent_mask_is_explained(latent_mask, vae):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 4:12, 4:12] = 1
    batch = {"pixels": images(1), "mask": mask}
    encoder = InpaintEncoder(vae, grow_mask_by=0, latent_mask=latent_mask)
    outputs = encoder(batch)
    notes = [note for note in describe(encoder, batch, outputs) if "half a block further right and down" in note]
    assert len(notes) == (latent_mask == "nearest")
    if notes:
        assert "top left pixel of each 8 by 8 block" in notes[0]
        [place] = outputs["latent_mask"][0, 0].nonzero().tolist()
        assert place == [1, 1]  # 8…16, where the mask is 4…12


def tile(picture, columns, row, column, size=(32, 32)):
    """uint8 ``h w 3``, a tile at its images' own size."""
    part = picture.crop(Sheet(columns, size).box(row, columns.index(column)))
    return np.asarray(part.resize(size, Image.Resampling.NEAREST))


def hwc(pixels):
    """uint8 ``b 3 h w`` → numpy ``b h w 3``."""
    return pixels.permute(0, 2, 3, 1).numpy()


def test_a_source_has_a_column_and_is_what_the_masked_image_shows(vae):
    batch = {"pixels": images(2), "mask": masks(2), "source": images(2, seed=7)}
    columns = [COLUMNS[0], "source", *COLUMNS[1:]]
    picture = drawn(InpaintEncoder(vae, grow_mask_by=0), batch)
    assert picture.width == width_of(columns, (32, 32))
    kept = (batch["mask"][1, 0] == 0).numpy()
    shown = {column: tile(picture, columns, 1, column) for column in columns}
    assert np.array_equal(shown["image"], hwc(batch["pixels"])[1])
    assert np.array_equal(shown["source"], hwc(batch["source"])[1])
    assert np.array_equal(shown["masked\nimage"][kept], shown["source"][kept])


def test_a_source_is_cropped_as_its_image_is(vae):
    batch = {"pixels": images(1, 45, 60), "source": images(1, 45, 60, channels=1, seed=7)}
    columns = ["image", "source", "decoded\nlatents", "decoded\nsource_latents", "latents\nas colour"]
    picture = drawn(PlainEncoder(vae), batch)
    assert picture.width == width_of(columns, (56, 40))
    shown = tile(picture, columns, 0, "source", (56, 40))
    assert np.array_equal(shown, hwc(batch["source"][..., 2:42, 2:58].expand(-1, 3, -1, -1))[0])


@pytest.fixture
def titles(monkeypatch):
    """The titles of the sheets that are drawn."""
    seen, draw = [], Sheet.draw

    def watched(self, rows, titles, notes=()):
        seen.extend(titles)
        return draw(self, rows, titles, notes)

    monkeypatch.setattr(Sheet, "draw", watched)
    return seen


def test_a_title_tells_the_mask_from_the_noise_mask(vae, titles):
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, 8:16, 8:24] = 1  # an eighth of the image
    mask[1, :, 8:24, 8:24] = 1
    batch = {"pixels": images(2), "mask": mask}
    encoder = InpaintEncoder(vae, mask_offset=4)
    outputs = encoder(batch)
    preview(encoder, batch, outputs, ["one", ""])
    grown = (16 * 24 / 1024, 24 * 24 / 1024)
    assert titles[0].startswith(f"one · mask 12%, noise_mask {grown[0]:.0%} · latents' std ")
    assert titles[1].startswith(f"(no caption) · mask 25%, noise_mask {grown[1]:.0%} · latents' std ")
    [note] = [note for note in describe(encoder, batch, outputs) if note.startswith("Masks:")]
    assert "The mask covers 19% (12% to 25%)" in note
    assert f"{sum(grown) / 2:.0%} ({grown[0]:.0%} to {grown[1]:.0%})" in note


def test_samples_are_drawn_from_pixels_as_from_latents(vae):
    batch = {"pixels": images(2), "mask": masks(2)}
    encoder = InpaintEncoder(vae)
    outputs = encoder(batch)
    sampled = outputs["latents"].flip(0)
    pixels = torch.cat([vae.decode(row) for row in sampled.split(1)])
    from_latents, from_pixels = (before_and_after(encoder, batch, outputs, one) for one in (sampled, pixels))
    assert from_latents.tobytes() == from_pixels.tobytes()


def test_a_sample_is_put_into_the_picture_that_the_model_was_shown(vae):
    batch = {"pixels": images(2), "mask": masks(2), "source": images(2, seed=7)}
    encoder = InpaintEncoder(vae, grow_mask_by=0)
    columns = ["image", "source", "masked\nimage", "sampled", "sampled,\nin the image"]
    sampled = images(2, seed=8)
    picture = before_and_after(encoder, batch, encoder(batch), sampled.float() / 255)
    assert picture.width == width_of(columns, (32, 32))
    for row in range(2):
        hole = (batch["mask"][row, 0] > 0).numpy()
        inside = tile(picture, columns, row, "sampled,\nin the image")
        assert np.array_equal(tile(picture, columns, row, "sampled"), hwc(sampled)[row])
        assert np.array_equal(inside[hole], hwc(sampled)[row][hole])
        assert np.array_equal(inside[~hole], hwc(batch["source"])[row][~hole])


def test_samples_limit_the_rows(vae):
    encoder = PlainEncoder(vae)
    batch = {"pixels": images(3)}
    assert drawn(encoder, batch, samples=2).height == drawn(encoder, {"pixels": images(2)}).height
    assert drawn(encoder, batch, samples=9).height == drawn(encoder, batch).height


# -------------------------------------------------------------------- words


def test_wrong_masks_and_scaling_are_pointed_out(vae):
    encoder = InpaintEncoder(vae)
    batch = {"pixels": images(4), "mask": torch.full((4, 1, 32, 32), 255, dtype=torch.uint8)}
    outputs = encoder(batch)
    [alarm] = [
        note for note in describe(encoder, batch, outputs | {"latents": torch.randn(4, 4, 4, 4)}) if "CHECK" in note
    ]
    assert "inverted" in alarm
    [first, _] = [
        note for note in describe(encoder, batch, outputs | {"latents": 3 * torch.randn(4, 4, 4, 4)}) if "CHECK" in note
    ]
    assert "scaling_factor" in first


@pytest.mark.parametrize(
    ("batch", "key", "captions"),
    [
        ({"text": ["a", "b"], "name": ["x", "y"]}, None, ["x", "y"]),
        ({"prompt": ["a", "b"], "caption": ["x", "y"]}, None, ["x", "y"]),
        ({"text": ["a", "b"], "name": ["x", "y"]}, "text", ["a", "b"]),
        ({"text": ["a", "b"], "name": ["x", "y"]}, "name", ["x", "y"]),
        ({"text": ["a", "b"]}, "name", None),
        ({"text": torch.zeros(2)}, None, None),
        ((torch.zeros(2), ("a", "b")), 1, ["a", "b"]),
        ((torch.zeros(2), ("a", "b")), 4, None),
        ((torch.zeros(2), ("a", "b")), None, None),
    ],
)
def test_captions_are_found(batch, key, captions):
    assert captions_of(batch, key) == captions


# -------------------------------------------------------------------- data modules of any kind


def module(vae, columns, encoder=PlainEncoder, **settings):
    loader = {name: settings.pop(name) for name in ("batch_size", "as_tuple") if name in settings}
    return LatentDataModule(Photos(columns, **loader), encoder(vae), **settings)


def test_samples_are_gathered_from_several_batches(vae):
    columns = photo_columns(5, caption=list("abcde"))
    inputs, outputs, captions = first_samples(module(vae, columns, batch_size=2), 3, CPU)
    assert torch.equal(inputs["pixels"], columns["pixels"][:4])
    assert outputs["latents"].shape[0] == 4
    assert captions == ["a", "b", "c", "d"]


def test_titles_are_names_and_then_captions_as_the_stages_changed_them(vae):
    captions = Captions(templates=["a photo of {caption}"])
    columns = photo_columns(3, text=list("abc"))
    named = photo_columns(3, text=list("abc"), name=list("xyz"))
    for given, expected in ((columns, [f"a photo of {letter}" for letter in "abc"]), (named, ["x", "y", "z"])):
        *_, found = first_samples(module(vae, given, keys={"caption": "text"}, captions=captions), 3, CPU)
        assert found == expected


def test_sources_are_gathered_too(vae):
    columns = photo_columns(4, mask=True, source=images(4, seed=7))
    datamodule = module(vae, columns, InpaintEncoder)
    inputs, outputs, _ = first_samples(datamodule, 3, CPU)
    assert torch.equal(inputs["source"], columns["source"])
    assert preview(datamodule.encoder, inputs, outputs).width == width_of([*COLUMNS, "source"], (32, 32))


def test_one_mask_a_batch_serves_its_images_alone(vae):
    columns = photo_columns(4, mask=True)
    datamodule = module(vae, columns, InpaintEncoder, batch_size=2)
    found = datamodule.pixels.on_after_batch_transfer
    datamodule.pixels.on_after_batch_transfer = lambda batch, idx: found(batch | {"mask": batch["mask"][:1]}, idx)
    inputs, outputs, _ = first_samples(datamodule, 4, CPU)
    assert torch.equal(inputs["mask"], columns["mask"][[0, 0, 2, 2]])
    assert preview(datamodule.encoder, inputs, outputs).height > 4 * 96


def test_samples_of_another_size_than_the_first_are_passed_over(vae):
    datamodule = module(vae, photo_columns(1))
    sizes = [(32, 32), (32, 48), (32, 32), (48, 32)]
    batches = [{"pixels": images(1, *size, seed=seed)} for seed, size in enumerate(sizes)]
    datamodule.pixels.train_dataloader = lambda: torch.utils.data.DataLoader(batches, batch_size=None)
    inputs, outputs, _ = first_samples(datamodule, 9, CPU)
    assert torch.equal(inputs["pixels"], torch.cat([batches[0]["pixels"], batches[2]["pixels"]]))
    assert len(outputs["latents"]) == 2


def test_fewer_samples_than_asked_for(vae):
    _, outputs, _ = first_samples(module(vae, photo_columns(3), batch_size=2), 8, CPU)
    assert outputs["latents"].shape[0] == 3


def test_no_samples_at_all_is_an_error(vae):
    datamodule = module(vae, photo_columns(1))
    datamodule.pixels.val_dataloader = list
    with pytest.raises(ValueError, match="the val data is empty"):
        first_samples(datamodule, 2, CPU, stage="val")


def test_tuple_batches_with_renamed_keys(vae):
    columns = photo_columns(2, index=False, mask=True)
    datamodule = module(
        vae,
        columns,
        InpaintEncoder,
        as_tuple=True,
        keys={"pixels": 0, "mask": 1, "latents": 0, "masked_latents": 1, "noise_mask": 2, "latent_mask": 3},
    )
    inputs, outputs, _ = first_samples(datamodule, 2, CPU)
    assert preview(datamodule.encoder, inputs, outputs).width == width_of(COLUMNS, (32, 32))


def test_channels_last_images_are_shown_upright(vae):
    columns = photo_columns(2) | {"image": images(2, 32, 48).movedim(1, -1)}
    del columns["pixels"]
    datamodule = module(vae, columns, keys={"pixels": "image"}, layout="HWC")
    inputs, outputs, _ = first_samples(datamodule, 2, CPU)
    picture = preview(datamodule.encoder, inputs, outputs)
    sheet = Sheet([COLUMNS[0], COLUMNS[3], COLUMNS[6]], (48, 32))
    shown = np.asarray(picture.crop(sheet.box(1, 0)))[1::2, 1::2]
    assert np.array_equal(shown, columns["image"][1].numpy())


def test_the_first_of_several_loaders_is_shown(vae):
    datamodule = module(vae, photo_columns(4, name=list("abcd")))
    loader = datamodule.train_dataloader()
    for joined in (
        {"x": loader, "y": []},
        [loader],
        CombinedLoader([[loader], loader], "max_size"),
        {"x": {"y": loader}},
    ):
        datamodule.pixels.train_dataloader = lambda joined=joined: joined
        _, outputs, titles = first_samples(datamodule, 3, CPU)
        assert outputs["latents"].shape[0] == 4
        assert titles == ["a", "b", "c", "d"]
    datamodule.pixels.train_dataloader = dict
    with pytest.raises(ValueError, match="the train data is empty"):
        first_samples(datamodule, 3, CPU)


def test_each_row_is_named_after_its_file_and_tells_both_shares(vae, tmp_path, titles):
    for name in ("beach", "forest"):
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / f"{name}.png")
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 16, 16))
        mask.save(tmp_path / f"{name}-mask.png")
        (tmp_path / f"{name}.txt").write_text("a caption", encoding="utf-8")
    pixels = ImageFolderData(tmp_path, size=32, batch_size=1, val_share=0, random_crop=False)
    datamodule = LatentDataModule(pixels, InpaintEncoder(vae, grow_mask_by=17))
    inputs, outputs, names = first_samples(datamodule, 2, CPU)
    preview(datamodule.encoder, inputs, outputs, names)
    shares = {title.split(" · latents")[0] for title in titles}
    # 24 of 32 on each side, as a window of 17 reaches 8 pixels beyond
    assert shares == {f"{name}.png · mask 25%, noise_mask 56%" for name in ("beach", "forest")}
