"""Fixtures that the tests share; the classes behind them are in helpers.py."""

import gc
import shutil
import sys

import pytest

LONG = ("test_torture", "test_first_command_trains", "test_no_small_file_takes_more", "test_clean[mypy]")


def pytest_collection():
    """Not called in xdist's first process, which only hands tests out: it would spend seconds on importing torch."""
    import hypothesis
    import torch

    hypothesis.settings.register_profile("any machine", deadline=None, database=None)  # no test measures time
    hypothesis.settings.load_profile("any machine")
    torch.set_num_threads(1)  # pytest-xdist gives each test a core
    gc.disable()  # what the imports make stays


def pytest_collection_finish():
    """Each collection of garbage would walk through all of torch, diffusers and transformers: half a second."""
    gc.freeze()
    gc.set_threshold(10_000)  # not 700: a composed config is thousands of objects
    gc.enable()


def pytest_collection_modifyitems(items):
    """What takes a minute begins first: at the end the other worker would wait for it."""
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.fixture(autouse=True)
def no_waiting_for_parquet():
    """A stream of parquet files that is given up sleeps 5 s, in whatever test it is collected."""
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


@pytest.fixture(scope="session")
def vae():
    """A frozen tiny AutoencoderKL in float32: r = 8, z = 4."""
    from helpers import tiny_kl

    from latentdm import FrozenVAE

    return FrozenVAE(tiny_kl(scaling_factor=0.5, shift_factor=0.1), dtype="float32")


@pytest.fixture
def plain(vae):
    """The encoder without masks, and without noise."""
    from latentdm import PlainEncoder

    return PlainEncoder(vae, posterior="mode")


@pytest.fixture
def inpaint(vae):
    """The encoder that reads masks, without noise."""
    from latentdm import InpaintEncoder

    return InpaintEncoder(vae, posterior="mode")


@pytest.fixture
def recorder():
    """An autoencoder that keeps what it was given."""
    from helpers import RecordingAutoencoder

    return RecordingAutoencoder()


@pytest.fixture
def recording_vae(recorder):
    """The recorder, frozen."""
    from latentdm import FrozenVAE

    return FrozenVAE(recorder)


class SavedPipelines(dict):
    """Name of `tiny_pipelines.PIPELINES` → its folder, written when it is first asked for; to be left as it is."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, name):
        from tiny_pipelines import save_pipeline

        self[name] = save_pipeline(name, self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return SavedPipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def written_workplace(tmp_path_factory):
    from running import write_cutouts, write_dataset, write_latents, write_photos, write_shards

    folder = tmp_path_factory.mktemp("workplace")
    write_photos(folder / "photos")
    write_cutouts(folder / "cutouts")
    write_dataset(folder / "dataset")
    write_latents(folder / "exported")
    write_shards(folder / "shards")
    return folder


@pytest.fixture
def workplace(written_workplace, tmp_path, monkeypatch):
    """A folder with ``photos/`` with masks, ``cutouts/`` with transparency, a ``dataset/`` and ``shards/``."""
    shutil.copytree(written_workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
