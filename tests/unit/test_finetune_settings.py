"""Settings and pipelines that do not fit are told before anything is loaded; losses are what they say."""

import json
import shutil
import sys

import diffusers
import pytest
import torch
from helpers import complains
from safetensors.torch import load_file, save_file
from tiny_models import close
from tiny_pipelines import model_of, ready_batch

from latentdm.draws import Draws
from latentdm.finetune import FluxFill, Lora, StableDiffusion
from latentdm.finetune.flux_fill import pack, token_positions, unpack
from latentdm.finetune.objectives import Diffusion, FlowMatching
from latentdm.pipelines import PipelineSource

BETAS = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}


# ---------------------------------------------------------------- wrong use


def test_a_lora_says_what_is_wrong_with_it():
    assert Lora().rank is None
    with complains("Lora: rank must be an integer of at least 1, got 0", "null trains all weights"):
        Lora(rank=0)
    with complains("alpha must be a number above 0, got 0"):
        Lora(rank=4, alpha=0)
    with complains("alpha=8 without a rank", "model.lora.rank"):
        Lora(alpha=8)
    with complains("targets must be a list of names", "'to_q'"):
        Lora(rank=4, targets="to_q")


def test_a_target_that_no_layer_has_is_told(folders):
    model = model_of("sd15", folders["sd15"], lora={"rank": 2, "targets": ["to_q", "to_qq"]})
    with complains("StableDiffusion: lora.targets", "UNet2DConditionModel", "'to_qq'", "to_k", "conv_in"):
        model.configure_model()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"learning_rate": "fast"}, ["learning_rate must be a number", "'fast'"]),
        ({"warmup_steps": -1}, ["warmup_steps must be an integer of at least 0"]),
        ({"schedule": "step"}, ["schedule must be one of constant, cosine, linear"]),
        ({"optimizer": "sgd"}, ["optimizer must be one of adamw, adamw_8bit"]),
        ({"dtype": "half"}, ["dtype must be one of auto, float32"]),
        ({"masked_weight": -1}, ["masked_weight must be a number of at least 0"]),
        ({"sampling_steps": 0}, ["sampling_steps must be an integer of at least 1"]),
        ({"snr_gamma": 0}, ["snr_gamma must be a number above 0", "null is without"]),
        ({"widen": True, "lora": {"rank": 4}}, ["widen=true with lora.rank=4", "lora.rank: null"]),
    ],
)
def test_a_value_out_of_range_is_told(settings, parts, folders):
    with complains("StableDiffusion: ", *parts):
        model_of("sd15", folders["sd15"], **settings)


