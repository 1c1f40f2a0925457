"""The documentation as a site: it builds with warnings as errors, and every link in it leads somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from browser import CHROMIUM, chromium
from browser import MISSING as NO_CHROMIUM
from running import ROOT

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install -c .ci/constraints.txt -e '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to and loads, what can be linked to in it, and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.texts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_built(site, pages):
    sources = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    names = {source.with_suffix("") for source in sources}
    built = {path.parent.relative_to(site) for path in pages}
    assert built == {name.parent if name.name == "index" else name for name in names}
    assert len(built) > 20


def test_every_link_leads_somewhere(site, pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if urlsplit(link).scheme or target.startswith("//"):
                continue
            place = (path.parent / unquote(target)).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            anchored = not anchor or place not in pages or unquote(anchor) in pages[place].anchors | {"__skip"}
            if not (place.is_file() and anchored):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert wrong == []


def test_no_page_loads_anything_from_elsewhere(pages):
    """A page that is read offline, or by someone who is watched, asks no other host for scripts, fonts or pictures."""
    elsewhere = re.compile(r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//[^>]+>|<link[^>]+stylesheet[^>]+//")
    for path in pages:
        assert elsewhere.findall(path.read_text(encoding="utf-8")) == [], path


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_page_whole(width, site, tab):
    """No page is wider than its window, all pictures are there, and nothing is asked for from elsewhere."""
    wrong = {}
    for path in site.rglob("index.html"):
        tab.open(path, width=width)
        tab.ask("Promise.allSettled([...document.images].map(image => image.decode()))")
        found = {
            "wide": max(0, tab.ask("document.documentElement.scrollWidth") - width),
            "pictures": tab.ask("[...document.images].filter(each => !each.naturalWidth).map(each => each.src)"),
            "said": tab.said,
            "asked": [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))],
        }
        if any(found.values()):
            wrong[str(path.relative_to(site))] = found
    assert wrong == {}


def test_the_reference_tells_arguments_and_errors(site, pages):
    page = pages[site / "api" / "index.html"]
    text = " ".join(" ".join(page.texts).split())
    assert {"latentdm.datamodule.LatentDataModule", "latentdm.stages.Stage", "latentdm.draws.Draws"} <= page.anchors
    for part in ("Wraps a data module of pixel batches", "grow_mask_by", "Raises", "once on every rank"):
        assert part.lower() in text.lower(), part
