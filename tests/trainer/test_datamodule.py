"""LatentDataModule through a real Trainer: every stage and precision, other people's data, what a model sees."""

import itertools
import warnings

import pytest
import torch
from helpers import (
    LatentModel,
    Photos,
    RecordingAutoencoder,
    Samples,
    complains,
    fit,
    images,
    noise_vae,
    photo_columns,
    predict,
    quiet_trainer,
    tiny_kl,
)
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.tensors import crop

RESULTS = {"latents", "masked_latents", "noise_mask", "latent_mask"}


@pytest.fixture
def inpaint(vae):
    return LatentDataModule(Photos(photo_columns(mask=True)), InpaintEncoder(vae, posterior="mode"))


@pytest.fixture
def plain(vae):
    return LatentDataModule(Photos(photo_columns()), PlainEncoder(vae, posterior="mode"))


class Stages(Callback):
    """Notes the keys of every batch that a step of a stage begins with; the sanity check by itself."""

    def __init__(self):
        self.keys = {}

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.keys.setdefault("train", set(batch))

    def on_validation_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0):
        self.keys.setdefault("sanity" if trainer.sanity_checking else "val", set(batch))

    def on_test_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0):
        self.keys.setdefault("test", set(batch))

    def on_predict_batch_start(self, trainer, model, batch, batch_idx, dataloader_idx=0):
        self.keys.setdefault("predict", set(batch))


# -------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("run", "stages"),
    [("fit", {"sanity", "train", "val"}), ("validate", {"val"}), ("test", {"test"}), ("predict", {"predict"})],
)
def test_every_stage_receives_latents(run, stages, inpaint):
    noted = Stages()
    getattr(quiet_trainer(callbacks=[noted]), run)(LatentModel(), datamodule=inpaint)
    assert noted.keys == dict.fromkeys(stages, RESULTS | {"index"})


def test_the_latents_are_those_of_the_images(inpaint, vae):
    (first, second) = predict(inpaint)
    expected = vae.encode(photo_columns()["pixels"] / 255, posterior="mode")
    torch.testing.assert_close(torch.cat([first["latents"], second["latents"]]), expected, rtol=0, atol=1e-5)


def test_training_never_meets_an_inference_tensor(inpaint):
    model = LatentModel()
    quiet_trainer().validate(model, datamodule=inpaint)
    fit(inpaint, model, max_epochs=2)  # its validation runs in inference mode, and training goes on after it
    quiet_trainer().validate(model, datamodule=inpaint)
    fit(inpaint, model)
    tensors = [value for batch in model.batches("train") for value in batch.values()]
    assert len(tensors) == 3 * 2 * 5
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)


def test_several_loaders_are_all_encoded(vae):
    class Two(Photos):
        def val_dataloader(self):
            return [self.train_dataloader(), self.train_dataloader()]

    class Model(LatentModel):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    model = Model()
    quiet_trainer().validate(model, datamodule=LatentDataModule(Two(photo_columns(index=False)), PlainEncoder(vae)))
    latents = model.column("val")
    assert latents.shape == (8, 4, 4, 4)
    assert not torch.equal(*latents.chunk(2))  # the same images, but draws of their own


# -------------------------------------------------------------------- other people's data modules


class CaptionedPhotos(LightningDataModule):
    """As a user writes it: float images, captions, tuples, no index, no thought of latents."""

    def setup(self, stage):
        self.data = [(image / 255, f"a photo, number {number}") for number, image in enumerate(images(5))]

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=2)


class CaptionModel(LatentModel):
    def __init__(self):
        super().__init__(key=0)


KEYS = {"pixels": 0, "latents": 0}


def test_a_foreign_data_module_needs_no_change(vae):
    model = fit(LatentDataModule(CaptionedPhotos(), PlainEncoder(vae), keys=KEYS), CaptionModel())
    for stage in ("train", "val"):
        for latents, captions in model.batches(stage):
            assert latents.shape == (len(captions), 4, 4, 4)
            assert all(caption.startswith("a photo") for caption in captions)
    captions = [caption for _, captions in model.batches("val") for caption in captions]
    assert captions == [f"a photo, number {number}" for number in range(5)]


