"""encode_ahead: the same batches in the same order, encoded one step earlier."""

import gc
import os
import subprocess
import sys
import weakref
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import (
    ByPlace,
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
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.ahead import SideStream
from latentdm.augment import Augment
from latentdm.callbacks import EncodeCallback, EncodeMonitor, PerBatchFinder
from latentdm.captions import Captions
from latentdm.masks import RandomMask

COUNT = 10


def columns(index=True):
    return photo_columns(COUNT, index=index, caption=[f"a, b, c, photo {number}" for number in range(COUNT)])


class Stream(IterableDataset):
    """Samples without a length, which Lightning prefetches."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from (self.samples[place] for place in range(len(self.samples)))


class Streamed(Photos):
    def train_dataloader(self):
        return DataLoader(Stream(self.dataset), batch_size=2)


class OtherLoader:
    """A loader that is none of torch's."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


class Foreign(Photos):
    def train_dataloader(self):
        return OtherLoader(super().train_dataloader())


def everything(vae, ahead, pixels=None, **settings):
    """A data module that draws for every purpose there is."""
    return LatentDataModule(
        pixels or Photos(columns()),
        InpaintEncoder(vae, **settings),
        masks=RandomMask(),
        augment=Augment(flip=0.5, brightness=0.2),
        captions=Captions(shuffle_tags=True, dropout=0.3),
        keep_pixels=True,
        encode_ahead=ahead,
    )


def same(one, other):
    """Whether two models received the same bits in the same order in every stage."""
    for stage in one.seen:
        assert len(one.seen[stage]) == len(other.seen[stage])
        for (epoch, batch), (there, twin) in zip(one.seen[stage], other.seen[stage], strict=True):
            assert epoch == there
            assert list(batch) == list(twin)
            for key, value in batch.items():
                assert torch.equal(value, twin[key]) if isinstance(value, torch.Tensor) else value == twin[key], key
    assert one.seen["train"]
    return True


LOADERS = {
    "with index": lambda: Photos(columns()),
    "without index": lambda: Photos(columns(index=False)),
    "workers": lambda: Photos(columns(), num_workers=2),
    "no length": lambda: Streamed(columns()),
    "no length or index": lambda: Streamed(columns(index=False)),
    "foreign": lambda: Foreign(columns(index=False)),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "settings", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 2}, {"limit_train_batches": 3}], ids=str
)
def test_two_epochs_of_any_loader_have_the_same_bits_in_the_same_order(vae, loader, settings):
    models = [fit(everything(vae, ahead, LOADERS[loader]()), max_epochs=2, **settings) for ahead in (0, 1)]
    assert same(*models)


