"""Pages of ``latentdm report`` as a test reads them, and photographs with everything that a page must not believe."""

from html.parser import HTMLParser

from PIL import Image

from latentdm.data.photographs import photographs

SMALL = ["pixels=folder", "pixels.root=photos", "pixels.size=64", "pixels.batch_size=2", "--device=cpu"]

NAMES = [
    "<script>alert(1)<",
    "\u202egnp.exe",
    "<img src=x onerror=alert(2)>",
    '" onload="alert(3)',
    "\u05d0\u05d1\u05d2",
]
"""Of files; one turns what follows it around."""

CAPTIONS = [
    "</h3></main><script>alert(4)</script><style>body{display:none}</style>",
    "x" * 1_000_000,
    "{{ 7 * 7 }} {% raw %}",
    "<meta http-equiv=refresh content='0; url=https://example.org'>\x00\x1b[31m",
    "a photo",
]


def write_hostile_photos(folder):
    """Photographs whose names and captions are meant to do something in a browser."""
    folder.mkdir()
    images = list(photographs("val").values())
    for name, caption, image in zip(NAMES, CAPTIONS, images, strict=False):
        Image.fromarray(image[:120, :150]).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    (folder / "broken <b>.png").write_bytes(b"no picture")


class Read(HTMLParser):
    """What a page consists of.

    Attributes:
        tags: the names of all elements, in order.
        attributes: (element, name, value) of all.
        sections: anchor → text.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.sections, self.open = [], [], {}, []
        self.where, self.texts = None, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "section":
            self.where = dict(attributes)["id"]
            self.sections[self.where] = ""
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} ends what it has not begun"
        if tag == "section":
            self.where = None

    @property
    def text(self):
        """All of it."""
        return " ".join(self.texts)

    def handle_data(self, data):
        self.texts.append(data)
        if self.where:
            self.sections[self.where] += data

    def values(self, name, tag=None):
        """Those of an attribute."""
        return [value for element, found, value in self.attributes if found == name and tag in (None, element)]


def check_form(text):
    """The page is whole, asks for nothing and runs nothing, whatever it holds; returns what it consists of."""
    page = Read(text)
    assert page.open == []
    assert list(page.sections) == [link.removeprefix("#") for link in page.values("href", "a")][: len(page.sections)]
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert page.tags.count("style") == page.tags.count("title") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert {value.split(":")[0] for value in page.values("src")} <= {"data"}
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert "default-src 'none'" in page.values("content")[0]
    assert page.values("http-equiv") == ["Content-Security-Policy"]
    assert all(page.values("alt"))
    assert len(page.values("alt")) == page.tags.count("img")
    assert len(page.values("aria-label", "svg")) == page.tags.count("svg")
    assert not {chr(n) for n in (0, 27, 0x202E, 0x2066, 0x2069)} & set(text)
    return page
