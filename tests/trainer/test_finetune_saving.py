"""What is saved loads in diffusers and computes what was trained: whole pipelines, LoRAs, kohya's names."""

import errno
import json
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers import complains, quiet_trainer
from safetensors.torch import load_file
from tiny_pipelines import model_of, photographs, ready, tiny_pipeline

from latentdm.finetune import SaveForDiffusers
from latentdm.finetune.sharding import shard

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy

INPAINT = {
    "sd15_inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sdxl_inpaint": diffusers.StableDiffusionXLInpaintPipeline,
    "flux_fill": diffusers.FluxFillPipeline,
}
WIDENED = {"sd15": diffusers.StableDiffusionInpaintPipeline, "sdxl": diffusers.StableDiffusionXLInpaintPipeline}
LORA = {"rank": 2, "alpha": 5}
TARGETS = {
    "sd15_inpaint": ["to_q", "to_v", "conv_in", "ff.net.2"],
    "sdxl_inpaint": ["to_q", "to_v", "conv_in", "conv_out"],
    "flux_fill": ["to_q", "to_out.0", "x_embedder", "proj_out", "ff.net.0.proj"],
}


@pytest.fixture(scope="module")
def data(folders):
    """Pipeline → its data module."""
    mask = {"flux_fill": {"latent_mask": "unshuffle"}}
    return {name: ready(folders[name], height=64, width=64, **mask.get(name, {})) for name in (*INPAINT, *WIDENED)}


def train(name, folder, datamodule, dirpath, steps=3, callback=None, **settings):
    """A fine-tune of a few steps, and the callback that saved it."""
    model = model_of(name, folder, **({"learning_rate": 1e-2} | settings))
    save = callback or SaveForDiffusers(dirpath=dirpath)
    quiet_trainer(max_steps=steps, max_epochs=-1, callbacks=[save]).fit(model, datamodule=datamodule)
    return model, save


