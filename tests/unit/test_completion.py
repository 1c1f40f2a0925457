"""What the shell is told may follow on the command line."""

import os
import sys

import pytest

from latentdm.cli import COMMANDS, main
from latentdm.commands.completion import SCRIPTS, candidates


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("latentdm", [*sorted(COMMANDS), "--help", "--version"]),
        ("latentdm ", [*sorted(COMMANDS), "--help", "--version"]),
        ("latentdm tra", ["train"]),
        ("latentdm completion ", list(SCRIPTS)),
        ("latentdm preview --s", ["--samples", "--stage"]),
        ("latentdm preview --output ", []),  # the shell completes files
        ("latentdm preview masks=r", ["masks=random"]),
        ("latentdm preview --samples 3 encoder=inpaint encoder.la", ["encoder.latent_mask="]),
        ("latentdm preview encoder=plain encoder.la", []),
        ("latentdm cache info masks=r", ["masks=random"]),
        ("latentdm cache masks=r", ["masks=random"]),
        ("latentdm train vae=sdxl_", ["vae=sdxl_fp16_fix"]),
        ("latentdm preview pixels.root=ph", []),
        ("latentdm preview --config-dir nowhere masks=r", []),
        ("latentdm preview masks=nothing enc", ["encoder="]),
        ('latentdm preview "a b=$(false) masks=r', []),
        ("latentdm unknown ma", []),
        ("latentdm doctor ma", []),
        ("", [*sorted(COMMANDS), "--help", "--version"]),
    ],
)
def test_what_may_follow(line, expected, capsys):
    arguments, environment = list(sys.argv), dict(os.environ)
    assert candidates(line) == expected
    assert (sys.argv, dict(os.environ)) == (arguments, environment)
    assert "".join(capsys.readouterr()) == ""  # which would stand in the middle of the line


def test_groups_and_keys_may_follow():
    found = candidates("latentdm train ")
    assert {"pixels=", "pixels.", "experiment=", "seed="} <= set(found)
    assert "latentdm/" not in found


def test_choices_of_ones_own_may_follow(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "wide.yaml").write_text("share: [0.4, 0.6]\n", encoding="utf-8")
    (tmp_path / "app.yaml").write_text("defaults: [{masks: wide}]\n", encoding="utf-8")
    line = f"latentdm train --config-dir {tmp_path} --config-name app masks="
    assert {"masks=wide", "masks=random"} <= set(candidates(line))


def test_a_shell_must_be_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["completion"])
    assert "name a shell: bash, zsh, fish" in capsys.readouterr().err
    assert main(["completion", "--query", "latentdm unknown "]) == 0
    assert capsys.readouterr().out == ""
