"""How many images are encoded at once where nobody says: ``per_batch: null``."""

import pytest
import torch
from helpers import images, tiny_kl

from latentdm import FrozenVAE, PlainEncoder
from latentdm.frozen.chunks import CACHE_BYTES, MAX_IMAGES_ON_CPU, best_chunk

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("image_bytes", "expected"),
    [
        (CACHE_BYTES, 1),
        (CACHE_BYTES // 2, 2),
        (CACHE_BYTES // 4, 4),
        (CACHE_BYTES // 3, 3),
        (10 * CACHE_BYTES, 1),  # one image always goes through
        (1, MAX_IMAGES_ON_CPU),
        (0, MAX_IMAGES_ON_CPU),  # no convolution, no activations
    ],
)
def test_a_chunk_fills_the_cache_of_a_cpu(image_bytes, expected):
    assert best_chunk(CPU, image_bytes) == expected


@pytest.mark.parametrize("image_bytes", [1, 10 * CACHE_BYTES])
def test_an_accelerator_is_given_the_whole_batch(image_bytes):
    assert best_chunk(torch.device("cuda"), image_bytes) is None


@pytest.fixture
def tried(monkeypatch):
    """An autoencoder whose cache holds two images of 32² in float32, and the sizes of its chunks."""
    autoencoder, sizes = tiny_kl(), []
    channels = autoencoder.encoder.conv_in.out_channels
    monkeypatch.setattr("latentdm.frozen.chunks.CACHE_BYTES", 2 * 2 * channels * 32 * 32 * 4)
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
