"""A user's mistake is told in one line, by the example and by the command alike; a bug keeps its traceback."""

import os
import re
import subprocess
import sys
from random import Random

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from running import ROOT, compose_example

import latentdm.cli
from latentdm.data.stream import shuffled
from latentdm.errors import ConfigError, plain_errors


def told(cfg, key="datamodule"):
    """What is said of a config from which a data module cannot be made."""
    with pytest.raises(ConfigError) as caught, plain_errors(cfg):
        instantiate(cfg[key])
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["pixels=folder"], "pixels.root"),
        (["encoder.per_batch=???"], "encoder.per_batch"),
        (["pixels=folder_buckets", "pixels.root=.", "pixels.buckets.area=???"], "pixels.buckets.area"),
        (["datamodule.seed=???"], "datamodule.seed"),
    ],
)
def test_a_missing_value_has_the_name_that_a_person_types(overrides, name, tmp_path):
    assert told(compose_example(overrides, tmp_path)) == f"{name} has no value; give it one: {name}=…"


def test_a_missing_value_of_an_app_without_groups_has_its_whole_name():
    cfg = OmegaConf.create({"dm": {"pixels": {"_target_": "latentdm.data.ImageFolderData", "root": "???"}}})
    assert told(cfg, "dm").startswith("dm.pixels.root has no value")


def test_what_a_class_says_is_told_without_hydras_frame(tmp_path):
    said = told(compose_example(["encoder.grow_mask_by=99"], tmp_path))
    assert re.fullmatch(r"InpaintEncoder: grow_mask_by must be .*, got 99; .*", said)


def test_a_wrong_interpolation_is_told_on_one_line(tmp_path):
    said = told(compose_example(["pixels.seed=${pixels.sead}"], tmp_path))
    assert "pixels.sead" in said
    assert "\n" not in said


def operation_that_fails_in_the_package():
    list(shuffled(iter([1]), -1, Random(0)))


def operation_that_fails_elsewhere():
    int("x")


@pytest.mark.parametrize("bug", [operation_that_fails_in_the_package, operation_that_fails_elsewhere])
def test_a_bug_passes_as_it_is(bug, tmp_path):
    with pytest.raises(ValueError, match=r"islice|invalid literal") as caught, plain_errors(OmegaConf.create()):
        bug()
    assert caught.traceback[-1].name in (bug.__name__, "shuffled")


@pytest.mark.parametrize("full", ["", "1"], ids=["plain", "full"])
def test_the_example_tells_a_mistake_in_one_line(full, workplace):
    overrides = ["pixels=folder", "pixels.root=photos", "masks=alpha", "debug=step", "callbacks=encode_monitor"]
    command = [sys.executable, str(ROOT / "train_example.py"), *overrides]
    environment = os.environ | {"HYDRA_FULL_ERROR": full}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == bool(full)
    assert re.search(r"^(.*ConfigError: )?AlphaMask: expected pixels of shape b 4 H W", done.stderr, re.M)


def test_the_command_tells_more_on_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError) as caught:
        latentdm.cli.main(["preview", "pixels=folder", "pixels.root=nowhere"])
    assert caught.value.__context__ is not None
