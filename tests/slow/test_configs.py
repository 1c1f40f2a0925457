"""Every YAML under conf/ is found, composed, instantiated and run by the command in its own header."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from running import ROOT, run_example
from tiny_models import STAND_INS, stand_in
from tiny_pipelines import experiment_stand_in

YAMLS = sorted(ROOT.glob("conf/**/*.yaml"))

NOT_OF_THE_TESTS = {"logger/wandb": "wandb", "logger/mlflow": "sqlalchemy"}
"""YAML → what it needs beside latentdm[test]."""


def header_command(yaml: Path) -> list[str]:
    """The overrides of the command in a YAML's first comment (the line after Hydra's own, if it has one)."""
    lines = [line for line in yaml.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
    program, *rest = shlex.split(lines[0].removeprefix("# "))
    assert [program, rest[0]] == ["python", "train_example.py"], (
        f"{yaml}: the first comment must be the command that runs it"
    )
    return rest[1:]


@pytest.mark.filterwarnings("ignore:VAEOffload. has no effect:UserWarning")  # there is no device to free here
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow and SQLAlchemy
@pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_header_command_runs_a_step(yaml, workplace):
    overrides = header_command(yaml)
    group = yaml.parent.relative_to(ROOT / "conf").as_posix()
    if needed := NOT_OF_THE_TESTS.get(f"{group}/{yaml.stem}"):
        pytest.importorskip(needed, reason=f"{needed} is no part of latentdm[test]")
    if group != ".":
        assert any(override.startswith((f"{group}=", f"{group}.")) for override in overrides), (
            "the header must use its YAML"
        )
    if group == "vae" and yaml.stem in STAND_INS:  # a test cannot reach the repository that it names
        overrides.append(f"vae.source={stand_in(yaml.stem, workplace / 'autoencoder')}")
    overrides += experiment_stand_in(overrides, workplace)
    run_example(overrides, workplace)


def compose_error(*overrides: str) -> str:
    with initialize_config_module("latentdm.conf", version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("train", overrides=list(overrides))
    return str(caught.value) + str(caught.value.__cause__)


def test_typo_fails_at_compose_and_names_the_key():
    assert "'grow_mask'" in compose_error("encoder=inpaint", "encoder.grow_mask=3")


def test_wrong_type_fails_at_compose_and_names_the_key():
    assert "encoder.grow_mask_by" in compose_error("encoder=inpaint", "encoder.grow_mask_by=wide")


def test_wrong_choice_is_answered_with_the_choices():
    message = compose_error("encoder=outpaint")
    for choice in ("plain", "batched", "inpaint", "inpaint_offset"):
        assert f"\t{choice}" in message
    assert "schema" not in message.split("Config search path")[0]
