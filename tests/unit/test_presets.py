"""The presets of conf/vae, and the page that lists them.

The repositories that they name are out of reach of a test. Each is composed and given, as its source, a tiny model of
the same class that ``save_pretrained`` wrote; test_configs.py runs a step of the example with it.
"""

import importlib.util
import re
from functools import cache

import pytest
import torch
from helpers import no_warnings
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from running import ROOT
from tiny_models import CONFIGS, STAND_INS, build, close, pictures, stand_in

from latentdm import FrozenVAE, InpaintEncoder
from latentdm.autoencoders import known_families

SOURCE = re.compile(r"^source: (?!\$)", re.MULTILINE)  # vae=pipeline has that of whatever is fine-tuned
LISTED = {path.stem: path for path in sorted((ROOT / "conf/vae").glob("*.yaml")) if SOURCE.search(path.read_text())}
PRESETS = {name: path for name, path in LISTED.items() if "source: pkg://" not in path.read_text()}
every_preset = pytest.mark.parametrize("preset", PRESETS)
DTYPES = {"sdxl_fp16_fix": "float16", "wan": "float32"}


def preset_config(preset, *overrides):
    """The preset alone: composed for the example it would take ten times as long, as test_configs.py does it."""
    with initialize_config_module("latentdm.conf", version_base="1.3"):
        return compose(f"vae/{preset}", overrides=list(overrides)).vae


def test_every_preset_has_a_stand_in():
    assert set(PRESETS) == set(STAND_INS)


@every_preset
def test_a_preset_says_how_to_run_it_and_where_it_comes_from(preset):
    command, note, *_ = PRESETS[preset].read_text(encoding="utf-8").splitlines()
    config = preset_config(preset)
    assert command == f"# python train_example.py vae={preset}"
    assert note.startswith(f"# {config.source}, ")
    assert any(access in note for access in (", open", ", gated: "))
    assert config.dtype == DTYPES.get(preset, "auto")
    assert config.source.count("/") == 1
    assert not config.encoder_only
    assert config.use_safetensors


@every_preset
def test_a_preset_loads_a_model_of_its_class(preset, tmp_path):
    expected = build(STAND_INS[preset])
    reference = FrozenVAE(expected, dtype="float32").encode(pictures(1), posterior="mode")
    for folder in (tmp_path / "alone", tmp_path / "pipeline" / "vae"):
        stand_in(preset, folder)
        source = folder.parent if folder.name == "vae" else folder
        with no_warnings():
            make = instantiate(preset_config(preset, f"vae.source={source}"))
            vae = InpaintEncoder(make).vae
        assert isinstance(vae, FrozenVAE)
        assert type(vae.module) is type(expected)
        if preset in DTYPES:
            assert vae.dtype == getattr(torch, DTYPES[preset])
        tolerance = 1e-6 if vae.dtype == torch.float32 else 0.08  # as test_dtypes.py allows half precision
        close(vae.encode(pictures(1), posterior="mode"), reference, tolerance)


@pytest.mark.parametrize("preset", ["sd15", "qwen_image"])
def test_options_of_loading_are_settings_of_a_preset(preset, tmp_path):
    overrides = [f"vae.source={stand_in(preset, tmp_path)}", "vae.encoder_only=true", "vae.dtype=float32"]
    vae = instantiate(preset_config(preset, *overrides))()
    assert not vae.can_decode
    assert vae.dtype == torch.float32


# ---------------------------------------------------------------- docs/autoencoders.md


@cache
def docs():
    spec = importlib.util.spec_from_file_location("autoencoders_page", ROOT / "docs/autoencoders.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def page():
    return docs().page()


def test_the_page_is_what_its_script_writes():
    assert (ROOT / "docs/autoencoders.md").read_text(encoding="utf-8") == page(), "run docs/autoencoders.py"


def test_the_page_lists_every_family_and_preset():
    for name in (*known_families(), *(f"vae={preset}" for preset in LISTED)):
        assert f"| {name} |" in page() or f"`{name}`" in page()
    published = docs().CONFIGS
    assert set(published) == set(LISTED)
    for preset in PRESETS:
        assert published[preset]["_class_name"] == CONFIGS[STAND_INS[preset]]["_class_name"]


def test_the_memory_of_stable_diffusions_vae_is_that_of_its_file():
    """sd-vae-ft-mse is a file of 335 MB in float32."""
    (row,) = [line for line in page().splitlines() if "`vae=sd15`:" in line]
    encoder, decoder = (int(cell) for cell in row.split("|")[-3:-1])
    assert (encoder + decoder) * 2**20 == pytest.approx(334.6e6, rel=0.005)
