"""The shared base: batches through a real Trainer, the order and the epoch that a dataset is told, several ranks."""

import numpy as np
import pytest
import torch
from data_helpers import Numbers, NumbersData, Recorder, fit, trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from PIL import Image
from torch.utils.data import DistributedSampler

from latentdm.data import GlobalOrder, ImageFolderData, SamplesData


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
        order = GlobalOrder(Numbers(50), 1, seed=seed)
        order.set_epoch(epoch)
        return list(order)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert [position for [(position, _)] in order(0, 1)] != [position for [(position, _)] in order(1, 0)]


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
        data = NumbersData(count, count)
        data.setup()
        data.trainer = type("Ranks", (), {"distributed_sampler_kwargs": {"num_replicas": ranks, "rank": rank}})()
        loader = data.train_dataloader() if training else data.val_dataloader()
        return [batch["index"].tolist() for batch in loader]

    of_rank = [batches(rank) for rank in range(ranks)]
    assert {tuple(map(len, batches)) for batches in of_rank} == {tuple(map(len, of_rank[0]))}
    assert of_rank[0]
    seen = [index for batches in of_rank for batch in batches for index in batch]
    if training and count // ranks >= 4:
        assert len(set(seen)) == len(seen) == count // ranks // 4 * 4 * ranks
    else:
        assert set(seen) == set(range(count))
        assert len(seen) == -(-count // ranks) * ranks


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("buckets", [None, np.array([1, 0] * 5)])
def test_overfitting_repeats_the_first_batches_and_their_crops(monkeypatch, workers, buckets):
    monkeypatch.setattr(Numbers, "bucket_of", buckets)
    recorder = fit(NumbersData(num_workers=workers, val=10), overfit_batches=2, max_epochs=3)
    first = [0, 1, 2, 3, 4, 5, 6, 7] if buckets is None else [1, 3, 5, 7, 9]
    for stage in ("train", "val"):
        for epoch in range(3):
            assert recorder.of(stage, "index", epoch).tolist() == first
            assert torch.equal(recorder.of(stage, "pixels", epoch), recorder.of(stage, "pixels", 0))


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch_and_epoch")
        self.of_batches = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.of_batches.append(batch_indices)

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.of_epoch = batch_indices


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("buckets", [None, np.array([1, 0, 0, 1, 1])])
def test_a_prediction_writer_gets_the_samples_indexes(monkeypatch, workers, buckets):
    monkeypatch.setattr(Numbers, "bucket_of", buckets)
    writer = Writer()
    predicted = trainer(callbacks=[writer]).predict(
        Recorder(), datamodule=NumbersData(batch_size=2, num_workers=workers)
    )
    assert writer.of_batches == [batch.tolist() for batch in predicted]
    assert writer.of_epoch == [writer.of_batches]
    assert sorted(index for batch in writer.of_batches for index in batch) == [0, 1, 2, 3, 4]


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
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"seed": -5}, "seed must be an integer of at least 0, got -5"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^NumbersData: {message}"):
        NumbersData(**settings)


class CropsRecorder(Recorder):
    """The images of each epoch, by index."""

    def images(self, stage, epoch):
        return dict(zip(self.of(stage, "index", epoch).tolist(), self.of(stage, "pixels", epoch), strict=True))


def test_two_epochs_of_the_sample_photographs():
    recorder = CropsRecorder()
    trainer().fit(recorder, datamodule=SamplesData(size=16, batch_size=4, epoch_length=12, val_length=5))
    first, second = (recorder.images("train", epoch) for epoch in range(2))
    assert set(first) == set(second) == set(range(12))
    assert not any(torch.equal(first[index], second[index]) for index in first)
    first, second = (recorder.images("val", epoch) for epoch in range(2))
    assert set(first) == set(second) == set(range(12, 17))
    assert all(torch.equal(first[index], second[index]) for index in first)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_skips_samples_ends_with_a_report(tmp_path, workers):
    photos = tmp_path / "photos"
    (photos / "val").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (10, 10), (number, 0, 0)).save(photos / f"{number:02}.png")
    for number in (3, 4, 9):
        (photos / f"{number:02}.png").write_bytes(b"broken")
    Image.new("RGB", (10, 10)).save(photos / "val" / "1.png")
    data = ImageFolderData(
        photos, size=8, batch_size=6, val_root=photos / "val", on_error="skip", max_skipped_share=1, num_workers=workers
    )
    with pytest.warns(UserWarning, match=r"ImageFolderData: 3 of 13 samples could not be read .*skipped_sam") as caught:
        fit(data, default_root_dir=tmp_path)
    (report,) = [str(w.message) for w in caught if "could not be read" in str(w.message)]
    assert all(f"{number:02}.png: its content is no image" in report for number in (3, 4, 9))
    assert len((tmp_path / "skipped_samples" / "rank0.jsonl").read_text().splitlines()) == 3


class SaveEnd(Callback):
    """Saves after each step, so that the last one is left."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path, workers):
    def indices(recorder):
        return recorder.of("train", "index").tolist()

    data = {"train": 22, "num_workers": workers}
    whole = indices(fit(NumbersData(**data)))

    first = fit(NumbersData(**data), max_steps=7, callbacks=[SaveEnd(tmp_path / "saved.ckpt")])
    rest = Recorder()
    trainer().fit(rest, datamodule=NumbersData(**data), ckpt_path=tmp_path / "saved.ckpt")
    assert len(first.seen["train"]) == 7
    assert indices(first) + indices(rest) == whole