def test_tuples_are_encoded_ahead_as_well(vae):
    def seen(ahead):
        model = LatentModel(key=0)
        pixels = Photos({"pixels": images(6), "label": torch.arange(6)}, as_tuple=True)
        datamodule = LatentDataModule(pixels, PlainEncoder(vae), keys={"pixels": 0, "latents": 0}, encode_ahead=ahead)
        return fit(datamodule, model).batches("train")

    for batch, twin in zip(seen(0), seen(1), strict=True):
        assert all(torch.equal(value, other) for value, other in zip(batch, twin, strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_trainer_s_precision_rounds_no_image(vae, precision):
    def seen(ahead):
        pixels = Photos({"pixels": images(6) / 255, "index": torch.arange(6)})
        return fit(LatentDataModule(pixels, PlainEncoder(vae), encode_ahead=ahead), precision=precision)

    assert same(seen(0), seen(1))


class Counting(Callback):
    """How many images the autoencoder had encoded when each step began."""

    def __init__(self, recorder):
        self.recorder = recorder
        self.counts = []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.counts.append(sum(map(len, self.recorder.seen)))


@pytest.mark.parametrize(("ahead", "encoded"), [(0, [2, 4, 6, 8, 10]), (1, [4, 6, 8, 10, 10])])
def test_each_step_begins_with_the_next_batch_encoded_and_no_other(ahead, encoded):
    recorder = RecordingAutoencoder()
    counting = Counting(recorder)
    datamodule = LatentDataModule(Photos(columns()), PlainEncoder(FrozenVAE(recorder)), encode_ahead=ahead)
    fit(datamodule, callbacks=[counting], limit_val_batches=0)
    assert counting.counts == encoded


@pytest.mark.parametrize("limits", [{"limit_train_batches": 3}, {"max_steps": 3}, {"overfit_batches": 3}], ids=str)
def test_limits(vae, limits):
    models = [
        fit(everything(vae, ahead), max_epochs=1 if "max_steps" not in limits else -1, **limits) for ahead in (0, 1)
    ]
    assert same(*models)
    assert len(models[0].seen["train"]) == 3


# ---------------------------------------------------------------- checkpoints


class Resumable(DataLoader):
    """Goes on where its state says; the state counts what was taken from it."""

    first = taken = 0

    def __iter__(self):
        first, self.first = self.first, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.taken = number + 1
                yield batch

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.first = self.taken = state["taken"]


class ResumablePhotos(Photos):
    """Also keeps the state of its loader itself, as data modules do that were written before Lightning did."""

    def train_dataloader(self):
        self.train_loader = Resumable(self.dataset, batch_size=2)
        return self.train_loader

    def state_dict(self):
        return self.train_loader.state_dict()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("resumed_ahead", [0, 1])
def test_a_run_that_goes_on_within_an_epoch_misses_nothing(vae, tmp_path, ahead, resumed_ahead):
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    whole = fit(everything(vae, 0, ResumablePhotos(columns(index=False))), **settings)
    trainer = quiet_trainer(**settings, callbacks=[Stop(7, tmp_path / "middle.ckpt")])
    stopped = everything(vae, ahead, ResumablePhotos(columns(index=False)))
    first = LatentModel()
    trainer.fit(first, datamodule=stopped)
    assert torch.load(tmp_path / "middle.ckpt")["LatentDataModule"] == {"taken": 2}
    assert stopped.state_dict() == {"taken": 2}  # after the fit as well
    resumed = everything(vae, resumed_ahead, ResumablePhotos(columns(index=False)))
    second = fit(resumed, LatentModel(), tmp_path / "middle.ckpt", **settings)
    batches = first.batches("train") + second.batches("train")
    assert len(first.batches("train")) == 7
    for batch, twin in zip(batches, whole.batches("train"), strict=True):
        assert batch["caption"] == twin["caption"]
        assert torch.equal(batch["latents"], twin["latents"])


class Stop(Callback):
    """Stops a run after a number of steps, with a checkpoint if one is asked for."""

    def __init__(self, steps, checkpoint=None):
        self.steps = steps
        self.checkpoint = checkpoint

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            if self.checkpoint is not None:
                trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


# ---------------------------------------------------------------- what goes wrong has its turn


def test_a_bad_batch_is_an_error_when_its_turn_has_come(vae):
    bad = columns()
    bad["pixels"] = bad["pixels"] / 255
    bad["pixels"][7] += 3
    steps = []
    for ahead in (0, 1):
        model = LatentModel()
        with complains("pixels: floats must lie in 0…1"):
            fit(LatentDataModule(Photos(bad), PlainEncoder(vae), encode_ahead=ahead), model)
        steps.append(len(model.seen["train"]))
    assert steps == [3, 3]


def test_a_loader_that_fails_is_an_error_when_its_turn_has_come(vae):
    class Failing(Samples):
        def __getitem__(self, place):
            if place == 6:
                raise OSError("disk on fire")
            return super().__getitem__(place)

    steps = []
    for ahead in (0, 1):
        pixels, model = Photos(columns()), LatentModel()
        pixels.dataset = Failing(columns())
        with complains("disk on fire", error=OSError):
            fit(LatentDataModule(pixels, PlainEncoder(vae), encode_ahead=ahead), model)
        steps.append(len(model.seen["train"]))
    assert steps == [3, 3]


@pytest.mark.parametrize("ahead", [2, -1, True, "1"])
def test_a_wrong_setting_is_named(vae, ahead):
    with complains("encode_ahead must be 0 or 1", repr(ahead)):
        LatentDataModule(Photos(columns()), PlainEncoder(vae), encode_ahead=ahead)


def test_several_train_loaders_are_encoded_as_before_with_a_warning(vae):
    class Two(Photos):
        def train_dataloader(self):
            return [super().train_dataloader()]

    with pytest.warns(UserWarning, match="encode_ahead=1 has no effect: it takes one train loader, got list"):
        LatentDataModule(Two(columns()), PlainEncoder(vae), encode_ahead=1).train_dataloader()


# ---------------------------------------------------------------- everything else stays as it was


def test_other_stages_and_loops_by_hand_see_what_they_saw(vae):
    datamodule = everything(vae, 1)
    loader = datamodule.train_dataloader()
    assert next(iter(loader))["pixels"].dtype == torch.uint8
    assert isinstance(loader, DataLoader)
    before, after = predict(everything(vae, 0)), predict(datamodule)
    assert all(torch.equal(batch["latents"], twin["latents"]) for batch, twin in zip(before, after, strict=True))
    trainer = quiet_trainer()
    trainer.fit(LatentModel(), datamodule=datamodule)
    assert next(iter(trainer.train_dataloader))["pixels"].dtype == torch.uint8
    for _ in range(2):  # neither a wrapper around a wrapper nor a second owner
        assert type(datamodule.train_dataloader()).__mro__[1] is DataLoader


def test_a_loader_that_two_data_modules_share_serves_each(vae):
    class Cached(Photos):
        def train_dataloader(self):
            self.cached = getattr(self, "cached", None) or super().train_dataloader()
            return self.cached

    pixels = Cached(columns())
    one, other = (fit(everything(vae, 1, pixels)) for _ in range(2))
    assert same(one, other)
    assert type(pixels.cached).__mro__[1] is DataLoader


def test_nothing_is_held_after_a_fit(vae):
    datamodule = everything(vae, 1)
    model = LatentModel()
    gc.collect()
    gc.disable()  # what a cycle holds would stay
    try:
        held = []

        class Watching(Callback):
            def on_train_batch_start(self, trainer, model, batch, batch_idx):
                held.append(weakref.ref(batch["latents"]))
                model.seen["train"].clear()
                assert sum(reference() is not None for reference in held) <= 2  # this one, and Lightning's last

        trainer = quiet_trainer(callbacks=[Watching(), Stop(3)], max_epochs=2)
        trainer.fit(model, datamodule=datamodule)
    finally:
        gc.enable()
    assert len(held) == 3


def test_callbacks_see_each_batch_once_and_in_order(vae):
    class Order(EncodeCallback):
        def __init__(self):
            self.seen = []

        def on_encode_start(self, trainer, model, inputs):
            self.seen.append(("start", inputs["index"].tolist(), "mask" in inputs, trainer.global_step))

        def on_encode_end(self, trainer, model, inputs, outputs, batch):
            assert torch.equal(outputs["latents"], batch["latents"])
            self.seen.append(("end", inputs["index"].tolist(), "mask" in inputs, trainer.global_step))

    orders = []
    for ahead in (0, 1):
        orders.append(Order())
        fit(everything(vae, ahead), callbacks=[orders[-1]], max_epochs=2, val_check_interval=2)
    assert orders[0].seen == orders[1].seen
    assert len(orders[0].seen) > 20


def test_the_callbacks_of_the_package_work(vae, caplog):
    finder, monitor = PerBatchFinder(candidates=[2]), EncodeMonitor()
    datamodule = everything(vae, 1)
    model = LatentModel()
    fit(datamodule, model, callbacks=[monitor, finder], log_every_n_steps=1, max_epochs=2)
    assert datamodule.encoder.per_batch == 2
    assert set(finder.table) == {2}
    assert monitor.totals.batches == 9
    assert monitor.totals.images == 18
    assert same(model, fit(everything(vae, 0, per_batch=2), max_epochs=2))


def test_an_example_input_array_passes(vae):
    model = LatentModel()
    model.example_input_array = {"latents": torch.zeros(1, 4, 4, 4)}
    fit(everything(vae, 1), model)
    assert len(model.seen["train"]) == 5


RANKS = """
import sys
import torch
from helpers import LatentModel, Photos, photo_columns, noise_vae, quiet_trainer
from latentdm import LatentDataModule, PlainEncoder
datamodule = LatentDataModule(Photos(photo_columns(10)), PlainEncoder(noise_vae()), encode_ahead=int(sys.argv[1]))
trainer = quiet_trainer(strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=True)
model = LatentModel()
trainer.fit(model, datamodule=datamodule)
seen = [(epoch, batch["index"], batch["latents"]) for epoch, batch in model.seen["train"]]
torch.save(seen, f"{sys.argv[2]}/{sys.argv[1]}.{trainer.global_rank}.pt")
"""


def test_two_ranks_share_the_samples_as_before(tmp_path):
    script, tests = tmp_path / "ranks.py", Path(__file__).parent
    script.write_text(RANKS, encoding="utf-8")
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for ahead in ("0", "1"):
        command = [sys.executable, "-W", "ignore", str(script), ahead, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
    samples = []
    for rank in (0, 1):
        before, after = (torch.load(tmp_path / f"{ahead}.{rank}.pt") for ahead in (0, 1))
        samples.append({int(i) for _, index, _ in after for i in index})
        for batch, twin in zip(before, after, strict=True):
            assert batch[0] == twin[0]
            assert torch.equal(batch[1], twin[1])
            assert torch.equal(batch[2], twin[2])
    assert samples[0] | samples[1] == set(range(10))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: two streams")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_the_bits_are_the_same(dtype):
    def seen(ahead):
        vae = FrozenVAE(tiny_kl(), dtype=dtype)
        pixels = Photos(photo_columns(64), batch_size=4, pin_memory=True)
        return fit(everything(vae, ahead, pixels), accelerator="gpu", max_epochs=3, val_check_interval=5)

    assert same(seen(0), seen(1))


def test_noise_follows_the_place_in_the_epoch_without_an_index():
    """Over noise alone, so that a wrong count could not hide behind the images."""
    runs = []
    for ahead in (0, 1):
        datamodule = LatentDataModule(Streamed(columns(index=False)), PlainEncoder(noise_vae()), encode_ahead=ahead)
        runs.append(fit(datamodule, max_epochs=2).column("train"))
    assert torch.equal(*runs)
    assert len(torch.unique(runs[0].flatten(1), dim=0)) == 2 * COUNT


def test_a_callback_may_look_at_the_loader_during_a_fit(vae):
    class Look(Callback):
        def __init__(self):
            self.looks = []

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.looks.append(next(iter(trainer.datamodule.train_loader)))
            self.looks.append(next(iter(trainer.train_dataloader)))

    class Kept(Photos):
        def train_dataloader(self):
            self.train_loader = super().train_dataloader()
            return self.train_loader

    runs = []
    for ahead in (0, 1):
        look = Look()
        runs.append(fit(everything(vae, ahead, Kept(columns())), callbacks=[look], max_epochs=2))
        assert all(batch["pixels"].dtype == torch.uint8 for batch in look.looks)
    assert same(*runs)


def test_a_look_at_the_loader_leaves_its_state(vae, tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            iter(trainer.train_dataloader)

    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[Look(), Stop(2, tmp_path / "middle.ckpt")])
    trainer.fit(LatentModel(), datamodule=everything(vae, 1, ResumablePhotos(columns(index=False))))
    assert torch.load(tmp_path / "middle.ckpt")["LatentDataModule"] == {"taken": 2}


def test_whole_epochs_hold_no_batch(vae):
    """What the device was given: of the last batch of each epoch nothing may stay until Python looks for cycles."""
    held = []

    class Given(Photos):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            held.append(weakref.ref(batch["pixels"]))
            return batch

    class Forget(LatentModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen["train"].clear()
            return loss

    gc.collect()
    gc.disable()
    try:
        fit(everything(vae, 1, Given(columns())), Forget(), max_epochs=3, limit_val_batches=0)
        assert len(held) == 3 * COUNT // 2
        assert sum(pixels() is not None for pixels in held) == 0
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's compiler
def test_replayed_graphs_and_a_batch_ahead_exclude_each_other():
    vae = FrozenVAE(tiny_kl(), compile="reduce-overhead")
    with complains("encode_ahead=1 with an autoencoder that replays CUDA graphs", "set compile: true"):
        fit(LatentDataModule(Photos(columns()), PlainEncoder(vae), encode_ahead=1))


def test_a_side_stream_is_not_copied():
    side = SideStream()
    side._stream = (item for item in ())  # as little to be copied as a stream
    assert deepcopy(side)._stream is None


def test_a_data_module_that_counts_what_it_transferred_resumes_the_same(vae, tmp_path):
    class Counting(Photos):
        seen = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.seen += len(batch["pixels"])
            return batch

        def state_dict(self):
            return {"seen": self.seen}

    for ahead in (0, 1):
        callbacks, settings = [Stop(3, tmp_path / "middle.ckpt")], {"max_epochs": 1, "limit_val_batches": 0}
        datamodule = everything(vae, ahead, Counting(columns()))
        quiet_trainer(callbacks=callbacks, **settings).fit(LatentModel(), datamodule=datamodule)
        assert torch.load(tmp_path / "middle.ckpt")["LatentDataModule"] == {"seen": 6}
        whole = everything(vae, ahead, Counting(columns()))
        fit(whole, **settings)
        assert whole.state_dict() == {"seen": COUNT}


def test_a_loader_that_is_no_iterable_is_encoded_as_before_with_a_warning(vae):
    class Listed(Photos):
        def train_dataloader(self):
            return ByPlace(list(super().train_dataloader()))

    plain = fit(everything(vae, 0, Listed(columns())))
    with pytest.warns(UserWarning, match="encode_ahead=1 has no effect: it takes one train loader, got ByPlace"):
        ahead = fit(everything(vae, 1, Listed(columns())))
    assert same(plain, ahead)
