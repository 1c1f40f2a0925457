"""Which images a folder holds, which mask, source and caption belong to each, and which of them are for validation.

A *companion* is another picture of an image: its mask, its source, or its label map.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from latentdm.batch import CAPTION
from latentdm.data.decode import EXTENSIONS
from latentdm.data.described import TEXTS, Descriptions
from latentdm.data.files import read_file
from latentdm.data.geometry import COMPANIONS
from latentdm.data.index import Entry, Found
from latentdm.data.listing import Listing, list_files, name_inside
from latentdm.data.matching import Matches, Stems, match
from latentdm.data.metadata import is_labelme
from latentdm.data.names import LIKE, ending_of, stem_of
from latentdm.data.siblings import find_beside
from latentdm.data.skips import SampleError
from latentdm.data.texts import decode, parse_json
from latentdm.errors import UserError
from latentdm.validation import Check

SHOWN_ENDINGS = 8
"""Endings of left out files that are told apart, the most frequent first."""


AUTO = MappingProxyType(dict.fromkeys((*COMPANIONS, CAPTION), "auto"))
"""Takes whatever there is."""


def find_images(
    root: Path,
    choices: Mapping[str, str] = AUTO,
    columns: Mapping[str, str] | None = None,
    lenient: bool = False,
    held_out: Path | None = None,
) -> Found:
    """The images of a folder and of the folders inside it; `latentdm.data.names` says what is recognised.

    What metadata say of an image comes before what names say. An image that the metadata do not name counts as well.

    Args:
        root: the folder.
        choices: of ``mask``, ``source``, ``segmentation`` and ``caption``: ``"auto"``, ``"require"`` or ``"ignore"``,
            see `latentdm.data.ImageFolderData`.
        columns: our name of a metadata column → its name there.
        lenient: what is wrong with a single image is an error when it is read, and not at once.
        held_out: a folder for validation. One inside ``root`` is found under its own name, even if a link leads to it
            too; any other one is left out.

    Raises:
        UserError: no images, and, unless ``lenient``: a companion without an image, two of one kind for one
            image, an image without one where others have one (or where they are required), a metadata row that cannot
            be read, or that names a file outside the folder or one that does not exist.
    """
    listing = list_files(root, held_out)
    if held_out is not None and (inside := name_inside(root, held_out)) is not None:
        listing += list_files(root, start=inside)
    _settle_json(listing)
    described = Descriptions(root, listing, choices, columns or {}, lenient)
    problem, notes = described.problem, described.notes
    for text in listing.problems:
        problem(text)
    matches = match(
        (name for name in listing.images if name in described.images or name not in described.companions),
        certain=described.images,
    )
    if not matches.images:
        raise UserError(f"no images in root={str(root)!r}; expected files ending in {', '.join(EXTENSIONS)}")
    held = {kind for kind, *_ in (*matches.pairs, *matches.orphans)}
    held |= {kind for description in described.images.values() for kind in description.companions}
    wanted = [kind for kind in COMPANIONS if kind not in held and choices[kind] != "ignore"]
    folders = find_beside(root, wanted, matches, listing, notes)
    found: dict[tuple[str, str], str] = {}  # kind, stem of the image → name
    for kind, stem, name in matches.pairs:
        if kind == LIKE or choices[kind] == "ignore":
            continue
        if (first := found.setdefault((kind, stem), name)) != name:
            problem(f"two {kind}s for one image, {root / first} and {root / name}; remove one")
    texts = _sidecars(root, listing, matches.stems) if choices[CAPTION] != "ignore" else {}
    entries = []
    for name in matches.images:
        mtime, size = listing.images[name]
        stem, description = stem_of(name), described.images.get(name)
        named = description.companions if description else {}
        pictures: dict[str, Any] = {kind: named.get(kind) or found.get((kind, stem)) for kind in COMPANIONS}
        caption, *others = [*texts.get((stem, ""), ()), *texts.get((stem, ending_of(name)), ())] or [None]
        said = None if description is None else description.columns()
        if others:
            said = {**(said or {}), TEXTS: others}
        entries.append(Entry(name, size, mtime, caption=caption, columns=said, **pictures))
    for kind, name in matches.orphans:
        if choices[kind] != "ignore":
            problem(
                f"a {kind} without an image: {root / name}; name it after its image, remove it, or set {kind}s=ignore"
            )
    for kind in COMPANIONS:
        without = [entry.name for entry in entries if getattr(entry, kind) is None]
        required = len(without) < len(entries) or choices[kind] == "require"
        if without and required and not lenient:
            raise UserError(
                f"an image without a {kind}: {root / without[0]} (and {len(without) - 1} more of {len(entries)}); "
                f"add {stem_of(without[0])}-{kind}.png to {root}, or set {kind}s=ignore"
            )
    notes = [*_notes(listing, matches, choices), *notes]
    return Found(entries, described.problems, listing.watched, notes, folders)


def check_val_share(check: Check, val_share: object) -> float:
    """A share for validation, which leaves something to train on."""
    share = check.number("val_share", val_share, 0, 1)
    if share == 1:
        raise check.fail("val_share", "a number below 1", val_share)
    return share


def split_hashes(
    hashes: npt.NDArray[np.float64], val_share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split by a hash of each image, so that it stays on its side when others are added.

    So ``val_share`` is met on average. Neither side is left empty if there are two images and ``val_share`` is
    above 0: the image that comes nearest to the other side then goes there. One image alone is for training.

    Args:
        hashes: ``n``, in 0…1.
        val_share: in 0…1.

    Returns:
        The rows of the training and of the validation images, each in order.
    """
    val = hashes < val_share
    if val_share > 0 and len(hashes) > 1 and not val.any():
        val[hashes.argmin()] = True
    if val.all():
        val[hashes.argmax()] = False
    return np.flatnonzero(~val), np.flatnonzero(val)


