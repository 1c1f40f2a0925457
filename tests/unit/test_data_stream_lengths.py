"""How long an epoch of a stream is, and what happens where a stream holds less than there are parts of it."""

import tarfile

import pytest
from PIL import Image
from running import add_file

from latentdm.data import GlobalOrder, WebDatasetData


@pytest.fixture
def shard(tmp_path):
    """Writes a shard of so many pictures whose colour is their number."""

    def write(count):
        path = tmp_path / f"{count}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                add_file(tar, f"{number}.png", Image.new("RGB", (16, 16), (number, 0, 0)))
        return str(path)

    return write


def data(shards, **settings):
    made = WebDatasetData(shards, size=16, batch_size=1, **settings)
    made.setup()
    return made


def test_fewer_validation_samples_than_ranks_and_workers_validate_all_the_same(shard):
    seen = []
    for rank in range(4):
        val_set = data(shard(9), val_shards=shard(2), val_length=8).val_set
        order = GlobalOrder(val_set, batch_size=1, training=False, num_replicas=4, rank=rank)
        seen.append([int(val_set[position]["pixels"][0, 0, 0]) for [position] in order])
    assert seen == [[0, 0], [1, 1], [0, 0], [1, 1]]


def test_empty_validation_and_training_shards_are_told_apart(shard):
    with pytest.raises(
        ValueError, match="WebDatasetData: the validation data hold no sample; give them some, or leave"
    ):
        data(shard(9), val_shards=shard(0)).val_set[0]
    with pytest.raises(ValueError, match="WebDatasetData: part 0 of 1 of the stream is empty"):
        data(shard(0), val_shards=shard(9)).train_set[0]


def test_the_length_of_an_epoch_is_said(shard, caplog):
    with caplog.at_level("INFO"):
        data(shard(9))
    assert "WebDatasetData: an epoch is epoch_length=1024 images, however many the stream holds" in caplog.text
