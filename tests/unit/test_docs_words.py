"""The documentation quotes what is there: errors, extras, figures of the configs."""

import ast
import re
import tomllib
from functools import cache

import pytest
import yaml
from running import ROOT

import latentdm

DOCS = ROOT / "docs"
QUOTED = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.M)


@cache
def said():
    """All texts of the package, joined as Python joins them; what a text puts in stands as …"""
    texts = []
    for path in (ROOT / "latentdm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_there_are_questions():
    assert len(QUOTED) > 15


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_question_quotes_an_error_as_it_is(quoted):
    parts = [re.escape(part.strip()) for part in quoted.split("…")]
    wanted = re.compile(".*".join(parts), re.S)
    # What is filled in when it is raised, such as a setting's name, stands in the quotation as an example.
    filled = {"pixels.root has no value; give it one": "has no value; give it one"}
    wanted = re.compile(re.escape(filled[quoted])) if quoted in filled else wanted
    assert any(wanted.search(text) for text in said())


def rows(path):
    """The cells of a page's table rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_table_of_memory_is_that_of_the_configs():
    found, experiment = {}, ""
    for name, what, *numbers in rows(DOCS / "how_to" / "memory.md"):
        experiment = name.strip("`") or experiment
        if len(numbers) == 5 and re.fullmatch(r"[\d.]+", numbers[0]):
            found[experiment, what] = numbers
    expected = {}
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        for what, numbers in re.findall(
            r"^#   (\S.*?\S)  +([\d.]+(?:  +[\d.]+){4})$", path.read_text(encoding="utf-8"), re.M
        ):
            expected[path.stem, what] = numbers.split()
    assert len(expected) >= 12
    assert found == expected


def test_the_guide_has_the_experiments_numbers():
    text = (DOCS / "finetune" / "index.md").read_text(encoding="utf-8")
    numbers = {"sd15_inpaint": ("5,000", 512), "sdxl_inpaint": ("5,000", 1024), "flux_fill": ("2,000", 512)}
    for name, (steps, size) in numbers.items():
        made = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert made["trainer"]["max_steps"] == int(steps.replace(",", ""))
        assert made["pixels"]["size"] == size
        assert steps in text
        assert f"{size}²" in text


def test_the_extras_that_the_questions_name_are_all():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    [named] = re.findall(r"The extras are (.*?):\n", text, re.S)
    assert set(re.findall(r"`(\w+)`", named)) == set(extras) - {"docs", "example", "test"}


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        line = f": {path.relative_to(DOCS)}\n"
        assert line in text, f"{path} is not in the nav of mkdocs.yml"


def test_one_version_is_told_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\d.*) – (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert latentdm.__version__ == version == citation["version"] == newest[1]
    assert str(citation["date-released"]) == newest[2]
