"""``latentdm report``, from the command to the page: what a user's folder holds, and what is wrong with it."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import Photos, fit, no_warnings, photo_columns
from lightning.pytorch import LightningDataModule
from PIL import Image
from report_pages import SMALL, check_form, write_hostile_photos
from running import write_shards
from tiny_models import frozen
from torch.utils.data import DataLoader, IterableDataset

from latentdm import Cache, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.cli import main
from latentdm.data import ImageFolderData
from latentdm.report import look, page

CPU = torch.device("cpu")


def run(capsys, *arguments):
    """The page that the command writes, and the lines below its path."""
    with no_warnings():
        assert main(["report", *arguments]) == 0, capsys.readouterr().err
    path, *notes = capsys.readouterr().out.splitlines()
    return check_form(Path(path).read_text(encoding="utf-8")), [note.strip() for note in notes]


def seen(encoder, samples=64, stage="train", cache=None, **settings):
    """The page about photos/, without a command around it."""
    pixels = ImageFolderData("photos", **{"size": 64, "batch_size": 2, "val_share": 0} | settings)
    return check_form(page(look(LatentDataModule(pixels, encoder, cache=cache), samples, CPU, stage)))


def fails(capsys, *arguments):
    """What the command says on stderr; no page is written."""
    assert main(["report", *arguments]) == 1
    assert not list(Path().rglob("*.html"))
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_with_masks(workplace, capsys):
    (workplace / "photos" / "notes.docx").touch()
    (workplace / "photos" / "one.txt").touch()
    made, notes = run(capsys, *SMALL, "masks=batch", "pixels.val_share=0", "pixels.random_crop=false")
    assert notes == []
    text = made.sections
    assert made.tags.count("img") == 4 * 7
    assert "from 4 samples of the 4 of an epoch (64 were asked for; an epoch has no more" in made.text
    assert "Nothing looks wrong in these samples." in text["check"]
    assert "64 by 64 pixels become 8 by 8 latents of 4 channels, by AutoencoderKL" in text["samples"]
    summaries = made.values("aria-label", "svg")
    assert any(each.startswith("Shorter side of the image files: 4 values from 150 to 150 px") for each in summaries)
    assert any(
        each.startswith("Size that the model is given: 1 of them, most in 64 × 64 (4 of 4)") for each in summaries
    )
    assert any(each.startswith("Share that the mask covers: 4 values from 19") for each in summaries)
    assert any(each.startswith("Latent channels: 4 channels") for each in summaries)
    assert "No captions." in text["captions"]
    assert "4 images, 4 masks" in text["left-out"]
    assert "left out: 1 .docx (notes.docx)" in text["left-out"]
    assert "All samples that were asked for could be read." in text["left-out"]
    assert "root: photos" in text["configuration"]
    assert "torch" in text["versions"]
    # Mean and log variance of 4 × 8 × 8 in two bytes, and what is around; the masked image beside it, and its mask.
    assert "1 masked image beside each" in text["costs"]
    assert f"about {(2 * (2 * 256 * 2 + 44) + 64 * 8) / 1024:.1f} KiB in" in text["costs"]
    assert "for 4 samples, and the model's own steps on top" in text["costs"]


def test_what_means_harm_is_shown_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_hostile_photos(tmp_path / "photos")
    options = ["masks=random", "pixels.val_share=0", "pixels.seed=1", "+evil='</pre><script>'", "--output=sub/a.html"]
    made, notes = run(capsys, *SMALL, *options, "--samples=20")
    assert "<script>alert(1)<.png" in made.sections["samples"] + made.sections["left-out"]
    assert "⟨U+202E⟩gnp.exe.png" in made.sections["samples"] + made.sections["left-out"]
    assert "cannot read broken <b>.png" in made.sections["left-out"] or "broken <b>.png" in made.sections["left-out"]
    assert "</pre><script>" in made.sections["configuration"]
    assert "Training ends at the first of them, as on_error is raise" in made.sections["left-out"]
    assert [note for note in notes if "on_error is raise" in note]
    assert "are longer than 350 characters" in made.sections["captions"]
    assert (tmp_path / "sub" / "a.html").stat().st_size < 2_000_000
    assert os.listdir(tmp_path / "sub") == ["a.html"]


def test_nothing_but_broken_images_is_told_kindly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"no picture")
    made, notes = run(capsys, *SMALL, "masks=random", "pixels.val_share=0")
    assert "none could be read" in made.sections["samples"]
    assert "5 of the samples that were asked for" in made.sections["left-out"]
    assert all(f"{number}.png" in made.sections["left-out"] for number in range(5))
    assert any("looking ended early" in note for note in notes)


def test_some_broken_images_beside_a_limit(workplace, vae):
    for number in range(4):
        (workplace / "photos" / f"broken{number}.png").write_bytes(b"no picture")
        (workplace / "photos" / f"broken{number}-mask.png").write_bytes(b"no picture")
    made = seen(InpaintEncoder(vae), on_error="skip")
    assert "more than max_skipped_share=0.05: training would end" in made.sections["check"]
    assert "Others take their place." in made.sections["left-out"]


def test_buckets_are_counted_over_all_images(workplace, vae):
    for number, path in enumerate(sorted((workplace / "photos").glob("*[!k].png"))[:2]):
        with Image.open(path) as image:
            wide = image.crop((0, 0, 150, 75))
        wide.save(workplace / "photos" / f"wide{number}.png")
        wide.convert("L").point(lambda level: 255 * (level > 128)).save(workplace / "photos" / f"wide{number}-mask.png")
    made = seen(InpaintEncoder(vae), buckets={"area": 4096, "step": 16})
    summaries = made.values("aria-label", "svg")
    assert any(each.startswith("Bucket, of all images: 2 of them, most in 64 × 64 (4 of 6)") for each in summaries)
    assert any(each.startswith("Size that the model is given: 2 of them") for each in summaries)
    assert made.sections["samples"].count("pixels become") == 2


def test_validation_data_without_masks(workplace, vae):
    made = seen(PlainEncoder(vae), 1, "val", val_share=0.3)
    assert "Report on the validation data" in made.text
    assert "No masks" in made.sections["masks"]
    assert made.tags.count("img") == 3


def test_a_cache_of_drawn_crops(workplace, vae):
    entry = 2 * 256 * 2 + 44  # mean and log variance of 4 × 8 × 8 in two bytes, and what is around
    costs = seen(PlainEncoder(vae), cache=Cache(variants=4)).sections["costs"]
    assert f"about {4 * entry / 1024:.1f} KiB in float16" in costs
    assert "cache.variants=4 crops an image" in costs
    costs = seen(PlainEncoder(vae)).sections["costs"]
    assert "nothing is kept unless cache.variants says how many" in costs
    costs = seen(PlainEncoder(vae), random_crop=False, flip=True).sections["costs"]
    assert f"about {2 * entry / 1024:.1f} KiB in float16; both sides" in costs


def test_what_is_wrong_is_said_in_a_line_and_no_page_is_written(workplace, capsys):
    (workplace / "empty").mkdir()
    assert "empty" in fails(capsys, "pixels=folder", "pixels.root=empty")
    said = fails(capsys, *SMALL, "vae=sd15", "vae.source=./nowhere")
    assert said.startswith("latentdm report: ")
    assert "./nowhere" in said
    assert "such as report.html" in fails(capsys, *SMALL, "--output=report.png")
    assert "such as report.html" in fails(capsys, "--output=photos")
    assert "pixels.siez=3" in fails(capsys, *SMALL, "pixels.siez=3")


@pytest.mark.parametrize("samples", ["0", "three"])
def test_samples_are_counted_from_one(samples, capsys):
    with pytest.raises(SystemExit):
        main(["report", "--samples", samples])
    assert "--samples" in capsys.readouterr().err


def test_what_lets_somebody_in_is_left_out(workplace, capsys):
    secrets = [
        "+logger.mine.api_key=sesame", "+hub={token: sesame, tokenizer: clip}", "+a='https://me:sesame@host/x'",
        "+b='https://host/x.tar?X-Amz-Signature=sesame&part=1'", "+c=['s3://key:sesame@bucket']",
    ]  # fmt: skip
    made, _ = run(capsys, *SMALL, *secrets, "--samples=1")
    assert "sesame" not in made.text
    for kept in (
        "api_key: (left out)",
        "tokenizer: clip",
        "https://…@host/x",
        "X-Amz-Signature=…&part=1",
        "s3://…@bucket",
    ):
        assert kept in made.sections["configuration"]


def test_workers_read_and_skip_alike_and_leave_nothing_behind(workplace, vae, monkeypatch):
    (workplace / "photos" / "broken.png").write_bytes(b"no picture")
    (workplace / "photos" / "broken-mask.png").write_bytes(b"no picture")
    with tempfile.TemporaryDirectory() as folder:  # of a short name: workers put sockets there
        monkeypatch.setattr(tempfile, "tempdir", folder)
        made = seen(InpaintEncoder(vae), 4, num_workers=2)
        assert not list(Path(folder).glob("latentdm-*"))
    assert "broken.png" in made.sections["left-out"]
    assert "stood still" not in made.text


def test_exported_latents_have_pictures_though_no_image_is_read(workplace, capsys):
    latents = ["pixels=latents", "pixels.root=exported", "encoder=plain", "pixels.batch_size=2", "--device=cpu"]
    made, _ = run(capsys, *latents, "--samples=2")
    assert made.tags.count("img") == 2 * 3
    assert "Latent channels: 4 channels" in " ".join(made.values("aria-label", "svg"))


# -------------------------------------------------------------------- data modules of other kinds


class Endless(LightningDataModule):
    """A stream without a length."""

    class Stream(IterableDataset):
        def __iter__(self):
            while True:
                yield {"pixels": torch.randint(256, (3, 32, 32), dtype=torch.uint8), "text": "a photo"}

    def train_dataloader(self):
        return DataLoader(self.Stream(), batch_size=4)


def test_a_stream_without_a_length_is_looked_at_as_far_as_asked(vae, monkeypatch, tmp_path):
    found = look(LatentDataModule(Endless(), PlainEncoder(vae)), 6, CPU)
    assert (found.total, found.samples, found.counts, found.captions) == (None, 6, [4, 4], [7] * 6)
    assert found.drawn[0].columns["image"].shape == (6, 3, 32, 32)
    parts = check_form(page(found, "", ""))
    assert "unknown: the data have no length" in parts.sections["costs"]
    assert "only it can tell" in parts.sections["left-out"]


def test_clips_are_shown_by_their_first_frame():
    vae = frozen("wan")
    clips = {"pixels": torch.randint(256, (2, 3, 5, 32, 32), dtype=torch.uint8), "index": torch.arange(2)}
    found = look(LatentDataModule(Photos(clips), PlainEncoder(vae)), 2, CPU)
    assert found.drawn[0].columns["image"].shape[1:] == (3, 32, 32)
    assert found.given == {(32, 32): 2}


def test_names_of_ones_own_and_batches_as_tuples(vae):
    columns = {"image": photo_columns(4)["pixels"], "caption": ["a", "bb", "", "dddd"]}
    datamodule = LatentDataModule(Photos(columns, as_tuple=True), PlainEncoder(vae), keys={"pixels": 0, "latents": 0})
    assert look(datamodule, 4, CPU).samples == 4
    datamodule = LatentDataModule(Photos(columns), PlainEncoder(vae), keys={"pixels": "image"})
    assert look(datamodule, 4, CPU).captions == [1, 2, 0, 4]


def test_shards_have_epochs_of_a_set_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards")
    shards = [
        "pixels=webdataset",
        "pixels.shards='shards/train-{0000..0002}.tar'",
        "pixels.epoch_length=1000",
        "pixels.size=64",
    ]
    made, _ = run(capsys, *shards, "pixels.batch_size=2", "masks=batch", "--samples=4", "--device=cpu")
    assert "from 4 samples of the 1,000 of an epoch" in made.text
    assert "Characters a caption" in made.sections["captions"]


def test_alarms_are_those_of_training(vae):
    columns = photo_columns(8, mask=True)
    columns["mask"] = columns["mask"] * 0
    found = look(LatentDataModule(Photos(columns), InpaintEncoder(vae, grow_mask_by=0)), 8, CPU)
    assert any("of the masks cover less than" in alarm for alarm in found.alarms)


def test_what_was_looked_at_can_be_trained_on(vae, workplace):
    def module():
        pixels = ImageFolderData("photos", size=64, batch_size=2, random_crop=False)
        return LatentDataModule(pixels, InpaintEncoder(vae))

    datamodule = module()
    look(datamodule, 2, CPU)
    assert (datamodule.pixels.on_error, datamodule.pixels.max_skipped_share) == ("raise", 0.05)
    assert torch.equal(fit(datamodule).column("train"), fit(module()).column("train"))
