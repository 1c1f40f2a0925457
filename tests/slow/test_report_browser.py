"""The page of ``latentdm report`` in a real browser, made of data that mean harm."""

import pytest
from browser import CHROMIUM, MISSING, chromium
from report_pages import SMALL, write_hostile_photos

from latentdm.cli import main
from latentdm.report.page import SECTIONS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

ALL_LOADED = "Promise.all([...document.images].map(image => image.decode()))"

UNREADABLE = """[...document.querySelectorAll('main p, h1, h2, h3, td, th, pre, a, figcaption')]
    .filter(each => getComputedStyle(each).color === getComputedStyle(document.body).backgroundColor).length"""

OUTSIDE = """[...document.querySelectorAll('p, h1, h2, h3, figure, img, svg')]
    .filter(each => !each.closest('.wide, pre') && each.getBoundingClientRect().right > innerWidth).length"""
"""What sticks out, but for what may scroll by itself."""

SCALES = """[...document.querySelectorAll('svg')]
    .map(each => each.getBoundingClientRect().width / each.viewBox.baseVal.width)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on photographs with hostile names and captions."""
    place = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_hostile_photos(place / "photos")
        assert main(["report", *SMALL, "masks=random", "pixels.val_share=0", "--samples=20"]) == 0
    return place / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_shown_whole_and_asks_for_nothing(width, dark, page, tab):
    tab.open(page, width=width, dark=dark)
    tab.ask(ALL_LOADED)
    assert tab.ask("[...document.querySelectorAll('section')].map(each => each.id)") == list(SECTIONS)
    assert tab.said == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
    assert tab.ask("document.title") == "Report on the training data"
    assert tab.ask("document.images.length") == 6 * 7  # the broken one is replaced
    assert tab.ask("[...document.images].filter(each => !each.naturalWidth || !each.alt).length") == 0
    assert tab.ask("innerWidth") == width
    assert tab.ask("document.documentElement.scrollWidth") <= width
    assert tab.ask(OUTSIDE) == 0
    assert min(tab.ask(SCALES)) > 0.95  # letters of a chart stay as large as they are drawn
    assert tab.ask(UNREADABLE) == 0
    background = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_a_script_that_got_in_would_not_run(page, tab, tmp_path):
    """The policy holds by itself: the same page, with what escaping keeps out."""
    text = page.read_text(encoding="utf-8")
    run = "document.title = 'run'"
    evil = f'<script>{run}</script><img src=http://127.0.0.1:9/x><img src=x onerror="{run}">'
    (tmp_path / "evil.html").write_text(text.replace("</h1>", f"</h1>{evil}", 1), encoding="utf-8")
    tab.open(tmp_path / "evil.html")
    assert tab.ask("document.title") == "Report on the training data"
    assert len([said for said in tab.said if "Content Security Policy" in str(said)]) >= 3
