"""Masks and sources in a folder beside the one that is read: ``masks/`` where ``root`` is ``images/``."""

import os
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from latentdm.data.files import asked
from latentdm.data.index import stamp
from latentdm.data.listing import Listing, list_files
from latentdm.data.matching import Matches
from latentdm.data.names import FOLDERS, IMAGE_FOLDERS, folded, guesses, stem_of
from latentdm.data.skips import SampleError

BESIDE = re.compile(r"\.\./(?!\.\.?$)[^/]+|\.\./\.\./(?!\.\.?/)[^/]+/(?!\.\.?$)[^/]+")
"""``../masks`` and ``../../masks/train``."""


def find_beside(
    root: Path, kinds: Collection[str], matches: Matches, listing: Listing, notes: list[str]
) -> dict[str, str]:
    """Look for masks or sources beside the folder.

    Such a folder is taken where it has one for every image, or where its name or the root's says what they are.

    Args:
        root: the folder.
        kinds: what it does not hold itself: ``mask``, ``source``.
        matches: what it holds; what is found is added to ``pairs``.
        listing: what is watched for changes is added.
        notes: what is taken from where, or not taken, is added.

    Returns:
        Kind → the folder, as `beside` takes it, to which the names in ``pairs`` are relative.
    """
    root = asked(root.resolve, root)  # as the index has it
    found: dict[str, str] = {}
    stems = {stem_of(name) for name in matches.images}
    for kind in kinds:
        for folder, is_named in _folders(root, kind):
            listing.watched[folder] = asked(partial(stamp, root / folder), root / folder)
            if not asked((root / folder).is_dir, root / folder):
                continue
            inside = list_files(root, start=folder)
            pairs = []
            for name in sorted(inside.images):
                path = name.removeprefix(f"{folder}/")
                possible = [stem_of(path), *(guess.stem for guess in guesses(path) if guess.kind == kind)]
                stem = next((known for stem in possible if (known := matches.stems.find(stem)) is not None), None)
                if stem is not None:
                    pairs.append((kind, stem, path))
            with_one = {stem for _, stem, _ in pairs}
            if not pairs:
                continue
            if is_named or with_one == stems:
                matches.pairs += pairs
                listing.watched |= inside.watched
                found[kind] = folder
                notes.append(f"{kind}s are those in {os.path.normpath(root / folder)}")
                break
            of_all = f"{kind}s for {len(with_one)} of {len(stems)} images (inside root they would be taken)"
            notes.append(f"left out: {os.path.normpath(root / folder)}, with {of_all}")
    return found


def beside(root: Path, folder: str | None) -> Path:
    """The folder that `find_beside` gave for a kind; the root where it gave none.

    Raises:
        SampleError: it lies elsewhere: somebody has changed the index.
    """
    if folder is None:
        return root
    if not BESIDE.fullmatch(folder):
        raise SampleError(f"the index of {root} says that masks are in {folder}, which is not beside it")
    return root / folder


def _folders(root: Path, kind: str) -> Iterator[tuple[str, bool]]:
    """Where companions may be, and whether names alone say that they are this folder's."""
    beside, above = _names(root.parent), _names(root.parent.parent)
    for name in FOLDERS[kind]:
        named = f"{root.name}_{name}"
        yield f"../{beside.get(name, name)}", folded(root.name) in IMAGE_FOLDERS
        yield f"../{beside.get(folded(named), named)}", True
        if folded(root.parent.name) in IMAGE_FOLDERS:
            yield f"../../{above.get(name, name)}/{root.name}", True


def _names(folder: Path) -> dict[str, str]:
    """What lies in a folder: a name without its case → the name."""
    try:
        return {folded(name): name for name in asked(lambda: os.listdir(folder), folder)}
    except OSError:  # nobody may look there
        return {}