def _settle_json(listing: Listing) -> None:
    """A JSON file with the name of an image is about that image, whatever metadata are called."""
    stems = {stem_of(name) for name in listing.images}
    for name in [name for name in listing.metadata if ending_of(name) == ".json" and stem_of(name) in stems]:
        listing.metadata.remove(name)
        listing.sidecars.append(name)


def _sidecars(root: Path, listing: Listing, stems: Stems) -> dict[tuple[str, str], list[str]]:
    """The files with captions and columns, by the stem of their image and, as in ``1.png.txt``, by its ending."""
    found: dict[tuple[str, str], list[str]] = {}
    names = sorted(listing.sidecars)
    labelme = next((name for name in names if ending_of(name) == ".json" and stems.find(stem_of(name))), None)
    if labelme is not None and not _is_labelme(root / labelme):
        labelme = None
    for name in names:
        image, ending = stem_of(name), ""
        stem = stems.find(image)
        if stem is None and ending_of(image) in EXTENSIONS:
            stem, ending = stems.find(stem_of(image)), ending_of(image)
        if stem is None:
            listing.others.append(name)
        elif labelme is not None and ending_of(name) == ".json":
            listing.polygons.append(name)
        else:
            found.setdefault((stem, ending), []).append(name)
    return found


def _is_labelme(path: Path) -> bool:
    try:
        content = parse_json(decode(read_file(path), path), path)
    except SampleError:  # an error when it is read
        return False
    return isinstance(content, dict) and is_labelme(content)


def _notes(listing: Listing, matches: Matches, choices: Mapping[str, str]) -> Iterator[str]:
    """What a person should know of what the names said."""
    if listing.others:
        yield "left out: " + _by_ending(sorted(listing.others))
    if listing.polygons:
        yield f"left out: {_count(listing.polygons, 'file')} of labelme, whose polygons are not read (export masks)"
    for kind in COMPANIONS:
        ignored = [name for of, _, name in matches.pairs if of == kind]
        if ignored and choices[kind] == "ignore":
            yield f"left out: {_count(ignored, kind)}, as {kind}s=ignore"
    if listing.sidecars and choices[CAPTION] == "ignore":
        yield f"left out: {_count(listing.sidecars, 'caption')}, as captions=ignore"
    if like := [name for kind, _, name in matches.pairs if kind == LIKE]:
        yield f"left out: {_count(like, 'picture')} called like a mask or label map (rename masks: name-mask.png)"
    if matches.doubtful:
        yield f"taken as images: {_count(matches.doubtful, 'picture')} called like a mask, but of no image"
    twice = Counter(map(stem_of, matches.images))
    if same := [name for name in matches.images if twice[stem_of(name)] > 1]:
        yield f"taken as images: {_count(same, 'picture')} with one name but for the ending"


def _by_ending(names: Iterable[str]) -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ending_of(name), []).append(name)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    parts = [f"{len(group)} {ending or 'without an ending'} ({group[0]})" for ending, group in largest[:SHOWN_ENDINGS]]
    rest = sum(len(group) for _, group in largest[SHOWN_ENDINGS:])
    return ", ".join([*parts, *([f"{rest} with other endings"] if rest else [])])


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({names[0]})"
