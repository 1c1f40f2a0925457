"""What files are by their names: the one place that knows what tools call masks, captions and metadata.

``docs/data.md`` shows it as a table. Neither case nor the Unicode form of a name matters.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple
from unicodedata import normalize

from latentdm.batch import MASK, SEGMENTATION, SOURCE

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
"""Files that describe the images of a folder and of those inside it."""

SCRIPTS_METADATA = re.compile(r"meta_.*\.json")
"""The same, as sd-scripts names what its tagging scripts write: ``meta_cap.json``, ``meta_lat.json``."""

SIDECARS = (".txt", ".caption", ".json")
"""Endings of the files beside an image that hold its caption, or as JSON its columns."""

MARKS = {
    MASK: ("mask", "masks", "masklabel", "cp_masks"),
    SOURCE: ("source",),
    SEGMENTATION: ("segmentation",),
}
"""What stands behind an image's name, and a separator, in the name of its mask, source or label map."""

FOLDERS = {
    MASK: ("masks", "mask"),
    SOURCE: ("sources", "source"),
    SEGMENTATION: ("segmentations", "segmentation"),
}
"""Folders of masks, sources or label maps, which have the names of their images, with or without a mark."""

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
"""Folders of images, for which masks are looked for in a folder beside them."""

IMAGE_MARKS = ("img", "image", "leftimg8bit")
"""What may stand behind an image's own name, or in front of it, where a mask's has a mark in its place."""

LIKE = "like"
"""The kind of a picture that is likely to be a mask or a label map, under a name that does not say of which kind."""

LIKE_MARKS = (
    *("mask", "seg", "semantic", "instance", "label", "gt", "groundtruth", "ground_truth", "matte"),
    *("alpha", "trimap", "annotation", "masked", "bmask", "gtfine", "flows", "cp_output"),
    *("condlabel", "binary"),
)
"""What such pictures are called: behind the image's name, with a number behind it or without, or in front of it."""

LIKE_FOLDERS = (
    *("label", "labels", "gt", "gtfine", "groundtruth", "ground_truth", "seg", "annotations"),
    *("segmentationclass", "segmentationobject", "matte", "mattes", "alphas", "trimap", "trimaps"),
    *("conditioning", "conditioning_data", "conditioning_images", "control", "control_images"),
    *("masks_human", "mask_dir", "lung_masks", "segmentationclasspng", "trainannot"),
)
"""What folders of such pictures are called; sd-scripts takes masks from a conditioning folder of any name. Of the last
ones the words count: ``mask`` among others, and what begins or ends so."""

_ANY = "|".join(LIKE_MARKS)
_BEHIND = {
    kind: re.compile(rf"((.+?)[-_. ]*)[-_. ](?:{'|'.join(marks)})", re.IGNORECASE | re.DOTALL)
    for kind, marks in MARKS.items()
}
_BEHIND[LIKE] = re.compile(rf"(.+?)(?:[-_. ]+(?:{_ANY})|mask)s?[-_. ]?\(?\d*\)?", re.IGNORECASE | re.DOTALL)
_IN_FRONT = re.compile(rf"(?:{_ANY})s?[-_. ]+(.+)", re.IGNORECASE | re.DOTALL)
_NUMBERED = re.compile(r"masks?([-_. ]*)([-_. ].+|\d.*)", re.IGNORECASE | re.DOTALL)
_WITHIN = re.compile(r"(.+?)([-_. ]+)(?:[a-z]?masks?|gtfine)\d*[-_. ]+(.+)", re.IGNORECASE | re.DOTALL)
_LIKE_FOLDER = re.compile(
    r"(?:.+[-_. ])?(?:masks?|groundtruth)(?:[-_. ].+)?|segmentation(?:class|object).*|.*annots?",
    re.IGNORECASE | re.DOTALL,
)
_MASK_WORD = re.compile(r"(?:^|[-_. /])[a-z]?masks?\d*(?:$|[-_. /])", re.IGNORECASE)
_BESIDE = {
    kind: re.compile(rf"(.+)[-_. ](?:{'|'.join(names)})", re.IGNORECASE | re.DOTALL) for kind, names in FOLDERS.items()
}
_HINT = re.compile("|".join({*LIKE_MARKS, *LIKE_FOLDERS, *MARKS[SOURCE], *MARKS[SEGMENTATION], "annot"}), re.IGNORECASE)


