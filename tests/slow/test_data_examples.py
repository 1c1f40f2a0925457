"""The example trains from each kind of data."""

import math

import pytest
from running import run_example


@pytest.mark.parametrize(
    "source",
    [
        ["pixels=folder", "pixels.root=photos"],
        ["pixels=huggingface", "pixels.path=dataset", "pixels.columns={caption: prompt}"],
        ["pixels=huggingface", "pixels.path=dataset", "pixels.streaming=true", "pixels.val_split=train"],
        ["pixels=webdataset", "pixels.shards='shards/train-{0000..0002}.tar'", "pixels.val_shards=shards/val.tar"],
    ],
    ids=["folder", "huggingface", "stream", "webdataset"],
)
def test_the_example_trains_from_each_source(source, workplace):
    losses = run_example([*source, "pixels.size=64", "pixels.batch_size=2", "masks=batch"], workplace)
    assert math.isfinite(losses["last"])
