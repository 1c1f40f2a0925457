"""The 18 cases that the original ComfyUI nodes computed: by the encoders themselves, and through the data module."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Photos
from safetensors import safe_open
from safetensors.torch import load_file

from latentdm import InpaintEncoder, LatentDataModule, PlainEncoder

CASES = sorted((Path(__file__).parent.parent / "golden").glob("*.safetensors"))
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)


def load(case):
    """The node's settings and its tensors; images and masks channels last, as the nodes have them."""
    with safe_open(case, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    return settings, load_file(case)


def encoder_for(settings, vae):
    options = {name: value for name, value in settings.items() if name != "node"}
    return (InpaintEncoder if settings["node"].startswith("inpaint") else PlainEncoder)(vae, **options)


def channels_first(tensors):
    batch = {"pixels": tensors["pixels"].movedim(-1, 1)}
    return batch | {"mask": tensors["mask"]} if "mask" in tensors else batch


def assert_matches(recorder, encoded, tensors):
    b = len(tensors["pixels"])
    seen = recorder.pixels[-b:]  # an inpainting encoder gives the clean images first
    expected = 2 * tensors["vae_pixels"].movedim(-1, 1) - 1
    np.testing.assert_allclose(seen.numpy(), expected.numpy(), rtol=0, atol=1e-6)
    assert ("noise_mask" in encoded) == ("noise_mask" in tensors)
    if "noise_mask" in tensors:
        expected = tensors["noise_mask"].expand(b, -1, -1, -1)
        np.testing.assert_array_equal(encoded["noise_mask"].numpy(), expected.numpy())


def test_there_are_eighteen_cases():
    assert len(CASES) == 18


@all_cases
def test_an_encoder_hands_its_vae_what_the_node_did(case, recorder, recording_vae):
    settings, tensors = load(case)
    encoded = encoder_for(settings, recording_vae)(channels_first(tensors))
    assert_matches(recorder, encoded, tensors)
    assert max(map(len, recorder.seen)) <= settings.get("per_batch", 2 * len(tensors["pixels"]))


@all_cases
def test_the_data_module_takes_the_nodes_own_layout(case, recorder, recording_vae):
    settings, tensors = load(case)
    b = len(tensors["pixels"])
    columns = {"pixels": tensors["pixels"]}
    if "mask" in tensors:
        columns["mask"] = tensors["mask"].expand(b, -1, -1)
    datamodule = LatentDataModule(Photos(columns, batch_size=b), encoder_for(settings, recording_vae), layout="HWC")
    [batch] = datamodule.predict_dataloader()
    encoded = datamodule.process(batch, "cpu")
    assert_matches(recorder, encoded, tensors)


@all_cases
def test_uint8_images_and_masks_are_the_floats_they_stand_for(case, recorder, recording_vae):
    settings, tensors = load(case)
    encoder = encoder_for(settings, recording_vae)
    bytes_ = {name: (value * 255).round().to(torch.uint8) for name, value in channels_first(tensors).items()}
    from_bytes = encoder(bytes_)
    seen = recorder.pixels
    recorder.seen.clear()
    from_floats = encoder({name: value / 255 for name, value in bytes_.items()})
    np.testing.assert_allclose(seen.numpy(), recorder.pixels.numpy(), rtol=0, atol=1e-6)
    if "noise_mask" in tensors:
        np.testing.assert_array_equal(from_bytes["noise_mask"].numpy(), from_floats["noise_mask"].numpy())
