"""``latentdm preview``: the picture of one's own data, and the words below it."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import Photos, images, masks, photo_columns
from PIL import Image
from tiny_models import CONFIGS, VIDEO, frozen

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.cli import main
from latentdm.preview import captions_of, describe, first_samples, preview
from latentdm.preview.sheet import Sheet

CPU = torch.device("cpu")
COLUMNS = [
    "image",
    "mask\nover image",
    "masked\nimage",
    "decoded\nlatents",
    "decoded\nmasked_latents",
    "noise_mask\n+ latent_mask",
    "latents\nas colour",
]
SMALL = ["pixels.size=64", "pixels.batch_size=2"]


def run(capsys, *arguments):
    """The picture that the command writes, and the lines that it prints below its path."""
    assert main(["preview", *arguments]) == 0
    path, *notes = capsys.readouterr().out.splitlines()
    with Image.open(path) as picture:
        picture.load()
    return picture, [note.strip() for note in notes]


def fails(capsys, *arguments):
    """What the command says on stderr."""
    assert main(["preview", *arguments]) == 1
    return capsys.readouterr().err


def tile(picture, sheet, row, column):
    """float64 ``h w 3`` in 0…255."""
    return np.asarray(picture.crop(sheet.box(row, sheet.columns.index(column)))).astype(float)


def psnr(one, other):
    return 10 * np.log10(255**2 / np.square(one - other).mean())


def width_of(columns, size):
    """The width of a sheet of these columns."""
    return Sheet(columns, size).box(0, len(columns) - 1)[2] + 14


# -------------------------------------------------------------------- the command


def test_default_preview_shows_the_photographs_again_after_decoding(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture, notes = run(capsys)
    assert (tmp_path / "preview.png").exists()
    sheet = Sheet(COLUMNS, (128, 128))
    assert picture.width == width_of(COLUMNS, (128, 128))
    originals = [tile(picture, sheet, row, "image") for row in range(4)]
    decoded = [tile(picture, sheet, row, "decoded\nlatents") for row in range(4)]
    assert min(original.std() for original in originals) > 15  # photographs, not plain colours
    assert np.mean(list(map(psnr, decoded, originals))) >= 24.5
    assert psnr(decoded[0], originals[1]) < 15
    assert 0.8 < float(re.search(r"standard deviation (\d\.\d+)", " ".join(notes))[1]) < 1.2
    assert any("128 by 128 pixels become 16 by 16 latents of 4 channels, by AutoencoderKL" in note for note in notes)
    assert any(re.search(r"white = repaint.* cover \d+% of the image", note) for note in notes)
    assert not any(note.startswith("CHECK") for note in notes)


def test_masked_columns_agree_with_each_other(tmp_path, capsys):
    picture, _ = run(
        capsys, "pixels.size=128", "pixels.batch_size=2", "--output", str(tmp_path / "a.png"), "--samples=1"
    )
    sheet = Sheet(COLUMNS, (128, 128))
    original, over, masked, noise = (tile(picture, sheet, 0, COLUMNS[n]) for n in (0, 1, 2, 5))
    inside = (over != original).any(-1)
    assert 0.05 < inside.mean() < 0.6
    assert (np.abs(masked[inside] - 127.5) <= 1).mean() > 0.99
    assert np.array_equal(masked[~inside], original[~inside])
    assert (over[inside][:, 0] >= over[inside][:, 2]).mean() > 0.9  # tinted red
    assert (noise[inside].sum(-1) > 0).all()  # the grown mask holds the mask
    assert (noise[~inside].sum(-1) > 0).mean() < 0.5


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [
        (["encoder=plain"], [COLUMNS[0], COLUMNS[3], COLUMNS[6]]),
        (["encoder=inpaint"], COLUMNS),
        (["encoder=inpaint", "encoder.latent_mask=unshuffle"], COLUMNS),
        (["encoder=inpaint_offset", "encoder.mask_offset=-4"], COLUMNS),
    ],
    ids=["plain", "inpaint", "unshuffle", "inpaint_offset"],
)
def test_each_encoder_has_its_columns(overrides, columns, tmp_path, capsys):
    picture, notes = run(capsys, *SMALL, *overrides, "--output", str(tmp_path / "sub" / "a.png"))
    assert picture.width == width_of(columns, (64, 64))
    assert any("Masks:" in note for note in notes) == (len(columns) > 3)


def test_a_folder_of_ones_own_with_masks(workplace, capsys):
    picture, notes = run(
        capsys, "pixels=folder", "pixels.root=photos", "masks=batch", "pixels.size=100", "--samples", "3"
    )
    assert picture.width == width_of(COLUMNS, (96, 96))
    assert "Images: 100 by 100 pixels, cropped to 96 by 96, become 12 by 12 latents" in notes[0]
    assert "cover 2" in notes[3]  # the box is a fifth of each image


def test_a_folder_whose_transparency_is_the_mask(workplace, capsys):
    picture, notes = run(
        capsys, "pixels=folder", "pixels.root=cutouts", "pixels.alpha=true", "masks=alpha", "pixels.size=96"
    )
    masked = tile(picture, Sheet(COLUMNS, (96, 96)), 0, "masked\nimage")
    assert (np.abs(masked[30:60, 30:50] - 127.5) <= 1).all()
    assert "cover 2" in notes[3]


def test_validation_data_can_be_shown(tmp_path, capsys):
    train, _ = run(capsys, *SMALL, "encoder=plain", "--output", str(tmp_path / "train.png"))
    val, _ = run(capsys, *SMALL, "encoder=plain", "--stage=val", "--output", str(tmp_path / "val.png"))
    assert train.tobytes() != val.tobytes()


def test_options_may_stand_between_overrides(tmp_path, capsys):
    run(capsys, "encoder=plain", "--samples", "1", *SMALL, "--output", str(tmp_path / "a.png"), "seed=3")


def test_an_app_of_ones_own(workplace, capsys):
    (workplace / "configs").mkdir()
    (workplace / "configs" / "app.yaml").write_text(
        "defaults: [{pixels: folder}, {vae: tiny}, {encoder: plain}, {masks: batch}, {datamodule: latent}, _self_]\n"
        "seed: 0\npixels: {root: photos, size: 96, batch_size: 2}\n"
        "elsewhere: ${hydra:runtime.output_dir}\n",
        encoding="utf-8",
    )
    picture, _ = run(capsys, "--config-dir", "configs", "--config-name", "app", "pixels.size=64")
    assert picture.width == width_of([COLUMNS[0], COLUMNS[3], COLUMNS[6]], (64, 64))


def test_an_app_without_a_data_module_is_told(workplace, capsys):
    (workplace / "app.yaml").write_text("seed: 0\n", encoding="utf-8")
    assert "the config 'app' has no datamodule" in fails(capsys, "--config-dir=.", "--config-name=app")


def test_what_is_wrong_is_said_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "inpaint_offset" in fails(capsys, "encoder=outpaint")
    assert "'encoder.grow_mask'" in fails(capsys, "encoder=inpaint", "encoder.grow_mask=3")
    assert fails(capsys, "pixels=folder").endswith("preview: pixels.root has no value; give it one: pixels.root=…\n")
    assert "~masks instead of masks=null" in fails(capsys, "masks=null")
    said = fails(capsys, "pixels=folder", "pixels.root=nowhere")
    assert said.startswith("latentdm preview: ImageFolderData: root='nowhere' does not exist")
    assert "such as preview.png" in fails(capsys, "--output", "x.foo")
    assert "such as preview.png" in fails(capsys, "--output", str(tmp_path))
    assert "preview: --device foo: " in fails(capsys, "--device", "foo")
    assert said.count("\n") == 1


def test_unknown_commands_are_answered_with_the_usage(capsys):
    assert main(["encode_all"]) == 2
    assert "latentdm preview" in capsys.readouterr().err
    assert main([]) == 0


@pytest.mark.parametrize("samples", ["0", "three"])
def test_samples_are_counted_from_one(samples, capsys):
    with pytest.raises(SystemExit):
        main(["preview", "--samples", samples])
    assert "--samples" in capsys.readouterr().err


def test_the_module_runs_as_a_script(tmp_path):
    command = [sys.executable, "-m", "latentdm", "preview", *SMALL, "encoder=plain", "--samples=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "preview.png").exists()
    assert done.stdout.splitlines()[0] == str(tmp_path / "preview.png")


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
        ({"text": ["a", "b"], "name": ["x", "y"]}, None, ["a", "b"]),
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
