"""The callbacks, each through a real `Trainer.fit`: what they write, log and warn of; training stays as it was."""

import csv
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import (
    LatentModel,
    NoiseAutoencoder,
    Photos,
    Travelling,
    complains,
    images,
    photo_columns,
    quiet_trainer,
    tiny_kl,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image

import latentdm.demo_vae
from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.callbacks import EncodeCallback, EncodeMonitor, LatentPreview, LatentStats, PerBatchFinder, VAEOffload
from latentdm.callbacks.base import LogSteps
from latentdm.callbacks.per_batch_finder import fastest
from latentdm.data import SamplesData
from latentdm.masks import MaskSource, RandomMask

ALL = (EncodeMonitor, LatentStats, LatentPreview, PerBatchFinder)


@pytest.fixture(scope="module")
def demo():
    """The demo VAE in float32."""
    return FrozenVAE.from_pretrained(latentdm.demo_vae.__path__[0], dtype="float32")


def photographs(vae, masks=None, **settings):
    """Crops of real photographs, inpainted."""
    pixels = SamplesData(size=64, batch_size=4, epoch_length=80, val_length=4)
    return LatentDataModule(pixels, InpaintEncoder(vae), masks=masks or RandomMask(), **settings)


def plain(vae, columns, batch_size=2, **settings):
    as_tuple = settings.pop("as_tuple", False)
    return LatentDataModule(Photos(columns, batch_size, as_tuple), PlainEncoder(vae), **settings)


def inpainting(vae, count=8, **settings):
    return LatentDataModule(Photos(photo_columns(count, mask=True)), InpaintEncoder(vae), **settings)


def fit(datamodule, *callbacks, model=None, **settings):
    """Fit some steps and return the trainer."""
    settings = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 2} | settings
    trainer = quiet_trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model or LatentModel(), datamodule=datamodule)
    return trainer


def logged(folder):
    """Rows of a CSVLogger."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def csv_logger(folder):
    return CSVLogger(folder, name="", version="")


# -------------------------------------------------------------------- every callback


@pytest.mark.parametrize("callback", [*ALL, VAEOffload])
def test_without_latents_to_watch_setup_says_so(callback):
    with complains(callback.__name__, "needs a LatentDataModule", "got Photos"):
        fit(Photos(photo_columns()), callback())


def test_training_is_the_same_to_the_bit_with_all_callbacks(vae, tmp_path):
    def losses(callbacks):
        model = LatentModel()
        torch.manual_seed(1)
        trainer = fit(
            inpainting(vae), *callbacks, model=model, max_steps=6, limit_val_batches=2, default_root_dir=tmp_path
        )
        latents = torch.cat([batch["latents"] for batch in model.batches("train") + model.batches("val")])
        return trainer.global_step, model.scale.detach(), latents, torch.rand(1)

    observers = [EncodeMonitor(), LatentStats(std_range=(0, 99)), LatentPreview(every_n_steps=2)]
    without, with_all = losses([]), losses(observers)
    assert without[0] == with_all[0] == 6
    for one, other in zip(without[1:], with_all[1:], strict=True):
        assert torch.equal(one, other)


def test_hooks_see_what_goes_in_and_what_comes_out(vae):
    class Watcher(EncodeCallback):
        def __init__(self):
            self.seen = []

        def on_encode_start(self, trainer, pl_module, inputs):
            self.seen.append(("start", sorted(inputs)))

        def on_encode_end(self, trainer, pl_module, inputs, outputs, batch):
            self.seen.append(("end", sorted(inputs), sorted(outputs), sorted(map(str, batch))))

    watcher = Watcher()
    keys = {"pixels": "image", "latents": "samples"}
    columns = photo_columns(2) | {"image": images(2), "caption": ["a", "b"]}
    del columns["pixels"]
    fit(plain(vae, columns, keys=keys), watcher, model=LatentModel("samples"), max_steps=1)
    assert watcher.seen == [
        ("start", ["caption", "index", "pixels"]),
        ("end", ["caption", "index", "pixels"], ["latents"], ["caption", "index", "samples"]),
    ]


def test_a_step_of_several_batches_is_logged_once():
    trainer, steps = SimpleNamespace(log_every_n_steps=2, global_step=0), LogSteps()

    def reached(step):
        trainer.global_step = step
        return steps.reached(trainer)

    assert [reached(step) for step in (0, 0, 1, 1, 2, 2, 3, 4)] == [False] * 4 + [True, False, False, True]
    trainer.log_every_n_steps = 0  # nothing is logged, but alarms shall ring
    assert [reached(step) for step in (48, 49, 50, 50)] == [False, False, True, False]


# -------------------------------------------------------------------- LatentPreview


class Wandb(Logger):
    """Takes images as Lightning's WandbLogger does."""

    name = version = "fake"

    def __init__(self):
        super().__init__()
        self.images = []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None):
        self.images.append((key, [image.size for image in images], step))


