"""The pages of the documentation: their blocks, and a folder in which these run."""

import re
import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from running import ROOT, box_mask

from latentdm.data.photographs import photographs

DOCS = ROOT / "docs"
GENERATED = {"autoencoders.md", "benchmarks.md", "data.md"}
"""Reference pages that scripts write, which have tests of their own."""
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name not in GENERATED and not path.name.startswith("cache"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))\n")
"""The first line of a block that is a file."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the file that it is, if it says so."""

    language: str
    text: str
    file: str | None


def blocks(page):
    """Of a page, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(name, text, match[1] if (match := FILE.match(text)) else None) for name, text in found]


def name_of(page):
    """``docs/how_to/masks.md`` → ``how_to/masks``."""
    return str(page.relative_to(DOCS).with_suffix(""))


def commands(block):
    """The commands of a shell block, each as its words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_files(page, folder):
    """The files that the page's blocks are."""
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")


def write_captioned_photos(folder):
    """Four photographs with a mask and a caption each, as the pages have them."""
    folder.mkdir()
    for name, image in list(photographs("val").items())[:4]:
        photo = Image.fromarray(image[:150, :150])
        photo.save(folder / f"{name}.jpg")
        box_mask(photo.size).save(folder / f"{name}-mask.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}", encoding="utf-8")


@contextmanager
def forgotten(folder):
    """What is imported from a folder in this block is imported anew by the next one."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def configs(folder: Path):
    """The configs of a page that are whole: those with defaults and a data module."""
    return [path for path in sorted(folder.glob("conf/*.yaml")) if "datamodule:" in path.read_text(encoding="utf-8")]
