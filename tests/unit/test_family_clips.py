"""Clips through the video autoencoders."""

import pytest
import torch
from helpers import Photos, complains
from pipelines import decoded_by_pipeline, qwen_image, wan
from tiny_models import CONFIGS, build, close, frozen, pictures, signed

from latentdm import InpaintEncoder, LatentDataModule, PlainEncoder


@pytest.mark.parametrize("name", ["qwen_image", "wan", "wan22"])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_clips_give_one_latent_frame_and_one_more_for_every_four(name, frames):
    clip = pictures(1, frames=frames)
    theirs = wan if name.startswith("wan") else qwen_image
    vae = frozen(name)
    encoded = vae.encode(clip, posterior="mode")
    assert encoded.shape == (
        1,
        vae.latent_channels,
        1 + (frames - 1) // 4,
        32 // vae.spatial_compression,
        48 // vae.spatial_compression,
    )
    assert encoded.shape[1:] == vae.latent_shape(clip.shape[2:])
    close(encoded, theirs(build(name), signed(clip)))
    decoded = vae.decode(encoded)
    assert decoded.shape == clip.shape
    close(decoded, decoded_by_pipeline(name, build(name), encoded))


@pytest.mark.parametrize("name", ["qwen_image", "wan"])
def test_an_image_is_a_clip_of_one_frame(name):
    vae, image = frozen(name), pictures()
    close(vae.encode(image, posterior="mode").unsqueeze(2), vae.encode(image.unsqueeze(2), posterior="mode"))


def test_a_clip_is_encoded_from_uint8_by_the_encoder():
    vae = frozen("wan")
    clip = torch.randint(0, 256, (2, 4, 5, 35, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"pixels": clip, "index": torch.arange(2), "caption": ["a", "b"]}
    encoded = PlainEncoder(vae, posterior="mode", per_batch=1)(batch)
    assert encoded["caption"] == ["a", "b"]
    cropped = clip[:, :3, :, 1:33, 1:49].float() / 255  # (35 − 32) // 2 from above, (50 − 48) // 2 from the left
    close(encoded["latents"], vae.encode(cropped, posterior="mode"))
    gray = PlainEncoder(vae, posterior="mode")({"pixels": clip[:, :1]})["latents"]
    close(gray, vae.encode(cropped[:, :1].expand(-1, 3, -1, -1, -1), posterior="mode"))
    noisy = PlainEncoder(vae)(batch)["latents"]
    assert noisy.shape == (2, 4, 2, 4, 6)
    assert not torch.equal(noisy, encoded["latents"])


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_clips_pass_the_data_module(layout):
    vae = frozen("wan")
    clips = torch.randint(0, 256, (2, 3, 5, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = PlainEncoder(vae, posterior="mode")({"pixels": clips})["latents"]
    columns = {"pixels": clips if layout == "CHW" else clips.movedim(1, -1), "index": torch.arange(2)}
    datamodule = LatentDataModule(Photos(columns), PlainEncoder(vae, posterior="mode"), layout=layout, keep_pixels=True)
    [batch] = datamodule.predict_dataloader()
    batch = datamodule.process(batch, "cpu")
    close(batch["latents"], expected)
    assert torch.equal(batch["pixels"], clips)


def test_frames_that_would_be_dropped_are_an_error():
    with complains("FrozenVAE.encode", "7 frames", "AutoencoderKLWan", "1 + 4·n", "such as 5"):
        frozen("wan").encode(pictures(1, frames=7))
    with complains("PlainEncoder", "4 frames", "such as 1"):
        PlainEncoder(frozen("qwen_image"))({"pixels": pictures(1, frames=4)})


@pytest.mark.parametrize("name", ["kl", "qwen_image21"])
def test_clips_need_a_video_family(name):
    with complains("encodes images, not clips of 5 frames", CONFIGS[name]["_class_name"]):
        frozen(name).encode(pictures(1, frames=5))


def test_clips_cannot_be_inpainted():
    with complains("InpaintEncoder", "clips", "encoder=plain"):
        InpaintEncoder(frozen("wan"))({"pixels": pictures(1, frames=5), "mask": torch.ones(1, 1, 32, 48)})
