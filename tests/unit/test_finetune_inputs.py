"""What the models are given in training is what the pipelines give them, captured by a hook on the pipeline's call."""

import pytest
import torch
from helpers import complains
from tiny_models import close
from tiny_pipelines import photographs, ready_batch, tiny_pipeline

from latentdm.finetune import FluxFill, StableDiffusion

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy

SIZES = [(1, 64, 96), (3, 64, 96), (2, 72, 72)]
MODULES = {
    "sd15_inpaint": "stable_diffusion.pipeline_stable_diffusion_inpaint",
    "sdxl_inpaint": "stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
    "flux_fill": "flux.pipeline_flux_fill",
}


class Stop(Exception):
    """The first call of the denoiser is all that is looked at."""


def captured(name, component, monkeypatch, noise, **call):
    """The arguments of the denoiser's first call inside a pipeline, which draws this noise."""
    pipeline = tiny_pipeline(name)
    seen = {}

    def hook(module, args, kwargs):
        seen.update(kwargs)
        if args:
            seen.update(zip(("sample", "timestep"), args, strict=False))
        raise Stop

    getattr(pipeline, component).register_forward_pre_hook(hook, with_kwargs=True)
    if name in MODULES:
        monkeypatch.setattr(f"diffusers.pipelines.{MODULES[name]}.randn_tensor", lambda *_, **__: noise)
    with pytest.raises(Stop), torch.no_grad():
        pipeline(num_inference_steps=10, **call)
    return seen


def inpainting(batch, pixels, masks):
    """The arguments of an inpainting pipeline's call, without guidance, from image and noise."""
    height, width = pixels.shape[-2:]
    call = {"prompt": batch["caption"], "image": pixels / 255, "mask_image": masks / 255}
    return call | {"height": height, "width": width, "strength": 0.6, "guidance_scale": 1.0}


@pytest.mark.parametrize(("count", "height", "width"), SIZES)
@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint"])
def test_an_inpainting_unet_gets_what_its_pipeline_gives_it(name, count, height, width, folders, monkeypatch):
    batch, _, _ = ready_batch(folders[name], count, height, width)
    pixels, masks = photographs(count, height, width)
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    sizes = {}
    if name == "sdxl_inpaint":  # the pipeline has one size for all
        batch |= {key: batch[key][:1].expand(count, 2) for key in ("original_size", "crop_top_left")}
        sizes = {"original_size": (300, 400), "crops_coords_top_left": (0, 5), "target_size": (height, width)}
    theirs = captured(
        name,
        "unet",
        monkeypatch,
        noise,
        **inpainting(batch, pixels, masks),
        **sizes,
    )
    model = StableDiffusion(str(folders[name]))
    times = theirs["timestep"].long().expand(count)
    assert 0 < times[0] < 900
    noisy = model.objective.mix(batch["latents"], noise, times)
    ours = model.network_input(batch, noisy, times)
    assert ours["sample"].shape == (count, 9, height // 8, width // 8)
    close(ours["sample"][:, :4], theirs["sample"][:, :4])
    close(ours["sample"][:, 4:], theirs["sample"][:, 4:])
    assert torch.equal(ours["sample"][:, 4], theirs["sample"][:, 4])
    assert 0 < ours["sample"][:, 4].mean() < 1
    close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    if name == "sdxl_inpaint":
        assert torch.equal(ours["added_cond_kwargs"]["time_ids"], theirs["added_cond_kwargs"]["time_ids"])
        close(ours["added_cond_kwargs"]["text_embeds"], theirs["added_cond_kwargs"]["text_embeds"])


@pytest.mark.parametrize(("count", "height", "width"), SIZES[:2])
def test_flux_fill_gets_what_its_pipeline_gives_it(count, height, width, folders, monkeypatch):
    batch, _, _ = ready_batch(folders["flux_fill"], count, height, width, latent_mask="unshuffle")
    pixels, masks = photographs(count, height, width)
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    theirs = captured(
        "flux_fill",
        "transformer",
        monkeypatch,
        noise,
        **inpainting(batch, pixels, masks),
    )
    model = FluxFill(str(folders["flux_fill"]))
    sigma = theirs["timestep"]
    assert 0.1 < sigma[0] < 0.9
    ours = model.network_input(batch, model.objective.mix(batch["latents"], noise, sigma), sigma)
    assert ours["hidden_states"].shape == (count, height * width // 256, 64 + 64 + 256)
    for part in (slice(64), slice(64, 128), slice(128, None)):
        close(ours["hidden_states"][..., part], theirs["hidden_states"][..., part])
    assert set(ours) == theirs.keys() - {"joint_attention_kwargs", "return_dict"}
    for key in ("timestep", "guidance", "img_ids", "txt_ids"):
        assert torch.equal(ours[key], theirs[key]), key
        assert ours[key].dtype == theirs[key].dtype
    close(ours["pooled_projections"], theirs["pooled_projections"])
    close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
def test_a_plain_unet_gets_what_its_pipeline_gives_it(name, folders, monkeypatch):
    batch, _, _ = ready_batch(folders[name], 2, 64, 96, inpaint=False)
    batch = {key: value for key, value in batch.items() if key not in ("original_size", "crop_top_left", "target_size")}
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    call = {"prompt": batch["caption"], "height": 64, "width": 96, "guidance_scale": 1.0, "latents": noise}
    theirs = captured(name, "unet", monkeypatch, noise, **call)
    ours = StableDiffusion(str(folders[name])).network_input(batch, theirs["sample"], theirs["timestep"])
    assert torch.equal(ours["sample"], theirs["sample"])
    close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    if name == "sdxl":  # without sizes in the batch: as for a picture that was never cut
        assert torch.equal(ours["added_cond_kwargs"]["time_ids"], theirs["added_cond_kwargs"]["time_ids"])
    else:
        assert "added_cond_kwargs" not in ours


def test_time_ids_are_each_pictures_own_rows_first(folders):
    batch, _, _ = ready_batch(folders["sdxl_inpaint"], 3, 64, 96)
    model = StableDiffusion(str(folders["sdxl_inpaint"]))
    ids = model.network_input(batch, batch["latents"], torch.zeros(3).long())["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[300, 400 + row, 3 * row, 5, 64, 96] for row in range(3)]


def test_flux_fill_refuses_sides_that_do_not_fold(folders):
    batch, _, _ = ready_batch(folders["flux_fill"], 2, 72, 72, latent_mask="unshuffle")
    model = FluxFill(str(folders["flux_fill"]))
    with complains("FluxFill", "9×9", "encoder.multiple=16"):
        model.network_input(batch, batch["latents"], torch.rand(2))