def drawn_steps(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("*.png"))


def test_preview_is_drawn_at_the_start_and_every_few_steps(vae, tmp_path):
    fit(inpainting(vae), LatentPreview(every_n_steps=3, dirpath=tmp_path), max_steps=8, limit_val_batches=1)
    assert drawn_steps(tmp_path) == [0, 3, 6]


def test_preview_counts_optimizer_steps(vae, tmp_path):
    preview, wandb = LatentPreview(every_n_steps=2, dirpath=tmp_path), Wandb()
    fit(inpainting(vae), preview, max_steps=4, accumulate_grad_batches=3, logger=wandb)
    assert drawn_steps(tmp_path) == [0, 2]
    assert [step for _, _, step in wandb.images] == [0, 2]


def test_a_second_fit_is_drawn_from_its_start(vae, tmp_path):
    preview = LatentPreview(every_n_steps=99, dirpath=tmp_path)
    fit(inpainting(vae), preview, max_steps=1)
    (tmp_path / "step_000000.png").unlink()
    fit(inpainting(vae), preview, max_steps=1)
    assert drawn_steps(tmp_path) == [0]


def test_preview_goes_to_the_log_folder_and_to_every_logger_that_takes_images(vae, tmp_path):
    wandb, tensorboard = Wandb(), TensorBoardLogger(tmp_path, name="tb", version="")
    loggers = [tensorboard, wandb, csv_logger(tmp_path / "csv")]
    fit(inpainting(vae), LatentPreview(every_n_steps=2, samples=1), max_steps=4, logger=loggers)
    folder = tmp_path / "tb" / "previews"
    assert drawn_steps(folder) == [0, 2]
    with Image.open(folder / "step_000002.png") as picture:
        assert wandb.images == [("preview", [picture.size], 0), ("preview", [picture.size], 2)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.width, event.height) for event in events.Images("preview")] == [
        (0, *picture.size),
        (2, *picture.size),
    ]


def test_preview_without_a_logger_lies_in_the_root_folder(vae, tmp_path):
    fit(inpainting(vae), LatentPreview(), max_steps=1, default_root_dir=tmp_path)
    assert drawn_steps(tmp_path / "previews") == [0]


def test_captions_of_tuple_batches_are_titles(vae, tmp_path):
    columns = {"pixels": images(2), "caption": ["one", "two"]}
    for name, caption in (("a", 1), ("b", None)):
        datamodule = plain(vae, columns, as_tuple=True, keys={"pixels": 0, "latents": 0})
        fit(datamodule, LatentPreview(caption=caption, dirpath=tmp_path / name), model=LatentModel(0), max_steps=1)
    one, other = ((tmp_path / name / "step_000000.png").read_bytes() for name in "ab")
    assert one != other


