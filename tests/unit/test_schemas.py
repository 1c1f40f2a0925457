"""The schemas are those of the signatures; what a signature may hold; a typo in a group is found at composition."""

import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from running import ROOT

from scripts.generate_schemas import FILE, entry, field_type, generated, wrapped

CONF = ROOT / "conf"


def test_the_signatures_are_those_of_the_classes():
    assert FILE.read_text(encoding="utf-8") == generated(CONF), "run: make schemas"


def test_every_class_of_ours_in_a_config_has_a_schema():
    for path in CONF.rglob("*.yaml"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        plain = [line for line in lines if line.startswith("_target_: latentdm")]
        assert not plain, f"{path}: instead of _target_, add to its defaults: /latentdm/schema/<class>@_here_"


def test_a_new_config_asks_for_its_schema_by_the_path_of_the_class(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "own.yaml").write_text(
        "# Mine.\ndefaults:\n  - /latentdm/schema/Augment@_here_\n  - _self_\n"
    )
    assert '"Augment": {\n        "flip": (float, 0.0),' in generated(tmp_path)
    assert '"masks/BatchMask": {\n    },\n' in entry("masks/BatchMask")


def test_a_constructor_is_left_to_whom_its_result_serves():
    assert '"_partial_": (bool, True), "source": (str, MISSING)' in entry("FrozenVAE/from_pretrained")
    assert "_partial_" not in entry("PlainEncoder")


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"/latentdm/schema/masks/RandomMusk: there is no latentdm\.masks\.RandomMusk"):
        entry("masks/RandomMusk")


def test_a_default_that_no_config_can_hold_is_named(monkeypatch):
    import latentdm

    def target(shape=object):
        """Its default is a class."""

    monkeypatch.setattr(latentdm, "target", target, raising=False)
    with pytest.raises(ValueError, match=r"latentdm\.target: the default of shape is <class 'object'>"):
        entry("target")


TYPES = {
    int: "int",
    float | None: "float | None",
    bool | str: "bool | str",
    Path: "str",
    str | os.PathLike[str] | None: "str | None",
    Literal["sample", "mode"]: "str",
    Sequence[float]: "list[float]",
    list[str] | None: "list[str] | None",
    tuple[int, ...]: "list[int]",
    tuple[float, float]: "list[float]",
    tuple[str, int]: "Any",
    str | Sequence[str]: "Any",
    list[Callable[[], int]]: "Any",
    Mapping[str, float]: "dict[str, float]",
    Mapping[str, Callable[[], int]]: "dict[str, Any]",
    Mapping[str, int] | None: "Any",
    Any: "Any",
}


@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_the_type_of_a_field_is_what_omegaconf_can_check(annotation):
    from inspect import Parameter

    required = Parameter("value", Parameter.KEYWORD_ONLY, annotation=annotation)
    assert field_type(required) == TYPES[annotation]


def test_a_dict_with_a_default_takes_new_keys():
    from inspect import Parameter

    optional = Parameter("value", Parameter.KEYWORD_ONLY, annotation=dict[str, int], default=None)
    assert field_type(optional) == "Any"


def test_lines_are_as_full_as_they_may_be():
    assert wrapped(["a" * 55, "b" * 54, "c" * 55]) == [f"        {'a' * 55}, {'b' * 54},", f"        {'c' * 55},"]


def test_readme_names_every_choice():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What to plug in")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    named = {
        group: set(re.findall(r"`(\w+)`", choices)) for groups, choices in rows for group in groups.split("`")[1::2]
    }
    assert {"pixels", "masks"} <= set(named)
    missing = {
        f"{group}={path.stem}"
        for group in named
        for path in (CONF / group).glob("*.yaml")
        if path.stem not in named[group]
    }
    assert not missing, "they belong in README's table of what to plug in"


# ---------------------------------------------------------------- an app of one's own


def app(folder, text):
    """The config of an app that asks for our groups."""
    (folder / "app.yaml").write_text(f"hydra: {{searchpath: [pkg://latentdm.conf]}}\n{text}", encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("app")


def test_the_config_in_readme_composes(tmp_path):
    [text] = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config")
    assert cfg.pixels.root == "photos"
    assert cfg.datamodule.encoder.vae._target_ == "latentdm.FrozenVAE.from_pretrained"


def test_a_typo_in_a_config_of_a_user_fails_at_composition(tmp_path):
    with pytest.raises(HydraException, match="per_bach"):
        app(tmp_path, "defaults: [{encoder: plain}, _self_]\nvae: null\nencoder: {per_bach: 3}\n")


def test_the_example_with_a_cache_takes_what_comes_again_soon():
    def cache(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides)).cache
        return cfg and (cfg.variants, cfg.mask_variants)

    assert cache() is None
    assert cache("cache=disk") == cache("cache=memory") == (100, 1)
    assert cache("cache=disk", "cache.variants=8", "cache.mask_variants=null") == (8, None)
    assert cache("cache=disk", "pixels=folder", "pixels.root=photos") == (4, None)
    assert cache("cache=disk", "experiment=sd15_inpaint", "pixels=folder", "pixels.root=photos") == (4, None)


def test_a_composed_config_can_be_pickled(tmp_path):
    cfg = app(tmp_path, "defaults: [{vae: tiny}, {encoder: inpaint}, {masks: random}, _self_]\n")
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg
    assert [OmegaConf.get_type(again[group]) for group in again] == [OmegaConf.get_type(cfg[group]) for group in cfg]
    assert OmegaConf.get_type(again.vae).__name__ == "FrozenVAE.from_pretrained"
