"""When memory runs out: smaller chunks, the same latents, one message; and no other error is retried."""

import warnings
from itertools import chain, repeat

import pytest
import torch
from helpers import complains, images, masks, no_warnings, tiny_kl
from tiny_models import close

from latentdm import FrozenVAE, InpaintEncoder, PlainEncoder
from latentdm.frozen.chunks import is_out_of_memory

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError,
    "cpu allocator": lambda: RuntimeError(CPU_TEXT),
}


class Narrow:
    """Stands before an autoencoder's encoder: above so many images, or pixels of one image, memory runs out."""

    def __init__(self, autoencoder, fits, pixels=None, error=ERRORS["torch"]):
        self.fits, self.pixels, self.error, self.seen = fits, pixels, error, []
        autoencoder.encoder.register_forward_pre_hook(self)

    def __call__(self, module, args):
        (x,) = args
        self.seen.append(len(x))
        if len(x) > self.fits or (self.pixels is not None and x[0, 0].numel() > self.pixels):
            raise self.error()


def narrow(fits=10**6, pixels=None, error=ERRORS["torch"], dtype="float32", **settings):
    autoencoder = tiny_kl(sample_size=settings.pop("tile", 32))
    gate = Narrow(autoencoder, fits, pixels, error)
    return FrozenVAE(autoencoder, dtype=dtype, **settings), gate


def batch_of(count=8, side=32):
    return {"pixels": images(count, side, side), "mask": masks(count, side, side), "index": torch.arange(count)}


def encode(vae, kind=PlainEncoder, batch=None, **settings):
    return kind(vae, **settings)(batch or batch_of())


# -------------------------------------------------------------------- smaller chunks


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("fits", "tried"), [(8, [8]), (7, [8, 4, 4]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2] + 8 * [1])]
)
def test_the_chunk_is_halved_until_it_fits(fits, tried, error):
    vae, gate = narrow(fits, error=ERRORS[error])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoded = encode(vae)["latents"]
    assert gate.seen == tried
    assert vae.retries == sum(size > fits for size in tried)
    assert vae.chunks == len(tried) - vae.retries
    size = tried[-1]
    assert len(said) == (vae.retries > 0)
    if said:
        text = str(said[0].message)
        assert all(part in text for part in ("out of memory", "32×32 in float32", f"per_batch={size}"))
    # the same chunk shapes give the same bits, others the same numbers
    gate.fits = 8
    assert torch.equal(encoded, encode(vae, per_batch=size)["latents"])
    torch.testing.assert_close(encoded, encode(narrow()[0])["latents"], rtol=0, atol=1e-5)


def test_what_was_encoded_before_keeps_its_bits():
    vae, gate = narrow()
    whole = encode(vae, InpaintEncoder, per_batch=8)
    gate.seen.clear()
    room = chain([8], repeat(2))

    def shrink(module, args):
        gate.fits = next(room)

    vae.module.encoder.register_forward_pre_hook(shrink, prepend=True)
    with pytest.warns(UserWarning, match="per_batch=2"):
        encoded = encode(vae, InpaintEncoder, per_batch=8)
    assert gate.seen == [8, 8, 4, 2, 2, 2, 2]
    assert torch.equal(encoded["latents"], whole["latents"])
    torch.testing.assert_close(encoded["masked_latents"], whole["masked_latents"], rtol=0, atol=1e-5)


def test_the_limit_is_remembered_for_this_size_of_image():
    vae, gate = narrow(2)
    with pytest.warns(UserWarning, match="2 at a time"):
        encode(vae)
    gate.seen.clear()
    with no_warnings():
        encode(vae)
    assert gate.seen == [2, 2, 2, 2]
    assert vae.retries == 2
    gate.seen.clear()
    gate.fits = 8
    with no_warnings():
        encode(vae, batch=batch_of(8, side=16))
        encode(vae, per_batch=1)
    assert gate.seen == [8] + 8 * [1]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_no_other_error_is_retried(error):
    def fail():
        return error

    vae, gate = narrow(1, error=fail)
    with no_warnings(), pytest.raises(type(error)) as caught:
        encode(vae)
    assert caught.value is error
    assert gate.seen == [8]
    assert vae.retries == 0


def test_the_real_allocator_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert type(caught.value) is RuntimeError
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory. Compile with TORCH_USE_CUDA_DSA"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("the words out of memory alone do not do"))


@pytest.mark.parametrize("per_batch", [8, 2])
def test_no_more_than_a_chunk_is_prepared(per_batch):
    """What sets the peak is per_batch: nothing but the latents, which are small, is ever made for the whole batch."""
    largest = []
    vae, _ = narrow()
    vae.module.encoder.register_forward_pre_hook(
        lambda module, args: largest.append(args[0].untyped_storage().nbytes())
    )
    encode(vae, batch=batch_of(16), per_batch=per_batch)
    assert set(largest) == {per_batch * 3 * 32 * 32 * 4}


# -------------------------------------------------------------------- below one image


def test_not_even_one_image_is_an_error_with_the_way_out():
    vae, gate = narrow(0)
    with complains(
        "FrozenVAE: not even one image of 32×32 fits in memory for AutoencoderKL in float32",
        "smaller images or dtype=bfloat16 or tiling=last_resort",
        "Tried to allocate 2.00 GiB",
        error=torch.OutOfMemoryError,
    ):
        encode(vae)
    assert gate.seen == [8, 4, 2, 1]


def test_tiles_are_the_last_resort_and_only_if_allowed():
    vae, gate = narrow(pixels=32 * 32, tiling="last_resort")
    with pytest.warns(UserWarning, match="64×64 in float32: they are tiled from now on.*changes their latents") as said:
        tiled = encode(vae, batch=batch_of(2, side=64))["latents"]
    assert len(said) == 1
    assert tiled.shape == (2, 4, 8, 8)
    assert not vae.module.use_tiling
    with no_warnings():
        again = encode(vae, batch=batch_of(2, side=64))["latents"]
    assert torch.equal(again, tiled)
    assert vae.retries == 2
    always, gate = narrow(tiling="always")
    close(encode(always, batch=batch_of(2, side=64), per_batch=1)["latents"], tiled)
    assert gate.seen
    whole = encode(narrow()[0], batch=batch_of(2, side=64))["latents"]
    assert not torch.allclose(whole, tiled, rtol=0, atol=1e-3)
    small = batch_of(2, side=32)
    with no_warnings():  # what fits is not tiled
        close(encode(vae, batch=small)["latents"], encode(narrow()[0], batch=small)["latents"])


@pytest.mark.parametrize("tiling", ["last_resort", "always"])
def test_tiles_that_do_not_fit_are_an_error(tiling):
    vae, _ = narrow(0, tiling=tiling)
    with complains("not even one image of 64×64", ", tiled; use smaller images or", error=torch.OutOfMemoryError):
        encode(vae, batch=batch_of(1, side=64))


def test_wrong_settings_are_named():
    with complains("FrozenVAE: tiling must be one of never, last_resort, always, got 'sometimes'"):
        FrozenVAE(tiny_kl(), tiling="sometimes")
    with complains("FrozenVAE: tiling=always, but Plain has none; set never"):
        FrozenVAE(Plain(), tiling="always")


class Plain(torch.nn.Module):
    spatial_compression = 8
    latent_channels = 4

    def encode(self, x):
        raise NotImplementedError