def test_where_decoding_does_not_fit_the_picture_is_skipped_and_training_goes_on(vae, tmp_path, monkeypatch):
    def decode(latents):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(vae, "decode", decode)
    with pytest.warns(UserWarning, match="LatentPreview: no memory to decode a sample at step 0"):
        trainer = fit(inpainting(vae), LatentPreview(dirpath=tmp_path), max_steps=2)
    assert trainer.global_step == 2
    assert drawn_steps(tmp_path) == []


@pytest.mark.parametrize("setting", ["every_n_steps", "samples"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_preview_settings_are_checked(setting, value):
    with complains("LatentPreview", setting, str(value)):
        LatentPreview(**{setting: value})


# -------------------------------------------------------------------- EncodeMonitor

METRICS = {
    "encode/images_per_s",
    "encode/batch_ms",
    "encode/step_ms",
    "encode/share_of_step_pct",
    "encode/chunks_per_batch",
    "encode/reencoded_samples",
    "encode/oom_retries",
}


def test_costs_are_logged_at_log_steps_with_units(vae, tmp_path):
    datamodule = inpainting(vae)
    datamodule.encoder.per_batch = 3
    try:
        fit(datamodule, EncodeMonitor(), max_steps=7, logger=csv_logger(tmp_path))
    finally:
        datamodule.encoder.per_batch = None
    rows = [row for row in logged(tmp_path) if row["encode/batch_ms"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]  # Lightning counts from 0
    assert set(rows[0]) == METRICS | {"step", "epoch"}
    for row in rows:
        seconds = float(row["encode/batch_ms"]) / 1000
        assert float(row["encode/images_per_s"]) == pytest.approx(2 / seconds, rel=1e-3)
        whole = float(row["encode/batch_ms"]) + float(row["encode/step_ms"])
        share = 100 * float(row["encode/batch_ms"]) / whole
        assert float(row["encode/share_of_step_pct"]) == pytest.approx(share, rel=1e-3)
        assert float(row["encode/chunks_per_batch"]) == 2  # two images, each clean and masked, three at a time


class Clockwork(NoiseAutoencoder):
    """Takes 2 seconds of a clock that does nothing else for a pass."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def encode(self, x):
        self.clock.now += 2
        return super().encode(x)


def test_encoding_and_steps_are_counted_and_neither_loading_nor_validation_nor_other_callbacks(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("latentdm.callbacks.encode_monitor.perf_counter", lambda: clock.now)

    class Stepping(LatentModel):
        def training_step(self, batch, batch_idx):
            clock.now += 3
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.now += 100

    class Loading(Photos):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            clock.now += 1000
            return batch

    class Drawing(Callback):
        def on_encode_end(self, *observed):
            clock.now += 10_000

    monitor = EncodeMonitor()
    encoder = PlainEncoder(FrozenVAE(Clockwork(clock)), per_batch=1)
    datamodule = LatentDataModule(Loading(photo_columns(8)), encoder)
    fit(datamodule, monitor, Drawing(), max_steps=4, model=Stepping(), limit_val_batches=2, val_check_interval=2)
    assert monitor.totals.batches == 3  # all but the first, which warms up
    assert monitor.totals.images == monitor.totals.chunks == 6
    assert monitor.totals.encode_s == 3 * 2 * 2
    assert monitor.totals.step_s == 3 * 3
    assert monitor.totals.share_of_step_pct == pytest.approx(100 * 4 / 7)


def test_samples_encoded_again_in_float32_are_counted(tmp_path):
    class Overflowing(torch.nn.Module):
        spatial_compression, latent_channels = 8, 3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def encode(self, x):
            latents = torch.nn.functional.avg_pool2d(x, 8) * self.weight
            return SimpleNamespace(latents=latents * (torch.inf if x.dtype == torch.bfloat16 else 1))

    datamodule = plain(FrozenVAE(Overflowing(), dtype="bfloat16"), photo_columns(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(datamodule, EncodeMonitor(), max_steps=2, logger=csv_logger(tmp_path))
    assert logged(tmp_path)[0]["encode/reencoded_samples"] == "4.0"


# -------------------------------------------------------------------- LatentStats


def test_real_latents_and_masks_are_logged_without_a_warning(demo, tmp_path):
    # Warnings are errors here, as in all tests.
    fit(photographs(demo), LatentStats(), max_steps=20, log_every_n_steps=10, logger=csv_logger(tmp_path))
    first, second = logged(tmp_path)
    assert 0.7 < float(first["latents/std"]) < 1.3
    assert abs(float(first["latents/mean"])) < 0.5
    assert 5 < float(first["masks/share_pct"]) < 60
    assert first["latents/std"] != second["latents/std"]
    assert {f"latents/channel_0{channel}_{what}" for channel in range(4) for what in ("mean", "std")} < set(first)


def test_figures_are_those_of_the_batches(vae, tmp_path):
    model = LatentModel()
    stats = LatentStats(std_range=(0, 99), per_channel=True)
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 1}  # which do not count
    logger = csv_logger(tmp_path)
    fit(inpainting(vae, 6), stats, model=model, max_steps=3, log_every_n_steps=3, logger=logger, **settings)
    [row] = logged(tmp_path)
    latents, noise = (model.column("train", key) for key in ("latents", "noise_mask"))
    std = latents.std(dim=(0, 2, 3), correction=0)
    assert float(row["latents/mean"]) == pytest.approx(float(latents.mean()), abs=1e-5)
    assert float(row["latents/channel_02_std"]) == pytest.approx(float(std[2]), rel=1e-4)
    assert float(row["latents/channel_01_mean"]) == pytest.approx(float(latents[:, 1].mean()), abs=1e-5)
    assert float(row["latents/std"]) == pytest.approx(float(std.square().mean().sqrt()), rel=1e-4)
    assert float(row["masks/share_pct"]) == pytest.approx(100 * float(noise.mean()), rel=1e-4)


def test_figures_start_anew_after_a_log_step(vae, tmp_path):
    model, stats = LatentModel(), LatentStats(std_range=(0, 99))
    fit(inpainting(vae, 32), stats, model=model, max_steps=16, log_every_n_steps=8, logger=csv_logger(tmp_path))
    means = [float(row["latents/mean"]) for row in logged(tmp_path)]
    first, second = model.column("train").chunk(2)
    assert means == [pytest.approx(float(half.mean()), abs=1e-6) for half in (first, second)]
    assert abs(means[0] - means[1]) > 1e-5


def test_channels_can_be_left_out(vae, tmp_path):
    stats = LatentStats(std_range=(0, 99), per_channel=False)
    fit(plain(vae, photo_columns(4)), stats, max_steps=2, logger=csv_logger(tmp_path))
    assert set(logged(tmp_path)[0]) == {"step", "epoch", "latents/mean", "latents/std"}


def warned(datamodule, **settings):
    """What `LatentStats` warns of in 10 steps, with the trainer's own default of 50 steps from log to log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(datamodule, LatentStats(), max_steps=10, log_every_n_steps=50, **settings)
    return [str(warning.message) for warning in caught if str(warning.message).startswith("LatentStats")]


def test_a_forgotten_scaling_factor_is_noticed_within_ten_batches():
    autoencoder = AutoencoderKL.from_pretrained(latentdm.demo_vae.__path__[0])
    autoencoder.register_to_config(scaling_factor=1.0)
    [said] = warned(photographs(FrozenVAE(autoencoder, dtype="float32")))
    assert "far above 1" in said
    assert "scaling_factor" in said


def test_a_scaling_factor_applied_twice_is_noticed():
    autoencoder = AutoencoderKL.from_pretrained(latentdm.demo_vae.__path__[0])
    autoencoder.register_to_config(scaling_factor=autoencoder.config.scaling_factor**2)
    [said] = warned(photographs(FrozenVAE(autoencoder, dtype="float32")))
    assert "far below 1" in said


class Constant(MaskSource):
    def __init__(self, value):
        self.value = value

    def masks(self, batch, draws):
        b, _, height, width = batch["pixels"].shape
        return torch.full((b, 1, height, width), self.value)


@pytest.mark.parametrize(("value", "words"), [(1.0, "cover more than 95%"), (0.0, "cover less than 0.1%")])
def test_full_and_empty_masks_are_noticed(demo, value, words):
    [said] = warned(photographs(demo, masks=Constant(value)))
    assert words in said
    assert "white = repaint" in said


def test_by_default_nothing_is_wrong(demo):
    assert warned(photographs(demo)) == []


def test_repeated_samples_are_noticed(demo):
    photos = SamplesData(size=64, batch_size=2, epoch_length=8)
    photos.setup("fit")
    rows = [photos.train_set[0, 0]["pixels"]] * 40
    same = {"pixels": torch.stack(rows), "index": torch.zeros(40, dtype=torch.int64)}
    [said] = warned(plain(demo, same))
    assert "there before in the same epoch" in said
    own_index = same | {"index": torch.arange(40)}  # the same image, its noise drawn anew
    assert warned(plain(demo, own_index)) == []


def test_a_small_data_set_seen_every_epoch_is_no_repeat(demo):
    photos = SamplesData(size=64, batch_size=2, epoch_length=8)
    photos.setup("fit")
    columns = {"pixels": torch.stack([photos.train_set[i, 0]["pixels"] for i in range(4)])}
    datamodule = plain(demo, columns | {"index": torch.arange(4)})
    datamodule.encoder.posterior = "mode"
    assert warned(datamodule) == []


def test_each_warning_is_given_once(demo):
    datamodule = photographs(demo, masks=Constant(1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(datamodule, LatentStats(), max_steps=30, log_every_n_steps=10)
    assert sum("LatentStats" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("bounds", [(2, 1), (1,), 0.5, (-1, 2)])
def test_ranges_are_checked(bounds):
    for name in ("std_range", "mask_range"):
        with complains("LatentStats", name):
            LatentStats(**{name: bounds})


# -------------------------------------------------------------------- PerBatchFinder


class Fake(FrozenVAE):
    """Takes so many milliseconds for a pass and an image; more than ``fits`` images run out of memory."""

    full = torch.OutOfMemoryError("full")

    def __init__(self, autoencoder, clock, costs, fits=99):
        super().__init__(autoencoder, dtype="float32")
        self.clock, self.costs, self.fits, self.passes = clock, costs, fits, []

    def posterior(self, pixels):
        self.passes.append(tuple(pixels.shape))
        if len(pixels) > self.fits:
            raise self.full
        self.clock.now += self.costs[len(pixels)] * len(pixels)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("latentdm.callbacks.per_batch_finder.perf_counter", lambda: clock.now)
    return clock


COSTS = {1: 1.0, 2: 0.9, 4: 0.5, 8: 0.505, 10: 0.6}


def found(vae, finder, batch_size=5, **settings):
    datamodule = LatentDataModule(Photos(photo_columns(10, mask=True), batch_size), InpaintEncoder(vae))
    fit(datamodule, finder, max_steps=2, **settings)
    return datamodule.encoder.per_batch


def test_the_fastest_is_set_and_the_table_logged(clock, caplog):
    vae, finder = Fake(tiny_kl(), clock, COSTS), PerBatchFinder()
    with caplog.at_level(logging.INFO):
        assert found(vae, finder) == 4
    assert {shape[0] for shape in vae.passes} == {1, 2, 4, 8, 10}  # 5 images, clean and masked
    assert {shape[1:] for shape in vae.passes} == {(3, 32, 32)}
    assert list(finder.table) == [1, 2, 4, 8, 10]
    table = next(record.message for record in caplog.records if "PerBatchFinder" in record.message)
    assert "images of 32×32 in float32 on cpu" in table
    assert any("per_batch    4:    500.0 ms an image" in line and "taken" in line for line in table.splitlines())
    # Interleaved: each round takes its turn through all that are still in the race.
    assert [shape[0] for shape in vae.passes[:10]] == [1, 2, 4, 8, 10] * 2
    assert 1 not in [shape[0] for shape in vae.passes[10:]]


def test_the_first_round_only_warms_up(clock):
    class Warming(Fake):
        def posterior(self, pixels):
            self.clock.now += 0 if any(shape[0] == len(pixels) for shape in self.passes) else 100
            super().posterior(pixels)

    finder = PerBatchFinder(rounds=1)
    found(Warming(tiny_kl(), clock, COSTS), finder)
    assert finder.table == pytest.approx(COSTS)


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_runs_out_of_memory_is_left_out(clock, monkeypatch, full):
    monkeypatch.setattr(Fake, "full", full)
    vae = Fake(tiny_kl(), clock, COSTS | {4: 2.0}, fits=4)
    finder = PerBatchFinder()
    assert found(vae, finder) == 2
    assert list(finder.table) == [1, 2, 4]
    assert [shape[0] for shape in vae.passes].count(8) == 1
    assert 10 not in [shape[0] for shape in vae.passes]


def test_other_errors_are_not_swallowed(clock, vae):
    class Broken(Fake):
        def posterior(self, pixels):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        found(Broken(tiny_kl(), clock, COSTS), PerBatchFinder())


def test_where_nothing_fits_the_error_says_what_to_do(clock):
    with complains("PerBatchFinder", "not even 1 of 32×32", "smaller images"):
        found(Fake(tiny_kl(), clock, COSTS, fits=0), PerBatchFinder())


def test_candidates_are_those_that_were_asked_for(clock):
    vae = Fake(tiny_kl(), clock, COSTS)
    assert found(vae, PerBatchFinder(candidates=[8, 2])) == 8
    assert {shape[0] for shape in vae.passes} == {2, 8}


def test_no_new_round_starts_when_time_is_over(clock):
    vae = Fake(tiny_kl(), clock, COSTS)
    found(vae, PerBatchFinder(rounds=9, max_seconds=1))
    assert len(vae.passes) == 10  # one round to warm up, and the one that is always needed


def test_a_real_autoencoder_is_measured_before_the_first_batch_is_encoded(vae, tmp_path):
    finder, monitor = PerBatchFinder(rounds=1), EncodeMonitor()
    datamodule = plain(vae, photo_columns(4), batch_size=4)
    model = LatentModel()
    fit(datamodule, monitor, finder, model=model, max_steps=3, limit_val_batches=1, num_sanity_val_steps=1)
    datamodule.encoder.per_batch = None
    assert sorted(finder.table) == [1, 2, 4]
    assert all(seconds > 0 for seconds in finder.table.values())
    assert monitor.totals.batches == 2
    reference = LatentModel()
    fit(plain(vae, photo_columns(4), batch_size=4), model=reference, max_steps=3)
    assert torch.allclose(model.column("train"), reference.column("train"), atol=1e-5)


def test_the_smaller_wins_where_the_larger_is_hardly_faster():
    assert fastest({1: 1.0, 2: 0.5, 4: 0.49, 8: 0.6}) == 2
    assert fastest({1: 1.0, 2: 0.5, 4: 0.45}) == 4


@pytest.mark.parametrize(
    "settings", [{"candidates": []}, {"candidates": [0]}, {"candidates": [1.5]}, {"rounds": 0}, {"max_seconds": 0}]
)
def test_finder_settings_are_checked(settings):
    with complains("PerBatchFinder", *settings):
        PerBatchFinder(**settings)


# -------------------------------------------------------------------- VAEOffload


class OnTheDevice(Callback):
    """Puts the autoencoder where a GPU would have it."""

    def setup(self, trainer, pl_module, stage):
        trainer.datamodule.encoder.vae.to("meta")


class NotImages(Photos):
    """Batches for a stage that does not encode."""

    def predict_dataloader(self):
        return torch.utils.data.DataLoader(["a prompt", "another"], batch_size=1, collate_fn="".join)

    val_dataloader = predict_dataloader


class Predicting(LatentModel):
    def predict_step(self, batch, batch_idx):
        self.place = self.trainer.datamodule.encoder.vae.device.type
        return batch


@pytest.fixture
def offloaded():
    """Runs `VAEOffload` in a stage as on a GPU, and gives the autoencoder's journeys."""
    vae, offload = Travelling(tiny_kl()), VAEOffload()

    def run(stages, pixels, model, stage="predict"):
        offload.stages = tuple(stages)
        trainer = quiet_trainer(callbacks=[OnTheDevice(), offload])
        getattr(trainer, stage)(
            model, datamodule=LatentDataModule(pixels(photo_columns(4)), PlainEncoder(vae, posterior="mode"))
        )
        return vae.journeys

    return run


def test_the_autoencoder_leaves_for_a_stage_that_does_not_encode_and_comes_back(offloaded, caplog):
    model = Predicting()
    with caplog.at_level(logging.INFO):
        journeys = offloaded(["predict"], NotImages, model)
    assert model.place == "cpu"
    assert journeys == ["meta", "cpu", "meta", "cpu"]  # there, away, back, and the data module's teardown
    assert any("VAEOffload" in record.message and "freed for predict" in record.message for record in caplog.records)


def test_other_stages_keep_it(offloaded):
    model = Predicting()
    assert offloaded(["test"], NotImages, model) == ["meta", "cpu"]
    assert model.place == "meta"


def test_it_comes_back_for_a_batch_of_images_with_a_warning(offloaded):
    model = Predicting()
    with pytest.warns(UserWarning, match="such a stage encodes images"):
        journeys = offloaded(["predict"], Photos, model)
    assert model.place == "meta"
    assert journeys == ["meta", "cpu", "meta", "cpu"]


def test_a_stage_that_failed_leaves_nothing_behind(offloaded):
    class Failing(Predicting):
        def predict_step(self, batch, batch_idx):
            raise KeyError("prompt")

    with pytest.raises(KeyError, match="prompt"):
        offloaded(["predict"], NotImages, Failing())
    offloaded(["predict"], Photos, LatentModel(), stage="test")  # warnings are errors


def test_it_leaves_after_an_epoch_that_read_everything_and_comes_back_for_what_is_missing(tmp_path):
    def run(epochs):
        vae = Travelling(tiny_kl())
        data = SamplesData(size=32, batch_size=2, epoch_length=4, val_length=0)
        datamodule = LatentDataModule(data, PlainEncoder(vae), cache=Cache(tmp_path / "cache", variants=2))
        settings = {"callbacks": [OnTheDevice(), VAEOffload()], "max_epochs": epochs, "limit_val_batches": 0}
        quiet_trainer(**settings).fit(LatentModel(), datamodule=datamodule)
        return vae.journeys

    assert run(1) == ["meta", "cpu"]  # there, and the data module's teardown
    # Away after an epoch of the first crops, which are there; back for the second ones; away after both were read.
    assert run(4) == ["meta", "cpu", "meta", "cpu"]


def test_on_the_cpu_it_warns_that_it_has_no_effect(vae):
    with pytest.warns(UserWarning, match="VAEOffload: has no effect"):
        fit(plain(vae, photo_columns(4)), VAEOffload(), max_steps=1)


@pytest.mark.parametrize("stages", [[], ["fit"], "predict"])
def test_stages_are_checked(stages):
    with complains("VAEOffload", "validate, test, predict"):
        VAEOffload(stages)
