"""Autoencoders from folders, single files and a hub's cache; and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import complains, no_warnings
from safetensors.torch import load_file, save_file
from test_family_registry import HalvedAutoencoder
from tiny_models import CONFIGS, build, close, pictures

from latentdm import FrozenVAE, register_family
from latentdm.autoencoders import Family, Normalization
from latentdm.autoencoders.families import CLASSES, FAMILIES
from latentdm.errors import UserError

PIXELS = pictures(1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(name, folder, **settings):
    build(name).save_pretrained(folder, **settings)
    return folder


def load(source, **settings):
    return FrozenVAE.from_pretrained(source, dtype="float32", **settings)


def same(vae, name="kl"):
    """Encodes and decodes as the model that was saved."""
    expected = FrozenVAE(build(name), dtype="float32")
    encoded = expected.encode(PIXELS, posterior="mode")
    close(vae.encode(PIXELS, posterior="mode"), encoded)
    if vae.can_decode:
        close(vae.decode(encoded), expected.decode(encoded))
    return True


@pytest.fixture
def folder(tmp_path):
    return save("kl", tmp_path / "kl")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_from_save_pretrained(name, tmp_path):
    folder = save(name, tmp_path)
    with no_warnings():
        whole, half = load(folder), load(str(folder), encoder_only=True)
    assert type(whole.module) is type(build(name))
    assert same(whole, name)
    assert same(half, name)
    assert not half.can_decode


def test_loading_leaves_the_global_generator_alone(tmp_path):
    folder = save("vq", tmp_path)
    before = torch.get_rng_state()
    load(folder)
    load(folder / WEIGHTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pipeline_gives_its_vae(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    save("kl", tmp_path / "vae")
    save("tiny", tmp_path / "other")
    assert same(load(tmp_path))
    assert same(load(tmp_path, subfolder="vae"))
    assert same(load(tmp_path, subfolder="other"), "tiny")


def test_a_folder_that_holds_an_autoencoder_needs_no_subfolder(folder):
    """So that a preset with subfolder: vae can be pointed at it."""
    assert same(load(folder, subfolder="vae"))
    save("tiny", folder / "vae")
    assert same(load(folder, subfolder="vae"), "tiny")
    assert same(load(folder))


def test_weights_in_several_files(tmp_path):
    save("kl", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(load(tmp_path))


def test_weights_of_a_variant(tmp_path):
    folder = save("kl", tmp_path, variant="fp16")
    assert [file.name for file in folder.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert same(load(folder, variant="fp16"))
    with complains("no weights that can be loaded", "set variant: fp16"):
        load(folder)
    with complains("no weights that can be loaded with variant='bf16'", "leave variant out", error=UserError):
        load(folder, variant="bf16")
    with complains("variant='fp16' is for a folder or a hub id"):
        load(folder / "diffusion_pytorch_model.fp16.safetensors", variant="fp16")


def test_weights_stored_in_half_precision_load_as_they_are(tmp_path):
    build("kl").half().save_pretrained(tmp_path)
    expected = FrozenVAE(build("kl").half().float(), dtype="float32").encode(PIXELS, posterior="mode")
    close(load(tmp_path).encode(PIXELS, posterior="mode"), expected)


def test_attention_under_its_old_names(folder):
    """As in stabilityai/sd-vae-ft-mse."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): w for key, w in weights.items()}
    assert any(".query." in key for key in weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert same(load(folder))
    assert same(load(folder / WEIGHTS))


# ---------------------------------------------------------------- a hub, by its cache


# diffusers hands huggingface_hub an argument that it no longer takes
offline = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with the repositories ``someone/vae`` and ``someone/pipeline``, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def add(repository, revision, name, subfolder=""):
        root = tmp_path / f"models--{repository.replace('/', '--')}"
        commit = f"{abs(hash((revision, name))):040x}"[:40]
        save(name, root / "snapshots" / commit / subfolder)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)

    add("someone/vae", "main", "kl")
    add("someone/vae", "v2", "tiny")
    add("someone/pipeline", "main", "flux2", subfolder="vae")
    return add