class Guess(NamedTuple):
    """What a picture may be by its name.

    Attributes:
        kind: ``mask``, ``source``, ``segmentation`` or `LIKE`.
        certain: it is that and nothing else, even if there is no image of the name.
        stem: of its image.
        apart: where its image may lie in another folder beside its own: the path of the folder that holds both, and
            the image's stem inside the one beside.
    """

    kind: str
    certain: bool
    stem: str
    apart: tuple[str, str] | None = None


def folded(name: str) -> str:
    """A name without its case and Unicode form, for names that differ in nothing else."""
    return normalize("NFC", normalize("NFC", name).casefold())


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; "" where there is none."""
    return name[len(stem_of(name)) :].lower()


def stem_of(name: str) -> str:
    """A path without its ending."""
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name


def is_metadata(name: str) -> bool:
    """Whether a file may describe the images of a folder."""
    name = folded(name.rpartition("/")[2])
    return name in METADATA or SCRIPTS_METADATA.fullmatch(name) is not None


def guesses(name: str) -> Iterator[Guess]:
    """What a picture may be, other than an image, by its path; the likeliest first."""
    if not _HINT.search(name):  # most names
        return
    *folders, last = stem_of(name).split("/")
    for kind in (*MARKS, LIKE):
        names = FOLDERS.get(kind, LIKE_FOLDERS)
        for place, folder in enumerate(folders):
            inside = "/".join([*folders[place + 1 :], ""])
            outside = "/".join([*folders[:place], ""]) if place else ""
            stems = list(dict.fromkeys([last, *_unmarked(kind, last)]))
            if folded(folder) in names or (kind == LIKE and _is_like(folder)):
                certain = place == 0 and folded(folder) in FOLDERS.get(kind, ())[:1]
                for stem in stems:
                    yield Guess(kind, certain, outside + inside + stem, (outside, inside + stem))
            elif kind in _BESIDE and (beside := _BESIDE[kind].fullmatch(folder)):
                for stem in stems:
                    yield Guess(kind, False, f"{outside}{beside[1]}/{inside}{stem}")
        here = "/".join([*folders, ""]) if folders else ""
        for stem in _unmarked(kind, last):
            certain = kind in MARKS and folded(last) == folded(f"{stem}-{MARKS[kind][0]}")
            yield Guess(kind, certain, here + stem)


def is_doubtful(name: str) -> bool:
    """Whether a picture that turned out to be an image may be a mask all the same, by a word in its path."""
    return _MASK_WORD.search(stem_of(name)) is not None


def _is_like(folder: str) -> bool:
    """Whether a folder is called like one of masks or label maps, apart from those that are looked for."""
    return folded(folder) not in FOLDERS[MASK] and _LIKE_FOLDER.fullmatch(folder) is not None


def _unmarked(kind: str, stem: str) -> Iterator[str]:
    """The name of the image, by the name of its mask."""
    if match := _BEHIND[kind].fullmatch(stem):
        yield from dict.fromkeys(filter(None, match.groups()))
    if kind == MASK and (match := _NUMBERED.fullmatch(stem)):
        for word in IMAGE_MARKS:
            for plural in ("", "s"):
                yield f"{word}{plural}{match[1]}{match[2]}"
    if kind == LIKE:
        if match := _IN_FRONT.fullmatch(stem):
            yield match[1]
        if match := _WITHIN.fullmatch(stem):
            yield match[1]
            yield f"{match[1]}{match[2]}{match[3]}"
        for unmarked in (name for kind in MARKS for name in _unmarked(kind, stem)):
            yield unmarked
            if match := _BEHIND[LIKE].fullmatch(unmarked):  # 1_gt_mask
                yield match[1]
