"""The how-to for Ray Data, where Ray is installed."""

import pytest
from running import run_ranks, write_noise_photos

pytest.importorskip("ray", reason="Ray Data is an engine of those who have it")

SCRIPT = """
import sys
from pathlib import Path
import ray
from latentdm.cache.ray import EncodeActor, jobs
from latentdm.cache.upkeep import spaces, verify

folder = sys.argv[1]


def make_datamodule():
    from helpers import tiny_kl
    from latentdm import Cache, FrozenVAE, LatentDataModule, PlainEncoder
    from latentdm.data import ImageFolderData

    pixels = ImageFolderData(f"{folder}/photos", 32, 4, 0)
    encoder = PlainEncoder(FrozenVAE(tiny_kl(), dtype="float32"))
    return LatentDataModule(pixels, encoder, cache=Cache(f"{folder}/cache", variants=2))


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
rows = ray.data.from_items(jobs(make_datamodule))
encoded = rows.map_batches(EncodeActor, fn_constructor_args=(make_datamodule,), batch_size=8, concurrency=2)
assert [row["why"] for row in encoded.take_all()] == [""] * 48
ray.shutdown()
[space] = spaces(Path(folder, "cache"))
assert (verify(space).entries, verify(space).failures) == (48, 0)
"""


def test_the_actor_of_the_how_to_fills_a_cache(tmp_path):
    write_noise_photos(tmp_path / "photos", 24)
    run_ranks(SCRIPT, tmp_path)
