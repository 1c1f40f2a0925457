"""``compile: true``: one graph for each shape of a chunk, whatever the stage, the epoch or the size of the last batch.

Counted by torch itself, on autoencoders so small that compiling takes seconds.
"""

import logging
import shutil

import pytest
import torch
from helpers import LatentModel, Photos, complains, images, no_warnings, photo_columns, quiet_trainer, tiny_kl
from lightning.pytorch import LightningDataModule
from tiny_models import close
from torch import nn
from torch.utils.data import DataLoader

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    # torch's compiler imports modules of its own that still use TorchScript
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]
SIDES = (16, 24, 32)


class Output:
    def __init__(self, latents):
        self.latents = latents


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, x):
        return nn.functional.silu(self.convolution(x))


class OneConvolution(nn.Module):
    """As an autoencoder of diffusers: ``encode`` calls ``encoder``."""

    spatial_compression = 8
    latent_channels = 4

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def encode(self, x):
        return Output(self.encoder(x))


class Buckets(LightningDataModule):
    """Batches of three sizes of image, the last of each with one image less."""

    def train_dataloader(self):
        batches = [
            {"pixels": images(count, side, side, seed=side), "index": torch.arange(count)}
            for side in SIDES
            for count in (3, 2)
        ]
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader


@pytest.fixture
def graphs():
    """How many graphs were compiled since the test began."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def said():
    """What Lightning's logger says, which a user sees without setting up any logging."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def one_convolution(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FrozenVAE(OneConvolution(), **settings)


def test_three_epochs_of_three_buckets_compile_once_a_shape(graphs):
    vae = one_convolution(compile=True)
    trainer, model = quiet_trainer(max_epochs=3), LatentModel()
    trainer.fit(model, datamodule=LatentDataModule(Buckets(), PlainEncoder(vae)))
    assert len(model.batches("train")) == len(model.batches("val")) == 3 * 6
    trainer.validate(model, datamodule=LatentDataModule(Buckets(), PlainEncoder(vae)), verbose=False)
    assert graphs() == len(SIDES)
    assert vae.chunks == 4 * 6 + 3 * 6 + 2  # each batch one chunk, two of them in the sanity check

    eager = PlainEncoder(one_convolution())
    for batch, pixels in zip(model.batches("train"), 3 * list(Buckets().train_dataloader()), strict=True):
        torch.testing.assert_close(batch["latents"], eager(pixels)["latents"], rtol=0, atol=1e-5)


def test_the_last_chunk_is_padded_and_cut(graphs):
    vae = one_convolution(compile=True)
    sizes = []
    vae.module.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    encoded = InpaintEncoder(vae, per_batch=4)({"pixels": images(5), "mask": torch.ones(1, 1, 32, 32)})
    assert sizes == [4, 4, 4]
    assert encoded["latents"].shape == encoded["masked_latents"].shape == (5, 4, 4, 4)
    expected = InpaintEncoder(one_convolution())({"pixels": images(5), "mask": torch.ones(1, 1, 32, 32)})
    for name in ("latents", "masked_latents"):
        torch.testing.assert_close(encoded[name], expected[name], rtol=0, atol=1e-5)
    assert graphs() == 1


def test_more_shapes_than_torch_would_compile(graphs):
    with torch._dynamo.config.patch(recompile_limit=2):  # 8 unless told
        vae = one_convolution(compile=True)
        for side in SIDES:
            PlainEncoder(vae)({"pixels": images(3, side, side)})
    assert graphs() == len(SIDES)


def test_a_real_autoencoder_keeps_its_keys_and_says_how_long_it_took(graphs, said):
    autoencoder = tiny_kl(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    keys = list(autoencoder.state_dict())
    vae = FrozenVAE(autoencoder, dtype="float32", compile=True)
    pixels = images(2, 8, 8) / 255
    expected = FrozenVAE(autoencoder, dtype="float32").encode(pixels, posterior="mode")
    encoded = [vae.encode(pixels, posterior="mode") for _ in range(2)]
    for latents in encoded:
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert list(vae.module.state_dict()) == keys
    assert graphs() == 1
    before, after = said
    assert before == "FrozenVAE: compiling for 2×3×8×8, once; this may take minutes"
    assert after.startswith("FrozenVAE: compiled for 2×3×8×8 and encoded, in ")


def test_memory_that_runs_out_shrinks_the_fixed_size(graphs):
    vae = one_convolution(compile=True)
    sizes = []

    def narrow(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    vae.module.encoder.register_forward_pre_hook(narrow)
    with pytest.warns(UserWarning, match="2 at a time"):
        PlainEncoder(vae)({"pixels": images(5)})
    assert sizes == [5, 2, 2, 2]


def test_memory_that_runs_out_while_compiling_shrinks_it_too(graphs, monkeypatch):
    """torch wraps what its compiler meets in an error of its own."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    run, full = GraphLowering.run, [True]

    def once(self, *args):
        if full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, *args)

    monkeypatch.setattr(GraphLowering, "run", once)
    vae = one_convolution(compile=True)
    with config.patch(fx_graph_cache=False), pytest.warns(UserWarning, match="out of memory: .* 2 at a time"):
        encoded = PlainEncoder(vae)({"pixels": images(4)})["latents"]
    assert vae.retries == 1
    assert graphs() == 1  # the second one, of half the size
    torch.testing.assert_close(encoded, PlainEncoder(one_convolution())({"pixels": images(4)})["latents"])


# -------------------------------------------------------------------- where it cannot


def test_without_a_compiler_it_runs_eagerly_and_says_so(graphs, said):
    from torch._inductor import config

    vae, expected = one_convolution(compile=True), one_convolution().encode(images(2) / 255)
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.warns(UserWarning, match="FrozenVAE: compile has no effect.*install a C.. compiler"):
            encoded = vae.encode(images(2) / 255)
        with no_warnings():
            close(vae.encode(images(2) / 255), encoded)
            close(vae.encode(images(1) / 255), encoded[:1])
    assert len(said) == 1  # that it was compiling, before it failed
    close(encoded, expected)


def test_what_cannot_be_compiled_is_said_at_once():
    class NoEncoder(nn.Module):
        spatial_compression = 8
        latent_channels = 4

        def encode(self, x):
            raise NotImplementedError

    with pytest.warns(UserWarning, match="compile=True has no effect: NoEncoder has no encoder of its own"):
        FrozenVAE(NoEncoder(), compile=True)
    with pytest.warns(UserWarning, match="compile=True has no effect: tiles"):
        FrozenVAE(tiny_kl(), compile=True, tiling="always")
    with complains("FrozenVAE: compile must be true, false or one of default, reduce-overhead", "got 'fast'"):
        FrozenVAE(tiny_kl(), compile="fast")


def test_without_the_option_nothing_is_compiled(graphs):
    LatentDataModule(Photos(photo_columns()), PlainEncoder(one_convolution())).encode({"pixels": images(2)}, "cpu")
    assert graphs() == 0


def test_a_small_first_batch_does_not_make_the_chunks_small(graphs):
    vae = one_convolution(compile=True)
    encoder, sizes = PlainEncoder(vae, per_batch=8), []
    vae.module.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for count in (1, 8, 20, 5, 1):  # a sanity check first, and a last batch that is smaller
        encoder({"pixels": images(count)})
    assert sizes == [1, 8, 8, 8, 8, 8, 1]
    assert graphs() == 2
