"""The fine-tunes in a real trainer: the loss falls where it should, samples are the pipeline's, runs resume."""

import pytest
import torch
from helpers import complains, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tiny_models import close
from tiny_pipelines import model_of, photographs, ready, tiny_pipeline

from latentdm.finetune import SaveForDiffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy

ALL = ("sd15_inpaint", "sdxl_inpaint", "flux_fill")
MODULES = {
    "sd15_inpaint": "stable_diffusion.pipeline_stable_diffusion_inpaint",
    "sdxl_inpaint": "stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
    "flux_fill": "flux.pipeline_flux_fill",
}


@pytest.fixture(scope="module")
def data(folders):
    made = {}
    for name in (*ALL, "sd15", "sdxl"):
        kind = {"latent_mask": "unshuffle"} if name == "flux_fill" else {"inpaint": "inpaint" in name}
        made[name] = ready(folders[name], height=64, width=64, **kind)
    return made


class Metrics(Callback):
    """Every training step's metrics."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def column(self, name):
        return [row[name] for row in self.seen]


@pytest.mark.parametrize("name", ALL)
def test_samples_are_those_of_the_pipelines_own_call(name, folders, data, monkeypatch):
    noise = torch.randn(data[name].batch["latents"].shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(f"diffusers.pipelines.{MODULES[name]}.randn_tensor", lambda *_, **__: noise)
    model = model_of(name, folders[name], sampling_steps=3, guidance_scale=4.0)
    [ours] = quiet_trainer(limit_predict_batches=1).predict(model, datamodule=data[name])
    pixels, masks = photographs(3, 64, 64)
    theirs = tiny_pipeline(name)(
        prompt=data[name].batch["caption"],
        image=pixels / 255,
        mask_image=masks / 255,
        height=64,
        width=64,
        strength=1.0,
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="pt",
    ).images
    assert ours.shape == (3, 3, 64, 64)
    assert ours.dtype == torch.float32
    assert 0 <= ours.min() < ours.max() <= 1
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_plain_model_samples_from_the_prompt_alone(name, folders, data):
    model = model_of(name, folders[name], sampling_steps=2)
    first, again = (quiet_trainer(limit_predict_batches=1).predict(model, data[name])[0] for _ in range(2))
    assert first.shape == (3, 3, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_guidance_asks_the_data_modules_text_encoder_for_no_prompt(folders, data):
    name = "sd15_inpaint"
    guided, plain = (model_of(name, folders[name], sampling_steps=2, guidance_scale=scale) for scale in (7.5, 1.0))
    pictures = [quiet_trainer(limit_predict_batches=1).predict(model, data[name])[0] for model in (guided, plain)]
    assert not torch.equal(*pictures)
    data[name].text, text = None, data[name].text
    try:
        [unguided] = quiet_trainer(limit_predict_batches=1).predict(guided, data[name])
    finally:
        data[name].text = text
    assert torch.equal(unguided, pictures[1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning")
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_resumed_run_goes_on_as_it_would_have(lora, folders, data, tmp_path):
    name = "sd15_inpaint"
    settings = {"learning_rate": 1e-3, "lora": lora, "warmup_steps": 2}
    whole, halves = Metrics(), Metrics()
    quiet_trainer(max_steps=4, callbacks=[whole]).fit(model_of(name, folders[name], **settings), data[name])
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    first = quiet_trainer(max_steps=2, callbacks=[halves, checkpoint], enable_checkpointing=True)
    first.fit(model_of(name, folders[name], **settings), data[name])
    second = quiet_trainer(max_steps=4, callbacks=[halves, checkpoint], enable_checkpointing=True)
    second.fit(model_of(name, folders[name], **settings), data[name], ckpt_path=checkpoint.last_model_path)
    assert halves.column("train/loss") == pytest.approx(whole.column("train/loss"), rel=1e-6)
    assert len(set(whole.column("train/loss"))) == 4  # each step has noise of its own


def test_a_loras_checkpoint_holds_the_adapter_alone(folders, data, tmp_path):
    name = "sd15_inpaint"
    model = model_of(name, folders[name], lora={"rank": 2})
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(model, data[name])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    other = model_of(name, folders[name], lora={"rank": 2, "targets": ["to_q", "conv_in"]})
    with complains("the checkpoint lacks", "conv_in", "LoRA settings"):
        quiet_trainer(max_steps=2).fit(other, data[name], ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_the_last_save_holds_lightnings_averages(lora, folders, data, tmp_path):
    from safetensors.torch import load_file

    name = "sd15_inpaint"
    model = model_of(name, folders[name], learning_rate=1e-2, lora=lora)
    last = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            last.update({key: weight.detach().clone() for key, weight in pl_module.network.named_parameters()})

    save = SaveForDiffusers(dirpath=tmp_path)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=2)
    callbacks = [save, Keep(), EMAWeightAveraging(decay=0.5), checkpoint]
    trainer = quiet_trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(model, datamodule=data[name])
    trained = {key: weight for key, weight in model.network.named_parameters() if weight.requires_grad}
    assert all(not torch.equal(weight, last[key]) for key, weight in trained.items() if weight.abs().max() > 0)
    [file] = save.latest.glob("unet/*.safetensors") if lora is None else save.latest.glob("*.safetensors")
    saved = load_file(file)
    key = "conv_in.weight" if lora is None else next(key for key in saved if key.endswith("lora_B.weight"))
    own = key if lora is None else key.removeprefix("unet.").replace(".weight", ".default.weight")
    assert torch.equal(saved[key], trained[own])

    callbacks = [EMAWeightAveraging(decay=0.5), checkpoint]
    resumed = quiet_trainer(max_steps=5, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    again = model_of(name, folders[name], learning_rate=1e-2, lora=lora)
    resumed.fit(again, datamodule=data[name], ckpt_path=checkpoint.last_model_path)
    assert resumed.global_step == 5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_lora_trains_on_frozen_weights_in_half_the_bits(name, precision, folders, data):
    model = model_of(name, folders[name], lora={"rank": 2}, gradient_checkpointing=True, sampling_steps=1)
    trainer = quiet_trainer(max_steps=2, precision=precision, limit_predict_batches=1)
    converted = trainer.precision_plugin.convert_input(data[name].batch)
    original, data[name].batch = data[name].batch, converted
    try:
        trainer.fit(model, datamodule=data[name])
        [sampled] = trainer.predict(model, datamodule=data[name])
    finally:
        data[name].batch = original
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert frozen == {torch.bfloat16}
    assert trained == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}
    assert all(".lora_" in key for key, weight in model.named_parameters() if weight.requires_grad)
    assert sampled.shape == (3, 3, 64, 64)
    assert torch.isfinite(sampled).all()


def test_gradient_checkpointing_changes_no_loss(folders, data):
    name, losses = "sdxl_inpaint", []
    for checkpointing in (False, True):
        metrics = Metrics()
        model = model_of(name, folders[name], gradient_checkpointing=checkpointing)
        quiet_trainer(max_steps=2, callbacks=[metrics]).fit(model, datamodule=data[name])
        assert model.network.is_gradient_checkpointing == checkpointing
        losses.append(metrics.column("train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_learning_rate_warms_up_and_falls(folders, data):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    name = "sd15_inpaint"
    for schedule in ("constant", "linear"):
        model = model_of(name, folders[name], learning_rate=1.0, warmup_steps=2, schedule=schedule)
        quiet_trainer(max_steps=4, callbacks=[Rates()]).fit(model, datamodule=data[name])
    assert rates == pytest.approx([0, 0.5, 1, 1, 0, 0.5, 1, 0.5])


# ---------------------------------------------------------------- wrong use, before the denoiser is loaded


def refuses(name, folder, datamodule, *parts, **settings):
    model = model_of(name, folder, **settings)
    with complains(*parts):
        quiet_trainer(max_steps=1).fit(model, datamodule=datamodule)
    assert model.network is None


def test_a_narrow_unet_with_an_inpainting_encoder_is_told_to_widen(folders, data):
    refuses("sd15", folders["sd15"], data["sd15_inpaint"], "takes 4 channels", "(9)", "widen: true", "encoder=plain")


def test_an_inpainting_unet_with_a_plain_encoder_is_told_which_to_use(folders, data):
    refuses("sd15_inpaint", folders["sd15_inpaint"], data["sd15"], "encoder=inpaint", "grow_mask_by=0")
    refuses("sd15", folders["sd15"], data["sd15"], "encoder=inpaint", widen=True)


def test_the_vae_of_another_family_is_told(folders, data):
    parts = ("latents of 16 channels", "takes 4", f"vae.source={folders['sd15_inpaint']}")
    refuses("sd15_inpaint", folders["sd15_inpaint"], data["flux_fill"], *parts)
    refuses("flux_fill", folders["flux_fill"], data["sd15_inpaint"], "latents of 4 channels", "takes 16")


def test_masks_in_the_wrong_layout_are_told(folders):
    unshuffled = ready(folders["sd15_inpaint"], latent_mask="unshuffle")
    refuses("sd15_inpaint", folders["sd15_inpaint"], unshuffled, "64 channels", "encoder.latent_mask=nearest")
    nearest = ready(folders["flux_fill"])
    refuses("flux_fill", folders["flux_fill"], nearest, "latent_mask (1)", "encoder.latent_mask=unshuffle")


def test_batches_without_text_or_with_that_of_another_model_are_told(folders, data):
    def fit(name, datamodule):
        quiet_trainer(max_steps=1).fit(model_of(name, folders[name]), datamodule=datamodule)

    source = data["sdxl_inpaint"]
    silent = {key: value for key, value in source.batch.items() if key != "prompt_embeds"}
    unpooled = {key: value for key, value in source.batch.items() if key != "pooled_prompt_embeds"}
    with complains("StableDiffusion: the batch has no 'prompt_embeds'", "text=pipeline"):
        fit("sdxl_inpaint", type(source)(silent, source.encoder, source.text))
    with complains("no 'pooled_prompt_embeds'", "text=pipeline"):
        fit("sdxl_inpaint", type(source)(unpooled, source.encoder, source.text))
    mixed = {**data["sd15_inpaint"].batch, "prompt_embeds": source.batch["prompt_embeds"]}
    with complains("prompt_embeds have 40 channels", "reads 16", f"text.source={folders['sd15_inpaint']}"):
        fit("sd15_inpaint", type(source)(mixed, data["sd15_inpaint"].encoder, source.text))


def test_the_vae_of_a_family_with_another_scale_is_told(folders, data):
    parts = ("scaling_factor is 0.13025", "0.18215", f"vae.source={folders['sd15_inpaint']}")
    refuses("sd15_inpaint", folders["sd15_inpaint"], data["sdxl_inpaint"], *parts)


def test_sampling_without_a_latent_data_module_is_told(folders, data):
    model = model_of("sd15", folders["sd15"])
    trainer = quiet_trainer(limit_predict_batches=1)
    with complains("predict_step decodes with the autoencoder of a latentdm.LatentDataModule"):
        trainer.predict(model, dataloaders=data["sd15"].predict_dataloader())