def test_flux_fill_checks_its_own_settings(folders):
    with complains("FluxFill: times must be one of uniform, logit_normal"):
        model_of("flux_fill", folders["flux_fill"], times="late")
    with complains("FluxFill: guidance must be a number of at least 0"):
        model_of("flux_fill", folders["flux_fill"], guidance=-1)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_a_missing_package_is_answered_with_the_extra(package, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with complains(f"needs the package {package!r}", "latentdm[finetune]", error=ImportError):
        model_of("sd15", folders["sd15"], lora={"rank": 4})


def test_the_8_bit_optimizer_names_its_package(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with complains("optimizer=adamw_8bit", "pip install bitsandbytes", error=ImportError):
        model_of("sd15", folders["sd15"], optimizer="adamw_8bit")


def test_the_8_bit_optimizer_is_bitsandbytes_own(folders, monkeypatch):
    from types import SimpleNamespace

    made = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=lambda weights, **settings: (len(weights), settings)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", made)
    model = model_of("sd15", folders["sd15"], optimizer="adamw_8bit", learning_rate=1e-3)
    model.network = torch.nn.Linear(3, 2)
    model.trainer = SimpleNamespace()
    count, settings = model.configure_optimizers()
    assert count == 2
    assert settings == {"lr": 1e-3, "weight_decay": 0.01}


@pytest.mark.parametrize("component", ["unet", "scheduler", "vae"])
def test_a_pipeline_that_lacks_a_component_is_told_before_anything_loads(component, folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "gone")
    shutil.rmtree(folder / component)
    with complains("StableDiffusion", str(folder), f"lacks {component}", "is not there"):
        StableDiffusion(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with complains("StableDiffusion", f"has no {component}", "its components are"):
        StableDiffusion(str(folder))


def test_a_variant_that_is_not_there_is_told_by_its_name(folders):
    pipeline = PipelineSource("StableDiffusion", folders["sd15"], variant="fp16")
    with complains("StableDiffusion: ", "unet' has", "no weights", "with variant='fp16'", "leave variant out"):
        pipeline.load(diffusers, "unet")


def test_a_denoiser_whose_weights_do_not_fit_is_refused(folders, tmp_path):
    """diffusers would fill what is missing at random, with no more than a line in its log."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "pipeline")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_out.bias": torch.zeros(3)}, file, metadata={"format": "pt"})
    with complains("StableDiffusion: ", "unet' do not fit UNet2DConditionModel: ", "conv_out.bias"):
        StableDiffusion(str(folder)).configure_model()
    del weights["conv_out.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with complains("StableDiffusion: ", "unet' do not fit UNet2DConditionModel: 1 missing keys", "'conv_out.bias'"):
        StableDiffusion(str(folder)).configure_model()


def test_no_pipeline_at_all_is_told(tmp_path):
    with complains("StableDiffusion: no pipeline at", "model_index.json"):
        StableDiffusion(str(tmp_path))
    with complains("FluxFill", "single file"):
        FluxFill("flux1-fill-dev.safetensors")


def test_the_model_of_another_family_is_told(folders, tmp_path):
    with complains("StableDiffusion", "has no unet", "transformer"):
        StableDiffusion(str(folders["flux_fill"]))
    with complains("FluxFill", "has no transformer", "unet"):
        FluxFill(str(folders["sd15"]))
    folder = shutil.copytree(folders["flux_fill"], tmp_path / "flux")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"in_channels": 64}))
    with complains("FluxFill", "takes 64 channels", "384", "FLUX.1-Fill-dev"):
        FluxFill(str(folder))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxTransformer2DModel", "SD3Transformer2DModel"))
    with complains("a SD3Transformer2DModel, not a FluxTransformer2DModel", "model=stable_diffusion"):
        FluxFill(str(folder))


def test_an_odd_unet_and_a_refiner_are_told(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "odd")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    with complains("takes 8 channels", "known are 4, and 9"):
        StableDiffusion(str(folder))
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text()) | {"requires_aesthetics_score": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    with complains("refiner", "aesthetic score"):
        StableDiffusion(str(folder))


def test_a_scheduler_of_another_kind_is_told():
    with complains("StableDiffusion", "FlowMatchEulerDiscreteScheduler", "epsilon, v_prediction, sample"):
        Diffusion(FLOW, None, "StableDiffusion")
    with complains("FluxFill", "DDIMScheduler"):
        FlowMatching(BETAS, "uniform", "FluxFill")


# ---------------------------------------------------------------- widening


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_a_widened_unet_computes_what_it_did(name, folders):
    batch, _, _ = ready_batch(folders[name.replace("sd15", "sd15_inpaint").replace("sdxl", "sdxl_inpaint")], 2, 64, 64)
    narrow, wide = model_of(name, folders[name]), model_of(name, folders[name], widen=True)
    times = torch.tensor([3, 900])
    for model in (narrow, wide):
        model.configure_model()
        model.network.eval()
    assert wide.network.config.in_channels == 9
    assert torch.equal(wide.network.conv_in.weight[:, :4], narrow.network.conv_in.weight)
    assert torch.equal(wide.network.conv_in.bias, narrow.network.conv_in.bias)
    assert not wide.network.conv_in.weight[:, 4:].any()
    assert not narrow.inpaints
    assert wide.inpaints
    close(wide.predict(batch, batch["latents"], times), narrow.predict(batch, batch["latents"], times))


# ---------------------------------------------------------------- what is learnt


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_scheduler_says(prediction):
    objective = Diffusion({**BETAS, "prediction_type": prediction}, None, "test")
    latents, noise, times = numbers(3, 4, 8, 8), numbers(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    keep = objective.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    close(objective.mix(latents, noise, times), keep.sqrt() * latents + (1 - keep).sqrt() * noise)
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": keep.sqrt() * noise - (1 - keep).sqrt() * latents,
    }
    close(objective.target(latents, noise, times), expected[prediction])


def test_each_timestep_is_met_equally_often():
    times = Diffusion(BETAS, None, "test").times(torch.tensor([0.0, 0.4999, 0.5, 1.0]), 256)
    assert times.tolist() == [0, 499, 500, 999]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_bounds_the_weight_of_a_clean_image(prediction):
    times = torch.tensor([0, 400, 999])
    weights = Diffusion({**BETAS, "prediction_type": prediction}, 5.0, "test").weights(times)
    keep = Diffusion(BETAS, None, "test").scheduler.alphas_cumprod[times]
    snr = keep / (1 - keep)
    assert snr[0] > 5 > snr[1]
    expected = torch.tensor([min(float(each), 5.0) for each in snr]) / (snr + (prediction == "v_prediction"))
    close(weights, expected)
    assert torch.equal(Diffusion(BETAS, None, "test").weights(times), torch.ones(3))


def test_min_snr_is_finite_where_there_is_no_signal():
    zero = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    weights = Diffusion(zero, 5.0, "test").weights(torch.tensor([0, 999]))
    assert torch.isfinite(weights).all()


def test_flow_matching_draws_a_straight_line():
    objective = FlowMatching(FLOW, "uniform", "test")
    latents, noise = numbers(2, 16, 4, 4), numbers(2, 16, 4, 4, seed=1)
    sigma = torch.tensor([0.25, 1.0])
    mixed = objective.mix(latents, noise, sigma)
    close(mixed[0], 0.75 * latents[0] + 0.25 * noise[0])
    close(mixed[1], noise[1])
    close(objective.target(latents, noise, sigma), noise - latents)


def test_larger_images_get_more_noise_as_in_sampling():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

    uniform = torch.tensor([0.2, 0.5, 0.8])
    objective = FlowMatching(FLOW, "uniform", "test")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        shifted = scheduler.time_shift(calculate_shift(tokens), 1.0, uniform)
        close(objective.times(uniform, tokens), shifted)
    fixed = FlowMatching({**FLOW, "use_dynamic_shifting": False, "shift": 3.0}, "uniform", "test")
    close(fixed.times(uniform, 4096), 3 * uniform / (1 + 2 * uniform))
    middle = FlowMatching({**FLOW, "use_dynamic_shifting": False}, "logit_normal", "test")
    drawn = middle.times(torch.linspace(0.001, 0.999, 999), 4096)
    assert drawn.median() == pytest.approx(0.5, abs=1e-3)
    assert ((drawn > 0.25) & (drawn < 0.75)).float().mean() == pytest.approx(0.728, abs=0.01)
    assert drawn.min() > 0
    assert drawn.max() < 1


class Guess:
    """A model that is off by a known error in the mask and another outside of it."""

    def __init__(self, model, inside, outside):
        self.model, self.inside, self.outside = model, inside, outside

    def __call__(self, batch, noisy, times):
        mask = batch["latent_mask"].mean(dim=1, keepdim=True)
        return self.target + self.inside * mask + self.outside * (1 - mask)


def test_the_weight_of_the_masked_part(folders, monkeypatch):
    batch, _, _ = ready_batch(folders["sd15_inpaint"], 2, 64, 64)
    draws = Draws(0, 0, ["a", "b"])
    share = batch["latent_mask"].mean().item()
    for weight in (1.0, 3.0, 0.0):
        model = model_of("sd15_inpaint", folders["sd15_inpaint"], masked_weight=weight)
        guess = Guess(model, inside=2.0, outside=1.0)
        monkeypatch.setattr(model, "predict", guess)
        guess.target = draws.normal("noise", batch["latents"].shape[1:], torch.device("cpu"))
        losses = model.losses(batch, draws)
        expected = (4 * weight * share + (1 - share)) / (weight * share + (1 - share))
        assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
        assert losses["loss_in_mask"].item() == pytest.approx(4, rel=1e-5)


def test_noise_and_times_are_each_samples_own(folders):
    batch, _, _ = ready_batch(folders["sd15"], 2, 64, 64, inpaint=False)
    model, seen = model_of("sd15", folders["sd15"]), []

    def keep(batch, noisy, times):
        seen.append((noisy, times))
        return noisy

    model.predict = keep
    for ids in (["a", "b"], ["b", "c"]):
        model.losses(batch | {"latents": torch.zeros(2, 4, 8, 8)}, Draws(0, 0, ids))
    (first, times), (second, again) = seen
    assert times[1] == again[0]
    assert times[0] != times[1]
    assert torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1])


def test_packing_is_the_pipelines(folders):
    from diffusers import FluxFillPipeline

    latents = numbers(2, 16, 6, 8)
    packed = pack(latents)
    assert torch.equal(packed, FluxFillPipeline._pack_latents(latents, 2, 16, 6, 8))
    assert torch.equal(unpack(packed, 6, 8), latents)
    assert token_positions(2, 3).tolist() == [[0, row, column] for row in range(2) for column in range(3)]
