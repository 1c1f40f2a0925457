"""What the data lack is told before an autoencoder, a text encoder or a denoiser is loaded."""

import pytest
import torch
from helpers import LatentModel, Photos, complains, photo_columns, predict, quiet_trainer
from omegaconf import OmegaConf
from PIL import Image
from running import compose_example
from tiny_pipelines import save_pipeline
from torch.utils.data import DataLoader

import train_example
from latentdm import Captions, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.cli import main
from latentdm.data import ImageFolderData, PixelDataModule, PixelDataset
from latentdm.data.dataset import collate
from latentdm.stages import Stage

LACKS = (
    "the batch has no 'caption', only 'pixels', 'index', 'name'",
    "name.txt beside name.png",
    "captions=null, text=null",
    "(Captions reads it)",
)


@pytest.fixture
def photos(tmp_path):
    """Ten pictures without captions or masks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def never():
    raise AssertionError("an autoencoder was loaded")


def wrapped(pixels, encoder=PlainEncoder, **settings):
    return LatentDataModule(pixels, encoder(never), **settings)


def folder(photos, **settings):
    return ImageFolderData(photos, size=32, batch_size=2, **settings)


def test_a_folder_without_captions_is_told_before_anything_is_loaded(photos):
    datamodule = wrapped(folder(photos), captions=Captions())
    with complains("LatentDataModule: ", *LACKS):
        datamodule.check()
    for run in ("fit", "validate", "predict"):
        with complains(*LACKS):
            getattr(quiet_trainer(), run)(LatentModel(), datamodule=datamodule)
    (photos / "3.txt").write_text("a photo", encoding="utf-8")  # where one has some, the others are empty
    datamodule.check()
    with complains("only 'pixels', 'index', 'name'", "(Captions reads it)"):
        wrapped(folder(photos, captions="ignore"), captions=Captions()).check()


def test_masks_that_the_encoder_reads_are_looked_for_too(photos):
    with complains("the batch has no 'mask', only 'pixels', 'index'", "masks=random", "(InpaintEncoder reads it)"):
        wrapped(folder(photos), InpaintEncoder).check()
    wrapped(folder(photos)).check()


class Words(Stage):
    """Makes captions of names."""

    reads, writes, on_host = ("name",), ("caption",), True

    def __call__(self, batch, draws):
        return {"caption": list(batch["name"])}


class Lengths(Stage):
    reads, writes, on_host = ("caption",), ("lengths",), True

    def __call__(self, batch, draws):
        return {"lengths": torch.tensor([len(caption) for caption in batch["caption"]])}


def test_what_a_stage_before_writes_is_not_missed(photos, vae):
    datamodule = LatentDataModule(folder(photos), PlainEncoder(vae), stages=[Words(), Lengths()])
    datamodule.check()
    assert predict(datamodule)[0]["lengths"].tolist() == [5, 5]
    with complains("the batch has no 'caption'", "(Lengths reads it)"):
        LatentDataModule(folder(photos), PlainEncoder(vae), stages=[Lengths(), Words()]).check()


# -------------------------------------------------------------------- where it cannot be known, nothing is claimed


class WithLoader(ImageFolderData):
    """Its batches are other than its samples."""

    def train_dataloader(self):
        return DataLoader(
            self.train_set, batch_size=2, collate_fn=lambda rows: {**collate(rows), "caption": ["a"] * len(rows)}
        )

    predict_dataloader = train_dataloader


class WithHook(ImageFolderData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "mask": torch.ones(len(batch["pixels"]), 1, 32, 32)}


class WrapperWithHook(LatentDataModule):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return super().on_before_batch_transfer({**batch, "caption": ["a"] * len(batch["pixels"])}, dataloader_idx)


def test_what_a_loader_or_a_hook_adds_is_not_missed(photos, vae):
    plain = PlainEncoder(vae)
    for datamodule in (
        LatentDataModule(WithLoader(photos, size=32), plain, captions=Captions()),
        LatentDataModule(WithHook(photos, size=32), InpaintEncoder(vae)),
        WrapperWithHook(folder(photos), plain, captions=Captions()),
    ):
        datamodule.check()
        assert "latents" in predict(datamodule)[0]


class Prepares(ImageFolderData):
    """Its folder is filled first."""

    def prepare_data(self):
        Image.new("RGB", (32, 32)).save(self.root / "made.png")


def test_what_prepares_itself_is_looked_at_in_setup(tmp_path):
    datamodule = wrapped(Prepares(tmp_path, size=32, val_share=0), captions=Captions())
    datamodule.check()
    with complains("the batch has no 'caption', only 'pixels', 'index', 'name'"):
        quiet_trainer().fit(LatentModel(), datamodule=datamodule)


class Broken(PixelDataset):
    """The first sample cannot be read."""

    parts = None

    def __init__(self, parts=None):
        self.parts, self.asked = parts, []

    def __len__(self):
        return 3

    def sample(self, position, epoch):
        from latentdm.data import SampleError

        self.asked.append(position)
        if position == 0:
            raise SampleError("broken")
        return {"pixels": torch.zeros(3, 32, 32, dtype=torch.uint8), "index": position}


def test_a_broken_sample_is_passed_over_and_a_stream_is_not_begun():
    pixels = PixelDataModule(batch_size=1)
    pixels.train_set = Broken()
    with complains("the batch has no 'caption'"):
        wrapped(pixels, captions=Captions()).check()
    assert pixels.train_set.asked == [0, 1]
    pixels.train_set = Broken(parts=1)
    wrapped(pixels, captions=Captions()).check()
    assert pixels.train_set.asked == []
    wrapped(Photos(photo_columns()), captions=Captions()).check()  # of somebody else: told at the first batch


# -------------------------------------------------------------------- the commands


def test_the_commands_tell_it_before_a_weight_is_loaded(photos, tmp_path, monkeypatch, capsys):
    for loader in ("latentdm.autoencoders.loading.load_autoencoder", "latentdm.text.encoder.TextEncoder.to"):
        monkeypatch.setattr(loader, lambda *args, **settings: never())
    monkeypatch.chdir(tmp_path)
    pipeline = save_pipeline("sd15_inpaint", tmp_path / "pipeline")
    overrides = ["experiment=sd15_inpaint", "pixels=folder", f"pixels.root={photos}", f"model.pretrained={pipeline}"]
    with complains(*LACKS[:3]):
        train_example.train(compose_example([*overrides, "trainer.accelerator=cpu"], tmp_path / "run"))
    assert main(["train", "--output", str(tmp_path / "run"), *overrides]) == 1
    told = capsys.readouterr().err
    assert all(part in told for part in LACKS[:3])
    assert main(["preview", *overrides]) == 1
    told = capsys.readouterr().err
    assert all(part in told for part in LACKS[:3])


# -------------------------------------------------------------------- what an experiment chooses can be exchanged

EXPERIMENTS = ("sd15_inpaint", "sd15_to_inpaint", "sdxl_inpaint", "sdxl_plain", "flux_fill")
EXCHANGED = (
    ("encoder=plain", "vae=sdxl_fp16_fix", "masks=batch", "captions=tags", "callbacks=default"),
    ("encoder=inpaint_offset", "vae=random", "masks=segmentation", "captions=templates"),
)


@pytest.mark.parametrize(("experiment", "choices"), [("sd15_inpaint", 1), ("sdxl_inpaint", 0), ("flux_fill", 0)])
def test_another_choice_of_any_group_composes_and_is_taken(experiment, choices, tmp_path):
    choices = EXCHANGED[choices]
    cfg, alone = (compose_example([*first, *choices], tmp_path) for first in ([f"experiment={experiment}"], []))
    for choice in choices:
        group = choice.partition("=")[0]
        assert OmegaConf.to_container(cfg[group]) == OmegaConf.to_container(alone[group])


def test_what_the_experiments_choose_is_what_their_pipelines_have(tmp_path):
    for experiment in EXPERIMENTS:
        cfg = compose_example([f"experiment={experiment}"], tmp_path)
        assert cfg.vae.source == cfg.text.source == cfg.model.pretrained
        assert cfg.vae.subfolder == "vae"
        if "plain" not in experiment:
            assert cfg.encoder.grow_mask_by == 0
        assert cfg.captions.dropout == (0.05 if "sdxl" in experiment else 0.1)
        assert cfg.callbacks.save_for_diffusers.every_n_steps == 1000
    flux = compose_example(["experiment=flux_fill"], tmp_path).encoder
    assert (flux.latent_mask, flux.multiple) == ("unshuffle", 16)


def test_an_experiment_without_a_group_composes(tmp_path):
    cfg = compose_example(["experiment=sdxl_inpaint", "~captions", "~masks"], tmp_path)
    assert "captions" not in cfg
    assert "masks" not in cfg
