"""The config groups and choices are listed with a line each."""

from contextlib import suppress

import pytest
from running import ROOT

from latentdm.cli import main
from latentdm.commands.choices import choices, summary


def test_every_group_and_choice_is_listed_with_what_it_is():
    found = choices()
    files = {(path.parent.name, path.stem) for path in (ROOT / "conf").glob("*/*.yaml")}
    assert {(group, name) for group, named in found.items() for name in named} == files
    assert [key for key in files if not found[key[0]][key[1]]] == []


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("# python a.py x=y\n# Gray. With more.\na: 1\n# no", "Gray"),
        ("# @package _global_\n# latentdm train a=b\n# Of 1.5 and 2, in\n# two lines.\n", "Of 1.5 and 2, in two lines"),
        ("a: 1\n# Not in front.", ""),
        ("", ""),
    ],
)
def test_a_summary_is_the_first_sentence_of_the_first_comment(yaml, expected):
    assert summary(yaml) == expected


def test_choices_of_ones_own_are_listed_too(tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "wide.yaml").write_text("# Broad ones.\nshare: [0.4, 0.6]\n", encoding="utf-8")
    (tmp_path / "masks" / "latin.yaml").write_bytes(b"# caf\xe9\n")
    (tmp_path / ".git").mkdir()
    assert main(["config", "--help", "--config-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "    wide          Broad ones\n" in text
    assert "    random        Random boxes and strokes" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("arguments", [["--help"], ["--config-dir", "--help"], ["--config-dir=nowhere", "--help"]])
def test_help_is_given_whatever_stands_beside_it(arguments, capsys):
    with suppress(SystemExit):
        main(["config", *arguments])
    assert "latentdm config" in "".join(capsys.readouterr())


def test_the_config_is_printed_as_overrides_make_it(capsys):
    assert main(["config", "masks=varied", "pixels.size=96"]) == 0
    text = capsys.readouterr().out
    assert "\n  size: 96\n" in text
    assert "\n  - borders\n" in text
    assert "hydra:" not in text
