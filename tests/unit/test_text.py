"""Prompt embeddings are those of the pipelines' own ``encode_prompt``."""

import shutil
import warnings

import pytest
import torch
from helpers import complains, no_warnings
from tiny_models import close
from tiny_pipelines import LENGTH, clip_text, clip_tokenizer, tiny_pipeline

from latentdm import TextEncoder
from latentdm.draws import Draws
from latentdm.text.tokens import Tokenizer

LONG = "a photo of the red house " * 200
CAPTIONS = ["a photo of a cat", "", "ждун сидит, 猫 🐈", "The RED house's  dog", LONG]
DRAWS = Draws(0, 0, list(range(len(CAPTIONS))))
cut = pytest.mark.filterwarnings("ignore:TextEncoder. a caption of:UserWarning")


@pytest.fixture(autouse=True)
def without_gradients():
    """As a pipeline's call has it: with gradients torch takes other kernels."""
    with torch.no_grad():
        yield


def run(text, captions):
    """The two stages one after the other, as a data module runs them."""
    draws = Draws(0, 0, list(range(len(captions))))
    batch = {"caption": captions}
    batch |= text.tokenizer(batch, draws)
    assert set(batch) == {"caption", *text.tokenizer.writes}
    assert all(batch[name].dtype == torch.int64 for name in text.tokenizer.writes)
    written = text(batch, draws)
    assert tuple(written) == text.writes
    return written


@cut
@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_stable_diffusion_gets_its_pipelines_embeddings(name, folders):
    text = TextEncoder.from_pretrained(folders[name], dtype="float32")
    expected, empty = tiny_pipeline(name).encode_prompt(CAPTIONS, "cpu", 1, True)
    written = run(text, CAPTIONS)
    close(written["prompt_embeds"], expected)
    assert written["prompt_embeds"].shape == (len(CAPTIONS), LENGTH, 16)
    close(written["prompt_embeds"][1:2], empty[:1])
    close(text.encode([""])["prompt_embeds"], empty[:1])


@cut
def test_sdxl_gets_its_pipelines_embeddings_and_zeros_for_empty_captions(folders):
    pipeline = tiny_pipeline("sdxl")
    prompt, empty, pooled, pooled_empty = pipeline.encode_prompt(CAPTIONS, device="cpu")
    expected = {"prompt_embeds": prompt.clone(), "pooled_prompt_embeds": pooled.clone()}
    expected["prompt_embeds"][1], expected["pooled_prompt_embeds"][1] = empty[1], pooled_empty[1]
    assert not empty.any()
    written = run(TextEncoder.from_pretrained(folders["sdxl"], dtype="float32"), CAPTIONS)
    for key, embeddings in expected.items():
        close(written[key], embeddings)

    written = run(TextEncoder.from_pretrained(folders["sdxl"], dtype="float32", zero_empty=False), CAPTIONS)
    close(written["prompt_embeds"], prompt)
    close(written["pooled_prompt_embeds"], pooled)


