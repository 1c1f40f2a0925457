"""What was found as one HTML page: no script, nothing from elsewhere, and every text of the data escaped."""

import base64
import io
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from unicodedata import category

from jinja2 import Environment, StrictUndefined, Template
from jinja2.filters import do_filesizeformat
from markupsafe import Markup
from PIL import Image

import latentdm
from latentdm.data.buckets import Size
from latentdm.errors import RunError, shortened
from latentdm.preview.batch import Drawn
from latentdm.preview.sheet import MAX_TILE, to_image
from latentdm.report.charts import Chart, histogram, rows, spread
from latentdm.report.findings import Findings

SECTIONS = {
    "check": "What to check",
    "samples": "Samples",
    "sizes": "Image sizes",
    "masks": "Masks",
    "captions": "Captions",
    "latents": "Latents",
    "left-out": "Left out",
    "costs": "Cache and time",
    "configuration": "Configuration",
    "versions": "Versions",
}
"""Anchor → heading, in order."""

MAX_SKIPPED = 50
"""Samples that could not be read, of which each is told."""

LONG_CAPTION = 350
"""Characters from which about 77 tokens are full."""

JOINERS = "\u200c\u200d"
"""Characters without a form of their own that scripts and emoji need."""

STAGES = {"train": "training", "val": "validation"}

Tile = tuple[str, str, int, int, bool]


def page(found: Findings, config: str = "", versions: str = "") -> str:
    """The page.

    Args:
        found: by `look`.
        config: the configuration as YAML; "" leaves its section empty.
        versions: lines of text; the same.

    Returns:
        HTML whose lone surrogates and control characters are written out, so that it can be encoded.
    """
    skipped = list(found.skipped.items())
    return _template().render(
        title=f"Report on the {STAGES[found.stage]} data",
        lead=_lead(found),
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=latentdm.__version__,
        sections=SECTIONS,
        found=found,
        pictures=[(drawn.size, list(_tiles(drawn))) for drawn in found.drawn],
        size_charts=list(_size_charts(found)),
        mask_charts=list(_mask_charts(found)),
        caption_charts=[histogram("Characters a caption", found.captions, whole=True)] if found.captions else [],
        empty_captions=found.captions.count(0),
        long_captions=sum(length > LONG_CAPTION for length in found.captions),
        latent_charts=[spread("Latent channels", found.mean, found.std)] if found.mean else [],
        skipped_rows=[
            ("(what describes samples)" if name == why else shortened(name, 300), shortened(why, 600))
            for name, why in skipped[:MAX_SKIPPED]
        ],
        more_skipped=max(0, len(skipped) - MAX_SKIPPED),
        cost_rows=list(_costs(found)),
        config=config,
        versions=versions,
    )


def write(path: Path, text: str) -> None:
    """Write a page whole or not at all: beside its place, and then renamed.

    Raises:
        RunError: it cannot be written; a page that was there is as it was.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"--output {path}: cannot write it: {error.strerror or error}") from error


def visible(value: Any) -> Any:
    """A text in which nothing acts unseen: controls, marks of direction and halves of characters are written out."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(f"⟨U+{ord(c):04X}⟩" if _acts(c) else c for c in value)


def _acts(character: str) -> bool:
    return (
        character not in "\n\t" and character not in JOINERS and category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, finalize=visible, undefined=StrictUndefined)
    environment.filters["brief"] = shortened
    return environment.from_string(files("latentdm.report").joinpath("page.html").read_text(encoding="utf-8"))


def _lead(found: Findings) -> str:
    of = "" if found.total is None else f" of the {found.total:,} of an epoch"
    few = "; an epoch has no more, or drops the incomplete batch at its end"
    asked = f"{found.wanted:,} were asked for{'' if found.samples >= found.wanted or found.ended else few}"
    return f"What a model would be shown, from {found.samples:,} samples{of} ({asked})."


# ---------------------------------------------------------------- pictures


def _tiles(drawn: Drawn) -> Iterator[tuple[str, str, list[Tile]]]:
    """A title, what goes behind it, and pictures: header, source, width, height, and whether pixels stay sharp."""
    for row, (title, figures) in enumerate(zip(drawn.titles, drawn.figures, strict=True)):
        tiles = []
        for header, images in drawn.columns.items():
            image = to_image(images[row])
            small = max(image.size) < MAX_TILE // 2
            if max(image.size) > MAX_TILE:
                image.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
            tiles.append((" ".join(header.split()), data_uri(image), *image.size, small))
        yield title, figures, tiles


def data_uri(image: Image.Image) -> str:
    """A picture as the shorter of PNG and JPEG."""
    found = []
    kinds: dict[str, dict[str, int]] = {"png": {"optimize": True}, "jpeg": {"quality": 90, "subsampling": 0}}
    for kind, settings in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **settings)
        found.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------- charts and numbers


def _size_charts(found: Findings) -> Iterator[Chart]:
    if found.sizes:
        yield histogram("Shorter side of the image files", [min(size) for size in found.sizes], " px", whole=True)
        yield histogram("Width by height of the image files", [width / height for width, height in found.sizes])
    if found.given:
        yield rows("Size that the model is given", _named(found.given))
    if found.buckets:
        yield rows("Bucket, of all images", _named(found.buckets))


def _named(sizes: Counter[Size]) -> dict[str, int]:
    """From the narrowest to the widest."""
    ordered = sorted(sizes, key=lambda size: (size[0] / size[1], size))
    return {f"{width} × {height}": sizes[width, height] for width, height in ordered}


def _mask_charts(found: Findings) -> Iterator[Chart]:
    shares = {"Share that the mask covers": found.masks, "Share that noise_mask covers": found.noise_masks}
    for title, values in shares.items():
        if values:
            yield histogram(title, [100 * value for value in values], "%", (0, 100))


def _costs(found: Findings) -> Iterator[tuple[str, str]]:
    kept, rate, total = found.kept, found.rate(), found.total
    if kept is None or rate is None:
        return
    warm = "; one batch alone, which warms up" if len(found.counts) == 1 else ""
    yield "Reading and encoding", f"{rate:,.1f} samples a second{warm}"
    wait, encode = sum(found.waited), sum(found.encoding)
    yield "Of that time", f"{wait / (wait + encode):.0%} waiting for images, {encode / (wait + encode):.0%} encoding"
    yield (
        "An epoch",
        (
            f"{_duration(total / rate)} for {total:,} samples, and the model's own steps on top"
            if total is not None
            else "unknown: the data have no length"
        ),
    )
    size = f"about {do_filesizeformat(kept.bytes, binary=True)} in {kept.dtype}"
    yield f"A cache, {kept.each}", "; ".join([size, *kept.reasons])
    if total is not None:
        yield f"A cache, {kept.each} of all", f"about {do_filesizeformat(kept.bytes * total, binary=True)}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:.1f} {name}"
    return f"about {seconds:.0f} seconds"
