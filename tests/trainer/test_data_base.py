"""The shared base: batches through a real Trainer, the order and the epoch that a dataset is told, several ranks."""

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DistributedSampler

from latentdm.data import PixelDataModule
from latentdm.data.base import EpochSampler, PixelDataset
from latentdm.draws import sample_generator


class Numbers(PixelDataset):
    """Tiny noise images that follow from (index, epoch)."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def sample(self, place, epoch):
        generator = sample_generator(0, epoch, place, "crop")
        pixels = torch.randint(256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        return {"pixels": pixels, "index": place, "name": f"{place}", "epoch": epoch}


class NumbersData(PixelDataModule):
    def __init__(self, train=10, val=5, **settings):
        super().__init__(**{"batch_size": 4, **settings})
        self.counts = train, val

    def setup(self, stage=None):
        train, val = self.counts
        self.train_set = Numbers(train)
        self.val_set = self.test_set = self.predict_set = Numbers(val) if val else None


class Recorder(LightningModule):
    """Keeps what every step received, as it was received."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append((self.current_epoch, batch))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append((self.current_epoch, batch))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append((self.current_epoch, batch))

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append((self.current_epoch, batch))
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def of(self, stage, key, epoch=None):
        values = [batch[key] for e, batch in self.seen[stage] if epoch in (None, e)]
        return torch.cat(values)


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0, **quiet, **settings}
    )


def fit(data, **settings):
    recorder = Recorder()
    trainer(**settings).fit(recorder, datamodule=data)
    return recorder


