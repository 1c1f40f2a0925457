"""``repr`` says in one line what an object is, and changes nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import Photos, RecordingAutoencoder, photo_columns, tiny_kl
from omegaconf import OmegaConf

from latentdm import Augment, Captions, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder, Stage
from latentdm.data import ImageFolderData, SamplesData
from latentdm.masks import BatchMask, FeatheredMask, MixedMask, RandomMask


def test_a_vae_says_its_class_dtype_device_and_what_is_no_default():
    vae = FrozenVAE(tiny_kl(), dtype="bfloat16", encoder_only=True, tiling="last_resort")
    assert repr(vae) == "FrozenVAE(AutoencoderKL, bfloat16 on cpu, encoder_only=True, tiling='last_resort')"
    assert repr(FrozenVAE(RecordingAutoencoder())) == "FrozenVAE(RecordingAutoencoder, float32 on cpu)"


def test_to_ask_settles_no_dtype():
    vae = FrozenVAE(tiny_kl())
    assert repr(vae) == "FrozenVAE(AutoencoderKL, dtype=auto on cpu)"
    vae.to("meta")  # which computes in no bfloat16
    assert repr(vae) == "FrozenVAE(AutoencoderKL, float32 on meta)"


def test_a_vae_says_where_it_came_from(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    vae = FrozenVAE.from_pretrained(tmp_path, dtype="float32")
    assert repr(vae) == f"FrozenVAE(AutoencoderKL from {str(tmp_path)!r}, float32 on cpu)"
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert f" from {str(file)!r}, " in repr(FrozenVAE.from_pretrained(file, dtype="float32"))
    built = FrozenVAE.from_config(vae.module.config, dtype="float32")
    assert repr(built) == "FrozenVAE(AutoencoderKL, float32 on cpu)"  # its weights are not from there


def test_an_encoder_says_its_vae_without_making_it(vae):
    assert repr(PlainEncoder(vae)) == f"PlainEncoder(vae={vae!r})"
    never = partial(FrozenVAE.from_pretrained, source="some/where", dtype="float32")
    encoder = InpaintEncoder(never, mask_offset=-4, posterior="mode")
    made = "FrozenVAE.from_pretrained(source='some/where', dtype='float32'), not made yet"
    assert repr(encoder) == f"InpaintEncoder(vae={made}, mask_offset=-4, posterior='mode')"
    encoder.per_batch = 3  # as a callback sets it
    assert "per_batch=3" in repr(encoder)


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (RandomMask(), "RandomMask()"),
        (RandomMask(kinds=["blobs"], share=(0.2, 0.4)), "RandomMask(kinds=['blobs'], share=[0.2, 0.4])"),
        (RandomMask(sides=[1, 2], boxes=(1, 4)), "RandomMask(sides=[1, 2])"),
        (FeatheredMask(BatchMask(), pixels=4), "FeatheredMask(source=BatchMask(), pixels=4)"),
        (
            MixedMask({"a": BatchMask(), "b": RandomMask(whole=1)}, {"a": 1, "b": 2}),
            "MixedMask(sources={a: BatchMask(), b: RandomMask(whole=1.0)}, probabilities={a: 1, b: 2})",
        ),
        (Augment(flip=0.5, hue=0.1), "Augment(flip=0.5, hue=0.1)"),
        (Captions(templates=["a {caption}\nof"]), "Captions(templates=['a {caption}\\nof'])"),
    ],
)
def test_a_stage_says_its_settings(stage, text):
    assert repr(stage) == text


class Depth(Stage):
    """A stage as a user writes it: it holds a network, and names attributes as it likes."""

    def __init__(self, network, scale=1.0, note="", **more):
        self.network, self.scale, self.noted = network, scale, note

    def __call__(self, batch, draws):
        return {}


class Weighted(Stage):
    """One that has nothing by default."""

    def __init__(self, weights=None):
        self.weights = weights

    def __call__(self, batch, draws):
        return {}


def test_a_stage_of_ones_own_shows_no_weights():
    assert repr(Depth(torch.nn.Linear(9, 9), 2, "x", a=1)) == "Depth(network=Linear, scale=2)"
    assert repr(Depth(torch.zeros(3), torch.ones(()))) == "Depth(network=Tensor, scale=Tensor)"
    assert repr(Weighted(torch.zeros(3))) == "Weighted(weights=Tensor)"
    assert repr(Weighted(np.zeros(3))) == "Weighted(weights=ndarray)"
    assert repr(Weighted([])) == "Weighted()"
    assert repr(Weighted(OmegaConf.create([1, "a"]))) == "Weighted(weights=[1, 'a'])"
    assert repr(Weighted(range(99))) == "Weighted(weights=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …])"
    assert len(repr(Depth("x" * 10_000))) < 200


def test_a_data_module_says_all_that_it_is_made_of(vae, tmp_path):
    pixels = ImageFolderData(tmp_path, size=64, buckets={"area": 4096})
    datamodule = LatentDataModule(
        pixels, PlainEncoder(vae), masks=RandomMask(), stages=[Depth(None)], keys={"latents": "x"}, pixel_range=[-1, 1]
    )
    text = repr(datamodule)
    assert text.startswith(f"LatentDataModule(pixels=ImageFolderData(root={str(tmp_path)!r}, size=64, buckets=")
    assert f"encoder={PlainEncoder(vae)!r}, masks=RandomMask(), stages=[Depth(network=None)]" in text
    assert text.endswith("keys={latents: 'x'}, pixel_range=[-1, 1])")
    assert "\n" not in text


def test_a_data_module_of_defaults_says_no_more_than_that(vae):
    assert repr(SamplesData(size=128, num_workers=2)) == "SamplesData(num_workers=2)"
    datamodule = LatentDataModule(Photos(photo_columns()), PlainEncoder(vae))
    assert repr(datamodule) == f"LatentDataModule(pixels=Photos, encoder=PlainEncoder(vae={vae!r}))"


class Mine(LatentDataModule):
    """A subclass with a constructor of its own."""

    def __init__(self, vae, count=4):
        self.count = count
        super().__init__(Photos(photo_columns(count)), PlainEncoder(vae), seed=3)


def test_a_subclass_says_what_its_base_is_made_of(vae):
    assert repr(Mine(vae, count=2)) == f"Mine(count=2, pixels=Photos, encoder={PlainEncoder(vae)!r}, seed=3)"