@offline
def test_a_hub_id_with_revision_and_subfolder(hub):
    assert same(load("someone/vae"))
    assert same(load("someone/vae", revision="v2"), "tiny")
    assert same(load("someone/pipeline", subfolder="vae"), "flux2")


@offline
def test_a_pipeline_on_a_hub_gives_its_vae(hub):
    assert same(load("someone/pipeline"), "flux2")


@offline
def test_a_hub_id_that_is_not_there(hub):
    with complains("no autoencoder at 'someone/else'", "hub id", ".safetensors"):
        load("someone/else")
    with complains("no autoencoder at 'someone/vae'"):
        load("someone/vae", revision="v3")
    with complains("no autoencoder at 'someone/vae/unet'"):
        load("someone/vae", subfolder="unet")


# ---------------------------------------------------------------- single files


def published(state):
    """A KL's weights under the names of the files that Stable Diffusion was published in."""
    renames = [
        (r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    result = {}
    for key, weight in state.items():
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", key)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        result[name] = weight[:, :, None, None] if "attn_1" in name and weight.ndim == 2 else weight
    return {key: weight.contiguous() for key, weight in result.items()}


def test_a_single_file_with_its_config_beside_it(folder):
    assert same(load(folder / WEIGHTS))
    assert same(load(str(folder / WEIGHTS), encoder_only=True))


@pytest.mark.parametrize("name", ["flux2", "wan", "dc", "tiny", "hunyuan_image"])
def test_a_single_file_of_another_family(name, tmp_path):
    assert same(load(save(name, tmp_path) / WEIGHTS), name)


@pytest.mark.parametrize("names", [published, dict], ids=["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_single_file_as_it_was_published(prefix, names, folder, tmp_path):
    weights = {prefix + key: weight for key, weight in names(build("kl").state_dict()).items()}
    if prefix:
        weights["model.diffusion_model.out.2.weight"] = torch.zeros(3)
    file = tmp_path / "v1-5-pruned.safetensors"
    save_file(weights, file)
    for config in (folder, folder / "config.json", str(folder)):
        assert same(load(file, config=config))


def test_a_single_file_without_a_config(folder, tmp_path):
    file = (folder / WEIGHTS).rename(tmp_path / "lone.safetensors")
    with complains(
        "lone.safetensors", "needs a config", "config.json beside the file", "config: a folder or a JSON file"
    ):
        load(file)
    with complains("needs a config", "nowhere"):
        load(file, config=tmp_path / "nowhere")


def test_a_single_file_that_does_not_fit(folder, tmp_path):
    file, weights = folder / WEIGHTS, load_file(folder / WEIGHTS)
    for change, complaint in (
        ({"quant_conv.bias": None}, "1 missing keys, the first 'quant_conv.bias'"),
        ({"encoder.extra": torch.zeros(1)}, "1 unexpected keys, the first 'encoder.extra'"),
        ({"quant_conv.bias": torch.zeros(3)}, "size mismatch for quant_conv.bias"),
        (dict.fromkeys(weights) | {"x": torch.zeros(1)}, "missing keys"),
    ):
        changed = {key: weight for key, weight in (weights | change).items() if weight is not None}
        save_file(changed, file)
        with complains("do not fit AutoencoderKL", complaint):
            load(file)
    with complains("no file", "gone.safetensors"):
        load(tmp_path / "gone.safetensors")
    save_file({"x": torch.zeros(1)}, save("hunyuan_image", tmp_path / "h") / WEIGHTS)
    with complains("do not fit AutoencoderKLHunyuanImage", "missing keys"):
        load(tmp_path / "h" / WEIGHTS)


# ---------------------------------------------------------------- what is refused


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_tiny_autoencoder_is_not_made_of_the_weights_of_a_kl(folder):
    """`AutoencoderTiny.from_pretrained` would return random weights."""
    edit(folder, _class_name="AutoencoderTiny")
    for source in (folder, folder / WEIGHTS):
        with complains("do not fit AutoencoderTiny", "missing keys"):
            load(source)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quant_conv.bias": None}, "1 missing keys, the first 'quant_conv.bias'"),
        ({"quant_conv.bias": None, "decoder.conv_in.bias": None}, "2 missing keys, the first 'decoder.conv_in.bias'"),
        ({"encoder.extra": torch.zeros(1)}, "1 unexpected keys, the first 'encoder.extra'"),
        ({"quant_conv.bias": torch.zeros(3)}, "quant_conv.bias"),
    ],
    ids=["missing", "two missing", "unexpected", "another size"],
)
@pytest.mark.parametrize("encoder_only", [False, True])
def test_weights_that_do_not_fit(change, complaint, encoder_only, folder):
    weights = load_file(folder / WEIGHTS) | change
    weights = {key: weight for key, weight in weights.items() if weight is not None}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with complains("do not fit AutoencoderKL", complaint, str(folder)):
        load(folder, encoder_only=encoder_only)


@pytest.mark.parametrize("name", ["AutoencoderKLMochi", "ConsistencyDecoderVAE", "UNet2DModel", None])
def test_a_class_that_is_not_known(name, folder):
    edit(folder, _class_name=name)
    for source in (folder, folder / WEIGHTS):
        with complains(repr(name), "AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL", "register_family"):
            load(source)


def test_pickles_are_loaded_when_asked_for_only(tmp_path):
    folder = save("kl", tmp_path, safe_serialization=False)
    (pickle,) = folder.glob("*.bin")
    with complains(str(folder), "only pickled weights (diffusion_pytorch_model.bin)", "use_safetensors: false"):
        load(folder)
    with complains(str(pickle), "only pickled weights (diffusion_pytorch_model.bin)", "use_safetensors: false"):
        load(pickle)
    assert same(load(folder, use_safetensors=False))
    assert same(load(pickle, use_safetensors=False))


def test_pickles_beside_safetensors_are_passed_over(folder):
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    assert same(load(folder))


@pytest.mark.parametrize("source", ["pkg://latentdm.demo", "pkg://latent_dm.demo_vae", "pkg://json.decoder", "pkg://"])
def test_a_package_that_is_not_there(source):
    with complains(repr(source), "names no installed package"):
        load(source)


def test_nothing_is_there(tmp_path, folder):
    with complains("no autoencoder at", str(tmp_path / "empty"), "folder with config.json"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")
    (folder / WEIGHTS).unlink()
    with complains(str(folder), "has a config but no weights"):
        load(folder)
    with complains("config=", "single file"):
        load(folder, config=folder)


# ---------------------------------------------------------------- classes of one's own


def test_a_registered_class_is_found_by_from_pretrained(folder, monkeypatch):
    monkeypatch.setattr("latentdm.autoencoders.families.FAMILIES", dict(FAMILIES))
    monkeypatch.setattr("latentdm.autoencoders.families.CLASSES", dict(CLASSES))

    class Finetuned(type(build("kl"))):
        pass

    edit(folder, _class_name="Finetuned")
    register_family(Finetuned, FAMILIES["AutoencoderKL"])
    vae = load(folder)
    assert type(vae.module) is Finetuned
    assert same(vae)
    register_family(
        "HalvedAutoencoder",
        Family(lambda _: 2, lambda _: 3, lambda _: Normalization(), has_posterior=False),
    )
    edit(folder, _class_name=HalvedAutoencoder.__name__)
    with complains("HalvedAutoencoder", "diffusers", "does not have", "pass it to latentdm.register_family itself"):
        load(folder)


def test_a_config_file_serves_as_a_config(folder):
    for config in (folder, folder / "config.json", CONFIGS["kl"]):
        vae = FrozenVAE.from_config(config, seed=3, dtype="float32")
        assert vae.class_name == "AutoencoderKL"
    assert Path(folder / "config.json").exists()