def test_a_batch_arrives_as_uint8_even_in_half_precision():
    recorder = fit(NumbersData(), precision="bf16-true", max_epochs=1)
    batch = recorder.seen["train"][0][1]
    assert batch["pixels"].shape == (4, 3, 4, 4)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["index"].dtype == torch.int64
    assert batch["name"] == [str(int(index)) for index in batch["index"]]


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_epoch_is_told_and_shuffled(workers, use_distributed_sampler):
    data = NumbersData(num_workers=workers)
    recorder = fit(data, max_epochs=3, use_distributed_sampler=use_distributed_sampler)
    orders = [recorder.of("train", "index", epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for epoch in range(3):
        assert set(recorder.of("train", "epoch", epoch).tolist()) == {epoch}
        assert recorder.of("val", "index", epoch).tolist() == [0, 1, 2, 3, 4]
        assert set(recorder.of("val", "epoch", epoch).tolist()) == {0}
        for index, pixels in zip(orders[epoch], recorder.of("train", "pixels", epoch), strict=True):
            assert torch.equal(pixels, Numbers(10)[index, epoch]["pixels"])


def test_workers_change_nothing():
    runs = [fit(NumbersData(num_workers=workers)) for workers in (0, 1, 2)]
    for run in runs[1:]:
        for stage in ("train", "val"):
            for key in ("pixels", "index", "epoch"):
                assert torch.equal(run.of(stage, key), runs[0].of(stage, key))


def test_the_seed_sets_the_order_and_no_sum_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(Numbers(50), training=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert [place for place, _ in order(0, 1)] != [place for place, _ in order(1, 0)]


def test_loading_leaves_the_global_generator_alone():
    data = NumbersData()
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("count", "batches"), [(10, [4, 4]), (8, [4, 4]), (4, [4]), (3, [3]), (1, [1])])
def test_training_drops_an_incomplete_batch_only_if_another_is_left(count, batches):
    data = NumbersData(train=count, val=count)
    data.setup()
    assert [len(batch["index"]) for batch in data.train_dataloader()] == batches
    assert len(data.train_dataloader()) == len(batches)
    assert sum(len(batch["index"]) for batch in data.val_dataloader()) == count


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_every_rank_has_equally_many_batches(count, ranks, training):
    def batches(rank):
        data = NumbersData()
        data.trainer = type("Ranks", (), {"distributed_sampler_kwargs": {"num_replicas": ranks, "rank": rank}})()
        return [batch["index"].tolist() for batch in data._loader(Numbers(count), training)]

    of_rank = [batches(rank) for rank in range(ranks)]
    assert {tuple(map(len, batches)) for batches in of_rank} == {tuple(map(len, of_rank[0]))}
    assert of_rank[0]
    seen = [index for batches in of_rank for batch in batches for index in batch]
    if training and count // ranks >= 4:
        assert len(set(seen)) == len(seen) == count // ranks // 4 * 4 * ranks
    else:
        assert set(seen) == set(range(count))
        assert len(seen) == -(-count // ranks) * ranks


class PickledRecorder(Recorder):
    """Writes what its rank saw: a process that ends takes its lists with it."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        seen = {
            (stage, epoch): self.of(stage, "index", epoch).tolist() for stage in ("train", "val") for epoch in range(2)
        }
        seen["epochs"] = sorted(set(self.of("train", "epoch").tolist()))
        seen["sampler"] = type(self.trainer.train_dataloader.sampler)
        (self.folder / f"{self.global_rank}").write_bytes(pickle.dumps(seen))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ranks_share_the_samples(tmp_path, use_distributed_sampler):
    trainer(strategy="ddp_fork", devices=2, use_distributed_sampler=use_distributed_sampler).fit(
        PickledRecorder(tmp_path), datamodule=NumbersData(train=17, val=5)
    )
    first, second = (pickle.loads((tmp_path / f"{rank}").read_bytes()) for rank in range(2))
    assert first["sampler"] is second["sampler"] is EpochSampler
    assert first["epochs"] == second["epochs"] == [0, 1]
    for epoch in range(2):
        mine, other = first["train", epoch], second["train", epoch]
        assert len(mine) == len(other) == 8
        assert len({*mine, *other}) == 16
        assert first["val", epoch] == [0, 2, 4]
        assert second["val", epoch] == [1, 3, 0]  # the first is repeated so that both have three
    assert first["train", 0] != first["train", 1]


def test_validate_test_and_predict_keep_every_sample_in_order():
    recorder, data = Recorder(), NumbersData()
    trainer().validate(recorder, datamodule=data, verbose=False)
    trainer().test(recorder, datamodule=data, verbose=False)
    trainer().predict(recorder, datamodule=data, return_predictions=False)
    for stage in ("val", "test", "predict"):
        assert recorder.of(stage, "index").tolist() == [0, 1, 2, 3, 4]
        assert set(recorder.of(stage, "epoch").tolist()) == {0}


def test_no_validation_set_means_no_validation():
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):  # Lightning's, and right
        recorder = fit(NumbersData(val=0))
    assert recorder.seen["val"] == []
    assert len(recorder.seen["train"]) == 4


@pytest.mark.parametrize("stage", ["train", "test", "predict"])
def test_a_missing_set_is_said(stage):
    with pytest.raises(ValueError, match=rf"^NumbersData: {stage}_set is None; call setup\(\) first"):
        getattr(NumbersData(), f"{stage}_dataloader")()


def test_overfitting_repeats_the_first_epoch_s_crops():
    with pytest.warns(UserWarning, match="overfit"):
        recorder = fit(NumbersData(), overfit_batches=1)
    assert torch.equal(recorder.of("train", "pixels", 0), recorder.of("train", "pixels", 1))


def test_the_loader_is_set_up_for_speed(monkeypatch):
    data = NumbersData(num_workers=1)
    data.setup()
    loader = data.train_dataloader()
    assert loader.persistent_workers
    assert isinstance(loader.sampler, DistributedSampler)
    assert loader.pin_memory == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert data.train_dataloader().pin_memory


def test_a_dataset_ends_and_reads_a_plain_index_as_epoch_0():
    dataset = Numbers(3)
    assert [sample["index"] for sample in dataset] == [0, 1, 2]
    assert torch.equal(dataset[1]["pixels"], dataset[1, 0]["pixels"])
    with pytest.raises(IndexError, match="Numbers: there is no sample 3; it holds 3"):
        dataset[3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -5}, "seed must be at least 0, got -5"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5; set it to 1 or more"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^NumbersData: {message}"):
        NumbersData(**settings)