def denoiser(pipeline):
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def inpaint(pipeline):
    """The picture of a pipeline's own call."""
    pixels, masks = photographs(1, 64, 64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a photo of the cat",
        image=pixels / 255,
        mask_image=masks / 255,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@torch.no_grad()
def output(network, model, batch):
    """What a denoiser gives for one input."""
    latents = batch["latents"]
    times = torch.full((len(latents),), 0.5 if model.component == "transformer" else 500)
    if model.component == "unet":
        times = times.long()
    return network.eval()(**model.network_input(batch, latents, times), return_dict=False)[0]


def same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", INPAINT)
def test_a_full_fine_tune_is_a_pipeline_that_inpaints(name, folders, data, tmp_path):
    model, save = train(name, folders[name], data[name], tmp_path)
    assert save.latest == tmp_path / "pipeline"
    pipeline = INPAINT[name].from_pretrained(save.latest)
    assert same_weights(denoiser(pipeline), model.network)
    assert not same_weights(denoiser(pipeline), denoiser(tiny_pipeline(name)))
    assert same_weights(pipeline.vae, tiny_pipeline(name).vae)
    assert inpaint(pipeline).shape == (1, 3, 64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert type(diffusers.DiffusionPipeline.from_pretrained(save.latest)) is INPAINT[name]


@pytest.mark.parametrize("name", WIDENED)
def test_a_widened_model_is_saved_as_an_inpainting_pipeline(name, folders, data, tmp_path):
    model, save = train(name, folders[name], data[name], tmp_path, widen=True)
    assert json.loads((save.latest / "unet" / "config.json").read_text())["in_channels"] == 9
    pipeline = diffusers.DiffusionPipeline.from_pretrained(save.latest)
    assert type(pipeline) is WIDENED[name]
    assert same_weights(pipeline.unet, model.network)
    assert pipeline.unet.conv_in.weight[:, 4:].any()  # the new channels learn
    assert inpaint(pipeline).shape == (1, 3, 64, 64)
    model_of(name, save.latest)  # and can be trained on, without being widened again
    assert not model_of(name, save.latest, widen=True).widen


@pytest.mark.parametrize("name", INPAINT)
def test_a_lora_loads_without_a_difference(name, folders, data, tmp_path):
    lora = {**LORA, "targets": TARGETS[name]}
    model, save = train(name, folders[name], data[name], tmp_path, lora=lora)
    assert save.latest == tmp_path / "lora"
    trained = output(model.network, model, data[name].batch)
    pipeline = INPAINT[name].from_pretrained(folders[name])
    before = output(denoiser(pipeline), model, data[name].batch)
    pipeline.load_lora_weights(save.latest)
    after = output(denoiser(pipeline), model, data[name].batch)
    assert (after - trained).abs().max() == 0.0
    assert (after - before).abs().max() > 1e-3
    assert inpaint(pipeline).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint"])
def test_a_lora_in_kohyas_names_loads_without_a_difference(name, folders, data, tmp_path):
    save = SaveForDiffusers(dirpath=tmp_path, kohya=True)
    lora = {**LORA, "targets": TARGETS[name]}
    model, _ = train(name, folders[name], data[name], tmp_path, callback=save, lora=lora)
    file = save.latest / "lora_kohya.safetensors"
    weights = load_file(file)
    assert all(key.startswith("lora_unet_") for key in weights)
    assert {value.item() for key, value in weights.items() if key.endswith(".alpha")} == {5.0}
    assert "lora_unet_conv_in.lora_down.weight" in weights
    pipeline = INPAINT[name].from_pretrained(folders[name])
    pipeline.load_lora_weights(file)
    ours, theirs = (output(each, model, data[name].batch) for each in (model.network, pipeline.unet))
    assert (ours - theirs).abs().max() == 0.0


def test_a_lora_of_flux_is_not_written_in_kohyas_names(folders, data, tmp_path):
    save = SaveForDiffusers(dirpath=tmp_path, kohya=True)
    with complains("SaveForDiffusers: kohya=true", "FLUX", "kohya: false"):
        train("flux_fill", folders["flux_fill"], data["flux_fill"], tmp_path, callback=save, lora=LORA)
    with complains("kohya=true without a LoRA", "model.lora.rank"):
        train("sd15_inpaint", folders["sd15_inpaint"], data["sd15_inpaint"], tmp_path, callback=save)


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("sd15_inpaint", "model.diffusion_model.input_blocks.0.0.weight", "inpainting"),
        ("flux_fill", "img_in.weight", "flux-fill"),
    ],
)
def test_diffusers_tells_a_single_file_of_it_by_its_width(name, key, kind, folders, data, tmp_path):
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    _, save = train(name, folders[name], data[name], tmp_path, steps=1)
    component = "transformer" if name == "flux_fill" else "unet"
    weights = load_file(save.latest / component / "diffusion_pytorch_model.safetensors")
    first = weights["x_embedder.weight" if name == "flux_fill" else "conv_in.weight"]
    # FLUX with guidance is told by two more keys, of which the presence alone counts
    flux = {"double_blocks.0.img_attn.norm.key_norm.scale": first, "guidance_in.in_layer.bias": first}
    assert infer_diffusers_model_type({key: first} | (flux if name == "flux_fill" else {})) == kind


# ---------------------------------------------------------------- when and how it is written


class Saves(SaveForDiffusers):
    """Notes the steps at which it saves."""

    steps = ()

    def save(self, trainer, pl_module):
        self.steps = (*self.steps, trainer.global_step)
        super().save(trainer, pl_module)


@pytest.mark.parametrize(("every", "steps"), [(None, (5,)), (2, (2, 4, 5)), (5, (5,))])
def test_it_saves_every_few_steps_and_at_the_end(every, steps, folders, data, tmp_path):
    save = Saves(every_n_steps=every, dirpath=tmp_path)
    name = "sd15_inpaint"
    model, _ = train(name, folders[name], data[name], tmp_path, steps=5, callback=save)
    assert save.steps == steps
    assert same_weights(INPAINT[name].from_pretrained(save.latest).unet, model.network)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_accumulated_batches_save_once_a_step(folders, data, tmp_path):
    save = Saves(every_n_steps=1, dirpath=tmp_path)
    model = model_of("sd15_inpaint", folders["sd15_inpaint"])
    trainer = quiet_trainer(max_steps=2, accumulate_grad_batches=2, callbacks=[save])
    trainer.fit(model, datamodule=data["sd15_inpaint"])
    assert save.steps == (1, 2)


