"""The documentation's pages: each Python block runs, in order, and each command has settings that there are."""

import importlib.util
import re
import shlex
import sys
import tomllib
import warnings

import pytest
from hydra import compose, initialize_config_dir
from pages import PAGES, blocks, commands, forgotten, name_of, write_captioned_photos, write_files
from running import ROOT, compose_example

from latentdm.cli import COMMANDS
from latentdm.commands.config import compose_config

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
NEEDS = {"plug_in/lightning_cli": "jsonargparse"}
"""Page → the package that its Python needs, beside those of the tests."""
BLOCK_NEEDS = re.compile(r"# needs (\w+)\n")
"""The first line of a block that needs a package of its own, which no later block relies on."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`:UserWarning"),
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "photos"
    write_captioned_photos(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, photos):
    """The folder in which a reader works; what its modules register is gone afterwards."""
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.setattr(sys, "argv", ["page"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with forgotten(tmp_path):
        yield tmp_path


@pytest.fixture
def families(monkeypatch):
    """What a page registers ends with it."""
    from latentdm.autoencoders import families

    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "CLASSES", dict(families.CLASSES))


def test_there_are_pages_of_every_kind():
    names = {name_of(page) for page in PAGES}
    assert {"quickstart", "faq", "how_to/masks", "finetune/index", "plug_in/loops", "coming_from/diffusers"} <= names
    assert sum(block.language == "python" for page in PAGES for block in blocks(page)) > 20


@every_page
def test_its_python_runs(page, place, families):
    if (needed := NEEDS.get(name_of(page))) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, which is part of latentdm[test]")
    write_files(page, place)
    names, missing = {"__name__": "__main__"}, []
    for number, block in enumerate(blocks(page)):
        if block.language == "python" and not block.file:
            needed = BLOCK_NEEDS.match(block.text)
            if needed and importlib.util.find_spec(needed[1]) is None:
                missing.append(needed[1])
                continue
            with warnings.catch_warnings():
                if needed:  # the packages of others may warn
                    warnings.simplefilter("ignore")
                exec(compile(block.text, f"{page.name}[{number}]", "exec"), names)
    if missing:
        pytest.skip(f"all else ran; not installed: {', '.join(missing)}")


@every_page
def test_its_languages_are_known(page):
    assert {block.language for block in blocks(page)} <= {"python", "yaml", "sh", "bash", "text", "json"}


@every_page
def test_its_commands_compose(page, place):
    write_files(page, place)
    for block in blocks(page):
        for words in commands(block) if block.language in ("sh", "bash") else ():
            check(words, place)


OVERRIDE = re.compile(r"[+~]?([\w.]+)=")


def own_settings(page):
    """What a migration page names as ours: the overrides in the second column of its tables."""
    for row in re.findall(r"^\|(.*)\|$", page.read_text(encoding="utf-8"), re.M):
        for code in re.findall(r"`([^`]+)`", row.split(" | ")[-1]):
            if OVERRIDE.match(words := " ".join(shlex.split(code))) and "…" not in words:
                yield shlex.split(code)


def clash(key, other):
    """Whether two settings cannot stand beside each other: the same, or a group and a value in it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def together(settings):
    """Settings that do not clash, in few lists: composing is slow."""
    lists = []
    for words in settings:
        keys = {OVERRIDE.match(word)[1] for word in words}
        for taken, joined in lists:
            if not any(clash(key, other) for key in keys for other in taken):
                taken |= keys
                joined += words
                break
        else:
            lists.append((keys, list(words)))
    return [joined for _, joined in lists]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "coming_from"], ids=name_of)
def test_what_a_migration_page_names_as_ours_is_there(page, place):
    settings = list(own_settings(page))
    assert len(settings) > 20
    for overrides in together(settings):
        chosen = {OVERRIDE.match(word)[1] for word in overrides}
        base = {"experiment": "sd15_inpaint", "pixels": "folder"}
        compose_example([*(f"{k}={v}" for k, v in base.items() if k not in chosen), *overrides], place)


def check(words, place):
    """One command: its program is known, and its overrides make a config."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "latentdm":
        assert rest[0] in COMMANDS, words
        compose_config(settings_of(rest[1:]))
    elif program == "pip":
        for extras in re.findall(r"\[(.*)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(project()["optional-dependencies"]), extras
    elif program in ("python", "python3") and rest[0] == "train_example.py":
        compose_example(rest[1:], place)
    elif program in ("python", "python3") and rest[0].endswith(".py"):
        assert (place / rest[0]).is_file(), f"no block is {rest[0]}"
        if "hydra.main" in (place / rest[0]).read_text(encoding="utf-8"):
            with initialize_config_dir(str(place / "conf"), version_base="1.3"):
                compose("config", overrides=rest[1:])
    else:
        assert words == ["python3", "-m", "venv", ".venv"] or program in ("torchrun", "fabric"), words


def settings_of(arguments):
    """The options that every command has, without those that change no config."""
    from argparse import ArgumentParser

    from latentdm.commands.config import add_overrides

    parser = ArgumentParser()
    for option in ("--samples", "--output", "--stage", "--device"):
        parser.add_argument(option)
    add_overrides(parser)
    return parser.parse_intermixed_args(arguments)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
