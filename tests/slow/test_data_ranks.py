"""Two ranks under Lightning: every sample once, all in step, whatever Lightning is told."""

import json
import pickle

import bucket_ranks
import pytest
from bucket_ranks import BATCH, PLAN, SIZES
from data_helpers import NumbersData, Recorder, trainer
from helpers import LatentModel, quiet_trainer
from PIL import Image

from latentdm.data import Buckets, GlobalOrder, ImageFolderData
from latentdm.data.order import InOrder

BUCKETS = {"area": 64 * 64, "step": 16}
FOLDER_SIZES = [
    (90, 60),
    (60, 90),
    (64, 64),
    (130, 128),
    (200, 80),
    (80, 201),
    (91, 62),
    (300, 100),
    (61, 60),
    (120, 80),
]


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
    assert first["sampler"] is second["sampler"] is GlobalOrder
    assert first["epochs"] == second["epochs"] == [0, 1]
    for epoch in range(2):
        mine, other = first["train", epoch], second["train", epoch]
        assert len(mine) == len(other) == 8
        assert len({*mine, *other}) == 16
        assert first["val", epoch] == [0, 2, 4]
        assert second["val", epoch] == [1, 3, 0]  # the first is repeated so that both have three
    assert first["train", 0] != first["train", 1]


class NoteTaker(LatentModel):
    """Writes down the names and the shape of each batch: a process that ends takes its lists with it."""

    def __init__(self, folder):
        super().__init__(key="pixels")
        self.folder = folder

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with (self.folder / f"rank{self.global_rank}").open("a") as file:
            seen = [self.current_epoch, [*batch["pixels"].shape[-2:]], batch["index"].tolist()]
            file.write(json.dumps(seen) + "\n")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ranks_see_the_batches_of_a_folder(tmp_path, use_distributed_sampler):
    folder, notes = tmp_path / "folder", tmp_path / "notes"
    folder.mkdir()
    notes.mkdir()
    for number, size in enumerate(FOLDER_SIZES):
        Image.new("RGB", size).save(folder / f"{number:02}.png")
    data = ImageFolderData(folder, batch_size=2, val_share=0, buckets=BUCKETS)
    trainer = quiet_trainer(
        strategy="ddp_fork", devices=2, max_epochs=2, limit_val_batches=0,
        use_distributed_sampler=use_distributed_sampler,
    )  # fmt: skip
    trainer.fit(NoteTaker(notes), datamodule=data)
    seen = [[json.loads(line) for line in (notes / f"rank{rank}").read_text().splitlines()] for rank in range(2)]
    data.setup()
    plan = Buckets(**BUCKETS).plan(FOLDER_SIZES)
    orders = []
    for epoch in range(2):
        mine, other = ([batch[1:] for batch in of_rank if batch[0] == epoch] for of_rank in seen)
        assert [(shape, len(index)) for shape, index in mine] == [(shape, len(index)) for shape, index in other]
        for rank, of_rank in enumerate((mine, other)):
            planned = GlobalOrder(data.train_set, 2, num_replicas=2, rank=rank)
            assert [index for _, index in of_rank] == [[position for position, _ in b] for b in planned.batches(epoch)]
        for shape, index in mine + other:
            assert all(plan.shape(*FOLDER_SIZES[position]) == tuple(shape[::-1]) for position in index)
        indices = [position for _, index in mine + other for position in index]
        assert set(indices) == set(range(10))
        assert len(indices) < 10 + 2 * len(planned)
        orders.append(indices)
    assert orders[0] != orders[1]


def planned(rank, epoch=0, training=True):
    """The positions of each batch that one of two ranks is to see."""
    order = (GlobalOrder if training else InOrder)(bucket_ranks.Sizes(), BATCH, num_replicas=2, rank=rank, seed=3)
    return [[position for position, _ in batch] for batch in order.batches(epoch)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ranks_under_lightning_see_what_was_planned(tmp_path, use_distributed_sampler):
    seen = bucket_ranks.run(tmp_path, 2, use_distributed_sampler)
    for rank in range(2):
        expected = []
        for stage, epoch in (("train", 0), ("train", 1), ("predict", 0)):
            for positions in planned(rank, epoch, stage == "train"):
                width, height = PLAN.shape(*SIZES[positions[0]].tolist())
                expected.append([stage, height, width, positions, epoch])
        assert seen[rank] == expected