def test_a_full_disk_warns_and_training_goes_on(folders, data, tmp_path, monkeypatch):
    name, save = "sd15_inpaint", Saves(every_n_steps=1, dirpath=tmp_path)
    model = model_of(name, folders[name], learning_rate=1e-2)
    model.configure_model()
    write = model.network.save_pretrained

    def full_from_the_second_on(folder):
        write(folder)
        if len(save.steps) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.network, "save_pretrained", full_from_the_second_on)
    trainer = quiet_trainer(max_steps=3, callbacks=[save])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, datamodule=data[name])
    told = [str(warning.message) for warning in caught if "SaveForDiffusers" in str(warning.message)]
    assert len(told) == 2
    assert "step 2 was not saved" in told[0]
    assert "No space left on device; training goes on" in told[0]
    assert trainer.global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert INPAINT[name].from_pretrained(tmp_path / "pipeline").unet is not None


def test_other_ranks_write_nothing(folders, tmp_path):
    save = SaveForDiffusers(dirpath=tmp_path)
    model = model_of("sd15_inpaint", folders["sd15_inpaint"])
    model.configure_model()
    save.save(SimpleNamespace(is_global_zero=False, global_step=1, default_root_dir=tmp_path), model)
    assert not list(tmp_path.iterdir())
    assert save.latest is None


def test_what_was_saved_before_the_run_is_replaced_whole(folders, data, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "leftover.txt").write_text("of another run")
    _, save = train("sd15_inpaint", folders["sd15_inpaint"], data["sd15_inpaint"], tmp_path, steps=1)
    assert not (save.latest / "leftover.txt").exists()
    assert save.latest.stat().st_mode & 0o055 == 0o055 & ~_umask()


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_variant_is_saved_under_plain_names(tmp_path, data):
    name = "sd15_inpaint"
    pipeline = tiny_pipeline(name)
    pipeline.save_pretrained(tmp_path / "source", variant="fp16")
    (tmp_path / "source" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"another variant")
    model, save = train(name, tmp_path / "source", data[name], tmp_path / "run", steps=1, variant="fp16")
    assert not list(save.latest.rglob("*fp16*"))
    loaded = INPAINT[name].from_pretrained(save.latest)
    assert same_weights(loaded.vae, pipeline.vae)
    assert same_weights(loaded.unet, model.network)


def test_it_is_for_the_models_of_this_package(tmp_path, data):
    from helpers import LatentModel

    trainer = quiet_trainer(callbacks=[SaveForDiffusers(dirpath=tmp_path)])
    with complains("SaveForDiffusers: LatentModel", "remove the callback"):
        trainer.fit(LatentModel(), datamodule=data["sd15"])
    with complains("every_n_steps must be an integer of at least 1, got 0"):
        SaveForDiffusers(every_n_steps=0)


def test_weights_that_are_split_in_another_way_are_refused(folders, tmp_path):
    from lightning.pytorch.strategies import FSDPStrategy

    model = model_of("sd15_inpaint", folders["sd15_inpaint"])
    with complains("FSDPStrategy", "trainer=fsdp2"):
        SaveForDiffusers(dirpath=tmp_path).setup(SimpleNamespace(strategy=FSDPStrategy()), model, "fit")


def test_what_cannot_be_split_is_refused(folders):
    model = model_of("sd15_inpaint", folders["sd15_inpaint"])
    model.configure_model()
    groups = {"data_parallel": SimpleNamespace(size=lambda: 1), "tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with complains("StableDiffusion: tensor_parallel_size=2", "data_parallel_size"):
        shard(model.network, groups, "StableDiffusion")
    model.network.conv_in.half()
    with complains("torch.float16 and torch.float32", "model.dtype=float32"):
        shard(model.network, groups | {"tensor_parallel": SimpleNamespace(size=lambda: 1)}, "StableDiffusion")
