"""How many images are encoded at once where nobody says: ``per_batch: null``."""

import platform

import pytest
import torch
from helpers import images, tiny_kl

from latentdm import FrozenVAE, PlainEncoder
from latentdm.frozen import allocator
from latentdm.frozen.chunks import CACHE_BYTES, KEPT_BYTES, MAX_IMAGES_ON_CPU, Chunks

CPU = torch.device("cpu")


def chunks(fixed: bool = False) -> Chunks:
    return Chunks("never", fixed, "Tiny")


def test_a_compiled_autoencoder_is_given_the_whole_batch():
    assert chunks(fixed=True).best(CPU, 1) is None


@pytest.mark.parametrize(("keeps", "widest"), [(True, KEPT_BYTES), (False, CACHE_BYTES)])
def test_a_cpu_is_given_as_many_images_as_its_allocator_bears(keeps, widest, monkeypatch):
    monkeypatch.setattr("latentdm.frozen.chunks.keeps_freed", lambda: keeps)
    cases = {
        widest: 1,
        widest // 2: 2,
        widest // 4: 4,
        widest // 3: 3,
        10 * widest: 1,  # one image always goes through
        1: MAX_IMAGES_ON_CPU,
        0: MAX_IMAGES_ON_CPU,  # no convolution, no activations
    }
    assert {size: chunks().best(CPU, size) for size in cases} == cases


@pytest.mark.parametrize("image_bytes", [1, 10 * KEPT_BYTES])
def test_an_accelerator_is_given_the_whole_batch(image_bytes):
    assert chunks().best(torch.device("cuda"), image_bytes) is None


@pytest.fixture
def tried(monkeypatch):
    """An autoencoder that takes two images of 32² in float32 at once, and the sizes of its chunks."""
    autoencoder, sizes = tiny_kl(), []
    channels = autoencoder.encoder.conv_in.out_channels
    for name in ("KEPT_BYTES", "CACHE_BYTES"):
        monkeypatch.setattr(f"latentdm.frozen.chunks.{name}", 2 * 2 * channels * 32 * 32 * 4)
    autoencoder.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return autoencoder, sizes


@pytest.mark.parametrize(
    ("side", "dtype", "expected"),
    [
        (32, "float32", [2, 2, 1]),
        (48, "bfloat16", [3, 2]),  # half the bytes, and no copy of them in another layout
        (16, "float32", [5]),
        (64, "float32", [1] * 5),
    ],
)
def test_the_default_follows_size_and_dtype(side, dtype, expected, tried):
    autoencoder, sizes = tried
    vae = FrozenVAE(autoencoder, dtype=dtype)
    PlainEncoder(vae)({"pixels": images(5, side, side)})
    assert sizes == expected
    assert min(vae.best_chunk((side, side)), 5) == expected[0]


@pytest.mark.parametrize("per_batch", [1, 3, 5])
def test_a_number_of_the_users_is_obeyed(per_batch, tried):
    autoencoder, sizes = tried
    PlainEncoder(FrozenVAE(autoencoder, dtype="float32"), per_batch=per_batch)({"pixels": images(5, 32, 32)})
    assert sizes[0] == per_batch
    assert sum(sizes) == 5


# ---------------------------------------------------------------- what the allocator keeps


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@needs_glibc
@pytest.mark.parametrize("name", sorted(allocator.CHOSEN_BY))
def test_whoever_sets_the_allocator_is_left_alone(name, monkeypatch):
    for chosen in allocator.CHOSEN_BY:
        monkeypatch.delenv(chosen, raising=False)
    allocator.keeps_freed.cache_clear()
    assert allocator.keeps_freed()
    monkeypatch.setenv(name, "1")
    allocator.keeps_freed.cache_clear()
    assert not allocator.keeps_freed()


@pytest.fixture(autouse=True)
def asked_anew():
    """The environment of the next test."""
    yield
    allocator.keeps_freed.cache_clear()