def test_the_pipelines_config_decides_what_an_empty_caption_gives(tmp_path):
    pipeline = tiny_pipeline("sdxl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    _, empty, _, pooled_empty = pipeline.encode_prompt(["a cat"], device="cpu")
    written = run(TextEncoder.from_pretrained(tmp_path, dtype="float32"), [""])
    assert empty.any()
    close(written["prompt_embeds"], empty)
    close(written["pooled_prompt_embeds"], pooled_empty)


@cut
@pytest.mark.parametrize("max_length", [None, 40])
def test_flux_gets_its_pipelines_embeddings(max_length, folders):
    text = TextEncoder.from_pretrained(folders["flux_fill"], dtype="float32", max_length=max_length)
    length = max_length or 512
    prompt, pooled, _ = tiny_pipeline("flux_fill").encode_prompt(CAPTIONS, max_sequence_length=length, device="cpu")
    written = run(text, CAPTIONS)
    assert written["prompt_embeds"].shape == (len(CAPTIONS), length, 24)
    close(written["prompt_embeds"], prompt)
    close(written["pooled_prompt_embeds"], pooled)


@pytest.mark.parametrize("name", ["sd15", "flux_fill"])
def test_a_caption_that_is_cut_warns_once(name, folders):
    text = TextEncoder.from_pretrained(folders[name], dtype="float32")
    with no_warnings():
        text.tokenizer({"caption": ["a cat"]}, DRAWS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            text.tokenizer({"caption": ["a cat", LONG]}, DRAWS)
    [warning] = caught
    assert f"cut to the {LENGTH}" in str(warning.message)
    assert "'a photo of the red" in str(warning.message)


def test_none_is_an_empty_caption(folders):
    tokenizer = TextEncoder.from_pretrained(folders["sd15"]).tokenizer
    tokens = tokenizer({"caption": [None, ""]}, DRAWS)["caption_tokens"]
    assert torch.equal(tokens[0], tokens[1])


# ---------------------------------------------------------------- frozen, in a dtype of its own


def test_weights_are_loaded_in_setup_frozen_and_in_their_dtype(folders):
    text = TextEncoder.from_pretrained(folders["sd15"], dtype="bfloat16")
    assert repr(text) == "TextEncoder(not loaded yet on cpu, family='clip')"
    text.setup("cpu")
    assert repr(text) == "TextEncoder(bfloat16 on cpu, family='clip')"
    assert text.dtype == torch.bfloat16
    assert text.device == torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        outside = run(text, ["a red cat"])["prompt_embeds"]
    assert outside.dtype == torch.float32
    assert not outside.requires_grad
    assert torch.equal(outside, run(text, ["a red cat"])["prompt_embeds"])
    assert torch.equal(outside, outside.bfloat16().float())


def test_a_module_that_is_handed_over_is_frozen_and_in_eval_mode():
    tokenizer = clip_tokenizer()
    encoder = clip_text(tokenizer).train()
    text = TextEncoder([tokenizer], [encoder], "clip", dtype="float32")
    text.setup("cpu")
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_no_inference_tensor_reaches_training(folders):
    text = TextEncoder.from_pretrained(folders["sdxl"], dtype="float32")
    with torch.inference_mode():
        batch = {"caption": ["a cat"]}
        tokens = {name: ids.clone() for name, ids in text.tokenizer(batch, DRAWS).items()}
        assert all(ids.is_inference() for ids in tokens.values())
        written = text(tokens, DRAWS)
    weight = torch.ones((), requires_grad=True)
    for embeddings in written.values():
        assert not embeddings.is_inference()
        with torch.enable_grad():
            (embeddings * weight).sum().backward()


def test_the_device_stage_drops_what_the_host_stage_wrote(folders):
    text = TextEncoder.from_pretrained(folders["flux_fill"])
    assert text.tokenizer.on_host
    assert not text.on_host
    assert text.tokenizer.reads == ("caption",)
    assert text.reads == text.drops == text.tokenizer.writes == ("caption_tokens", "caption_tokens_2")
    assert text.writes == ("prompt_embeds", "pooled_prompt_embeds")


# ---------------------------------------------------------------- wrong use


def test_batches_without_captions_are_told_what_to_do(folders):
    text = TextEncoder.from_pretrained(folders["sd15"])
    with complains("TextEncoder", "no 'caption'", "'pixels'", "keys={caption"):
        text.tokenizer({"pixels": 1}, DRAWS)
    with complains("list of strings", "got str"):
        text.tokenizer({"caption": "a cat"}, DRAWS)
    with complains("captions=dropout", "['a', 'b']"):
        text.tokenizer({"caption": [["a", "b"]]}, DRAWS)
    with complains("'caption_tokens'", "tokenizer stage"):
        text({"caption": ["a"]}, DRAWS)


def test_settings_are_checked(folders):
    with complains("TextEncoder: dtype must be one of", "'half'"):
        TextEncoder.from_pretrained(folders["sd15"], dtype="half")
    with complains("max_length=40 is for T5", "24"):
        TextEncoder.from_pretrained(folders["sd15"], max_length=40)
    with complains("max_length must be an integer in 1…512, got 513"):
        TextEncoder.from_pretrained(folders["flux_fill"], max_length=513)
    with complains("family must be one of clip, sdxl, flux"):
        TextEncoder([], [], "t5")
    tokenizer = clip_tokenizer()
    encoder = clip_text(tokenizer)
    encoder.config.use_attention_mask = True
    with complains("use_attention_mask"):
        TextEncoder([tokenizer], [encoder], "clip")


def test_a_source_that_is_no_pipeline_is_told_before_anything_loads(tmp_path):
    with complains("TextEncoder: no pipeline at", "no model_index.json"):
        TextEncoder.from_pretrained(tmp_path)
    with complains("single file", "from_single_file"):
        TextEncoder.from_pretrained("model.safetensors")


def test_a_pipeline_that_lacks_a_part_is_told_before_anything_loads(folders, tmp_path):
    for part in ("tokenizer", "text_encoder_2"):
        folder = shutil.copytree(folders["sdxl"], tmp_path / part)
        shutil.rmtree(folder / part)
        with complains("TextEncoder", str(folder), "StableDiffusionXLPipeline", f"folder {part}/ is not there"):
            TextEncoder.from_pretrained(folder)


def test_weights_that_do_not_fit_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["sd15"], tmp_path / "pipeline")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
    with complains("TextEncoder", "text_encoder' do not fit CLIPTextModel: 1 mismatched keys", "q_proj.weight"):
        TextEncoder.from_pretrained(folder).setup("cpu")
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with complains("TextEncoder", "text_encoder' do not fit CLIPTextModel: 1 missing keys", "q_proj.weight"):
        TextEncoder.from_pretrained(folder).setup("cpu")
    file.write_bytes(file.read_bytes()[:500])
    with complains("TextEncoder", "text_encoder' has a config but no weights that can be loaded", "header"):
        TextEncoder.from_pretrained(folder).setup("cpu")


def test_an_unknown_kind_of_text_encoder_is_told_what_is_known(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "pipeline")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPTextModel", "Qwen2Model"))
    with complains("Qwen2Model", "CLIPTextModel + T5EncoderModel"):
        TextEncoder.from_pretrained(folder)


def test_a_missing_package_is_answered_with_the_extra(folders, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with complains("TextEncoder needs the package 'transformers'", "latentdm[finetune]", error=ImportError):
        TextEncoder.from_pretrained(folders["sd15"])


def test_a_tokenizer_is_a_stage_of_its_own():
    tokenizer = Tokenizer([clip_tokenizer()], [LENGTH])
    tokens = tokenizer({"caption": ["a cat"]}, DRAWS)
    assert tokens["caption_tokens"].shape == (1, LENGTH)
    assert tokens["caption_tokens"].device.type == "cpu"
