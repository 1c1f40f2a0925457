"""Text embeddings from the cache: those of the encoder, encoded once for each caption."""

import pytest
import torch
from helpers import LatentModel, Photos, fit, photo_columns, tiny_kl

from latentdm import Cache, FrozenVAE, LatentDataModule, PlainEncoder, TextEncoder

CAPTIONS = ["a red house", "a cat", "", "a red house"]


class Told(LatentModel):
    """Keeps how many captions its text encoder has seen."""

    def __init__(self, text):
        super().__init__("prompt_embeds")
        self.encoded = 0
        for encoder in text.encoders:
            encoder.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, inputs, named):
        self.encoded += len(inputs[0] if inputs else named["input_ids"])


def run(folder, cache, captions=CAPTIONS, epochs=2, dtype="float32"):
    text = TextEncoder.from_pretrained(folder, dtype=dtype)
    pixels = Photos(photo_columns(len(captions), caption=captions), 2)
    vae = FrozenVAE(tiny_kl(), dtype="float32")
    datamodule = LatentDataModule(pixels, PlainEncoder(vae), text=text, cache=cache)
    model = Told(text)
    fit(datamodule, model, max_epochs=epochs, limit_val_batches=0)
    return model


@pytest.mark.filterwarnings("ignore:Cache. not cached. Photos:UserWarning")  # its images; captions are
@pytest.mark.parametrize(("name", "encoders"), [("sd15", 1), ("sdxl", 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_caption_is_encoded_once(folders, tmp_path, name, encoders, dtype):
    without = run(folders[name], None, dtype=dtype)
    assert without.encoded == 2 * len(CAPTIONS) * encoders
    cached = run(folders[name], Cache(tmp_path / "cache"), dtype=dtype)
    assert cached.encoded <= 4 * encoders
    again = run(folders[name], Cache(tmp_path / "cache"), dtype=dtype)
    assert again.encoded == 0
    keys = [key for key in ("prompt_embeds", "pooled_prompt_embeds") if key in without.batches("train")[0]]
    assert len(keys) == encoders
    for key in keys:
        for model in (cached, again):
            for epoch in range(2):
                expected, found = without.column("train", key, epoch), model.column("train", key, epoch)
                torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == "float32" else 0.02, atol=0.02)
                assert found.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Cache. not cached. Photos:UserWarning")
def test_another_encoder_or_caption_misses(folders, tmp_path):
    cache = Cache(tmp_path / "cache")
    run(folders["sd15"], cache)
    assert run(folders["sd15"], Cache(tmp_path / "cache"), ["another", *CAPTIONS[1:]]).encoded == 1
    assert run(folders["sd15"], Cache(tmp_path / "cache"), dtype="bfloat16").encoded > 0
    assert run(folders["sdxl"], Cache(tmp_path / "cache")).encoded > 0