class FloatPhotos(LightningDataModule):
    """Float images whose bits a half precision would lose."""

    def __init__(self, count=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = [{"pixels": image} for image in torch.rand(count, 3, 16, 16, generator=generator)]

    def predict_dataloader(self):
        return DataLoader(self.images, batch_size=3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_what_a_precision_takes_from_float_images_is_said_once_and_is_little(precision):
    pixels, recorder = FloatPhotos(6), RecordingAutoencoder()
    datamodule = LatentDataModule(pixels, PlainEncoder(FrozenVAE(recorder)))
    with pytest.warns(UserWarning, match=rf"pixels came as .*: precision={precision} rounds.*yield uint8") as caught:
        predict(datamodule, precision=precision)
    assert len([warning for warning in caught if "LatentDataModule" in str(warning.message)]) == 1
    assert "\n" not in str(caught[0].message)
    whole = torch.stack([image["pixels"] for image in pixels.images])
    lost = (recorder.pixels - (whole * 2 - 1)).abs().max() / 2
    assert 0 < lost <= 0.5 / 255


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_precisions_take_nothing_from_float_images(precision):
    pixels, recorder = FloatPhotos(), RecordingAutoencoder()
    predict(LatentDataModule(pixels, PlainEncoder(FrozenVAE(recorder))), precision=precision)
    assert torch.equal(recorder.pixels, torch.stack([image["pixels"] for image in pixels.images]) * 2 - 1)


def test_every_8_bit_level_survives_half_precision():
    levels = torch.arange(256) / 255
    assert torch.equal((levels.bfloat16().float() * 255).round().long(), torch.arange(256))


# -------------------------------------------------------------------- precision

PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_receives_what_its_precision_wants(precision, vae):
    columns = photo_columns(mask=True, weight=torch.arange(4) / 3, count_=torch.arange(4))
    datamodule = LatentDataModule(Photos(columns), InpaintEncoder(vae), keep_pixels=True)
    model = fit(datamodule, precision=precision)
    for stage in ("train", "val"):
        for batch in model.batches(stage):
            floats = {name: batch[name].dtype for name in RESULTS | {"weight"}}
            assert floats == dict.fromkeys(RESULTS | {"weight"}, PRECISIONS[precision])
            assert batch["count_"].dtype == batch["index"].dtype == torch.int64
            assert batch["pixels"].dtype == torch.uint8


def test_16_mixed_on_the_cpu_is_bf16_mixed(plain):
    with pytest.warns(UserWarning, match="Using `precision=.bf16-mixed"):
        model = fit(plain, precision="16-mixed")
    assert {batch["latents"].dtype for batch in model.batches("train")} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_precision_of_the_trainer_does_not_change_the_latents(precision, vae):
    def latents(precision):
        datamodule = LatentDataModule(Photos(photo_columns()), PlainEncoder(vae))
        return fit(datamodule, precision=precision).column("train")

    expected = latents("32-true").to(PRECISIONS[precision])
    assert torch.equal(latents(precision), expected)
    assert vae.dtype == torch.float32


class DtypeOfConvolutions(RecordingAutoencoder):
    """Notes the dtype in which a convolution really computes, which autocast may change behind a module's back."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)

    def encode(self, x):
        self.dtypes = {*getattr(self, "dtypes", ()), self.convolution(x).dtype}
        return super().encode(x)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "autocast"])
def test_autocast_does_not_reach_the_vae(enabled):
    autoencoder = DtypeOfConvolutions()
    encoder = PlainEncoder(FrozenVAE(autoencoder))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        encoder({"pixels": images(2)})
    assert autoencoder.dtypes == {torch.float32}


# -------------------------------------------------------------------- delegation


class Noting(Photos):
    """Notes what is called on it, and changes batches in hooks of its own."""

    class_names = ("cat", "dog")

    def __init__(self, calls, columns=None):
        super().__init__(columns or photo_columns())
        self.calls = calls
        self.position = 0
        self.save_hyperparameters({"photos": "yes"})

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        assert self.trainer is not None
        self.calls.append("setup " + stage)

    def teardown(self, stage):
        self.calls.append("teardown " + stage)

    def on_exception(self, exception):
        self.calls.append(f"on_exception {exception}")

    def state_dict(self):
        return {"position": 5}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "hooks": ["before"]}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        batch = {**batch, "hooks": [*batch["hooks"], f"transfer {device}"]}
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "hooks": [*batch["hooks"], "after"], "pixels": batch["pixels"].flip(-1)}


def test_the_wrapped_module_is_prepared_set_up_and_torn_down(vae):
    calls = []
    fit(LatentDataModule(Noting(calls), PlainEncoder(vae)))
    assert calls == ["prepare_data", "setup fit", "teardown fit"]


def test_the_wrapped_module_s_own_hooks_run_before_the_encoder(vae):
    (first, _) = predict(LatentDataModule(Noting([]), PlainEncoder(vae, posterior="mode")))
    assert first["hooks"] == ["before", "transfer cpu", "after"]
    expected = vae.encode(images(4)[:2].flip(-1) / 255, posterior="mode")
    torch.testing.assert_close(first["latents"], expected, rtol=0, atol=1e-5)


def test_the_wrapped_module_s_last_hook_may_make_the_pixels(vae):
    class Decoding(Photos):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"pixels": batch["code"][:, None, None, None].expand(-1, 3, 16, 16).to(torch.uint8)}

    datamodule = LatentDataModule(Decoding({"code": torch.arange(4)}), PlainEncoder(vae))
    assert set(predict(datamodule)[0]) == {"latents"}


def test_the_wrapped_module_hears_of_an_exception(vae):
    class Broken(LatentModel):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    calls = []
    with pytest.raises(RuntimeError, match="broken"):
        fit(LatentDataModule(Noting(calls), PlainEncoder(vae)), Broken())
    assert "on_exception broken" in calls


def test_state_and_hyperparameters_are_the_wrapped_module_s(vae, tmp_path):
    trainer = quiet_trainer(logger=CSVLogger(tmp_path))
    trainer.fit(LatentModel(), datamodule=LatentDataModule(Noting([]), PlainEncoder(vae)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert checkpoint["LatentDataModule"] == {"position": 5}
    assert checkpoint["datamodule_hyper_parameters"] == {"photos": "yes"}
    assert "photos: 'yes'" in next(tmp_path.rglob("hparams.yaml")).read_text()

    restored = LatentDataModule(Noting([]), PlainEncoder(vae))
    fit(restored, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert restored.pixels.position == 5


def test_attributes_are_the_wrapped_module_s(vae):
    datamodule = LatentDataModule(Noting([]), PlainEncoder(vae))
    assert datamodule.class_names == ("cat", "dog")
    assert datamodule.position == 0
    with complains("neither LatentDataModule nor its Noting has the attribute 'clas_names'", error=AttributeError):
        datamodule.clas_names  # noqa: B018


def test_both_know_the_trainer(plain):
    trainer = quiet_trainer()
    trainer.fit(LatentModel(), datamodule=plain)
    assert plain.trainer is trainer
    assert plain.pixels.trainer is trainer


class TrainingOnly(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Samples(photo_columns()), batch_size=2)


def test_a_data_module_without_validation_is_one_still(vae):
    with pytest.warns(UserWarning, match="have no `val_dataloader`. Skipping val loop"):
        model = fit(LatentDataModule(TrainingOnly(), PlainEncoder(vae)))
    assert model.batches("train")
    assert not model.batches("val")


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_a_missing_loader_is_answered_as_without_the_wrapper(run, vae):
    answers = []
    for datamodule in (TrainingOnly(), LatentDataModule(TrainingOnly(), PlainEncoder(vae))):
        with pytest.raises(MisconfigurationException) as caught:
            getattr(quiet_trainer(), run)(LatentModel(), datamodule=datamodule)
        answers.append(str(caught.value))
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Lightning asks for it
def test_loaders_given_to_from_datasets_are_found(vae):
    photos = LightningDataModule.from_datasets(Samples(photo_columns()), batch_size=2)
    with pytest.warns(UserWarning, match="Skipping val loop"):
        assert fit(LatentDataModule(photos, PlainEncoder(vae))).column("train").shape == (4, 4, 4, 4)


# -------------------------------------------------------------------- keys, layout and pixels, through a trainer


def test_keys_reach_the_model(vae):
    columns = photo_columns()
    columns["image"] = columns.pop("pixels")
    datamodule = LatentDataModule(Photos(columns), PlainEncoder(vae), keys={"pixels": "image", "latents": "samples"})
    assert set(fit(datamodule, LatentModel("samples")).batches("train")[0]) == {"samples", "index"}


def test_channels_last_and_kept_pixels_reach_the_model(vae):
    columns = {"pixels": images(4, 20, 24).movedim(1, -1)}
    datamodule = LatentDataModule(Photos(columns), PlainEncoder(vae), layout="HWC", keep_pixels=True)
    batch = fit(datamodule).batches("train")[0]
    assert batch["latents"].shape == (2, 4, 2, 3)
    assert torch.equal(batch["pixels"], crop(images(4, 20, 24), 8)[:2])


# -------------------------------------------------------------------- the example input


@pytest.mark.parametrize("pack", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_the_example_input_passes_unchanged(pack, vae):
    example = torch.ones(1, 4, 4, 4)

    class Model(LatentModel):
        def __init__(self):
            super().__init__()
            self.example_input_array = pack(example)
            self.given = []

        def forward(self, x):
            self.given.append(x)
            return x

    model = fit(LatentDataModule(Noting([]), PlainEncoder(vae)), Model(), enable_model_summary=True)
    assert len(model.given) == 1
    assert torch.equal(model.given[0], example)
    assert model.batches("train")[0]["latents"].shape == (2, 4, 4, 4)


# -------------------------------------------------------------------- models that would train on pixels

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_model_that_overrides_a_hook_is_refused(hook, plain):
    class Model(LatentModel):
        pass

    setattr(Model, hook, lambda self, batch, *args: batch)
    with complains(f"LatentDataModule: Model overrides {hook}", "move that code into the pixel data module"):
        fit(plain, Model())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")  # Lightning's, before ours
@pytest.mark.parametrize(
    ("run", "step"),
    [("fit", "training_step"), ("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step")],
)
def test_a_model_that_fetches_batches_itself_is_refused(run, step, plain):
    class Model(LatentModel):
        pass

    setattr(Model, step, lambda self, dataloader_iter: next(dataloader_iter))
    with complains(f"LatentDataModule: Model.{step} takes dataloader_iter", f"{step}(self, batch, batch_idx)"):
        getattr(quiet_trainer(), run)(Model(), datamodule=plain)


def test_a_wrong_kind_of_argument_is_named(vae):
    with complains("LatentDataModule: pixels must be a LightningDataModule, got list", error=TypeError):
        LatentDataModule([], PlainEncoder(vae))
    with complains("LatentDataModule: encoder must be an Encoder, got FrozenVAE", error=TypeError):
        LatentDataModule(Photos(photo_columns()), vae)


# -------------------------------------------------------------------- the VAE's life


def test_a_factory_is_called_once_in_setup(inpaint):
    calls = []

    def factory():
        calls.append("vae")
        return noise_vae()

    pixels = Noting(calls)
    encoder = PlainEncoder(factory)
    datamodule = LatentDataModule(pixels, encoder)
    assert calls == []
    model = LatentModel()
    fit(datamodule, model)
    quiet_trainer().validate(model, datamodule=datamodule)
    assert calls.count("vae") == 1
    assert calls[:3] == ["prepare_data", "setup fit", "vae"]


def test_the_vae_moves_to_the_trainer_s_device_and_leaves_it_afterwards(vae):
    moves = []

    class Moving(PlainEncoder):
        def setup(self, device):
            moves.append(device)
            super().setup(device)

    trainer = quiet_trainer()
    trainer.fit(LatentModel(), datamodule=LatentDataModule(Photos(photo_columns()), Moving(vae)))
    assert moves == [trainer.strategy.root_device, "cpu"]


def checkpoint_of(datamodule, folder, model=None):
    trainer = quiet_trainer()
    trainer.fit(model or LatentModel(), datamodule=datamodule)
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", weights_only=True)


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_in, tree.values() if isinstance(tree, dict) else tree))


def test_a_checkpoint_holds_no_tensor_of_the_vae(inpaint, tmp_path):
    checkpoint = checkpoint_of(inpaint, tmp_path)
    assert [tuple(tensor.shape) for tensor in tensors_in(checkpoint)] == [()]  # the model's one parameter
    assert set(checkpoint["state_dict"]) == {"scale"}


def test_a_model_that_holds_the_vae_neither_trains_nor_saves_it(inpaint, tmp_path, vae):
    class Model(LatentModel):
        def __init__(self):
            super().__init__()
            self.vae = vae  # to decode previews

    checkpoint = checkpoint_of(inpaint, tmp_path, Model())
    assert set(checkpoint["state_dict"]) == {"scale"}


# -------------------------------------------------------------------- what only a GPU shows

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: pinned copies, waits and device placement"
)


@needs_gpu
def test_a_uint8_batch_waits_for_the_device_once():
    """The one wait is FrozenVAE's look for latents that are not finite, after its last chunk."""
    columns = photo_columns(mask=True)
    encoder = InpaintEncoder(FrozenVAE(tiny_kl(), dtype="bfloat16"), per_batch=3)
    encoder.setup("cuda")
    datamodule = LatentDataModule(Photos(columns), encoder)
    batch = {name: value.pin_memory() for name, value in columns.items()}
    for mode in ("default", "warn"):  # the first pass warms up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            try:
                out = datamodule.on_before_batch_transfer(batch, 0)
                out = datamodule.transfer_batch_to_device(out, torch.device("cuda"), 0)
                out = datamodule.on_after_batch_transfer(out, 0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert out["latents"].device.type == "cuda"
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) <= 1  # for an event torch waits silently


@needs_gpu
def test_latents_and_vae_are_on_the_device():
    vae = FrozenVAE(tiny_kl(), dtype="float32")

    class Model(LatentModel):
        def on_train_batch_start(self, batch, batch_idx):
            assert vae.device.type == "cuda"

    model = fit(LatentDataModule(Photos(photo_columns(mask=True)), InpaintEncoder(vae)), Model(), accelerator="gpu")
    assert {batch[name].device.type for batch in model.batches("train") for name in RESULTS} == {"cuda"}
    assert vae.device.type == "cpu"


def test_a_tuner_sets_what_it_found(vae, tmp_path):
    from lightning.pytorch.tuner import Tuner

    class Sized(Photos):
        batch_size, seed = 2, 7

        def train_dataloader(self):
            sizes.append(self.batch_size)
            return DataLoader(self.dataset, batch_size=self.batch_size)

    sizes, pixels = [], Sized(photo_columns(16))
    datamodule = LatentDataModule(pixels, PlainEncoder(vae))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = Tuner(quiet_trainer(default_root_dir=tmp_path))  # it saves the model while it tries
        tuner.scale_batch_size(LatentModel(), datamodule=datamodule, max_trials=2, steps_per_trial=1)
    assert {2, 4} <= set(sizes)
    assert pixels.batch_size == datamodule.batch_size == max(sizes)
    assert "batch_size" not in vars(datamodule)
    datamodule.seed = 3  # each has its own
    assert pixels.seed == 7
    assert LatentDataModule(pixels, PlainEncoder(vae), seed=5).seed == 5
