"""Which images a folder holds, which mask, source and caption belong to each, and which of them are for validation.

A *companion* is another picture of an image: its mask, its source, or its label map.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from latentdm.batch import CAPTION, MASK, SEGMENTATION, SOURCE
from latentdm.data.decode import EXTENSIONS
from latentdm.data.geometry import COMPANIONS
from latentdm.data.index import THREADS, Entry, stamp
from latentdm.data.metadata import CAPTION_COLUMNS, FILE_NAME, METADATA, SIDECARS, read_metadata, rename
from latentdm.errors import UserError
from latentdm.validation import Check


@dataclass(frozen=True)
class Pairing:
    """How masks, sources and captions are recognised.

    Attributes:
        masks: ``"auto"``, ``"require"`` or ``"ignore"``, see `latentdm.data.ImageFolderData`.
        sources: the same.
        segmentations: the same.
        captions: the same.
        columns: our name of a metadata column → its name there.
        lenient: what is wrong with a single image is an error when it is read, and not at once.
    """

    masks: str = "auto"
    sources: str = "auto"
    segmentations: str = "auto"
    captions: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    lenient: bool = False

    def choice(self, companion: str) -> str:
        """What is set for ``mask``, ``source`` or ``segmentation``."""
        return {MASK: self.masks, SOURCE: self.sources, SEGMENTATION: self.segmentations}[companion]


@dataclass
class Listing:
    """What lies in a folder and the folders inside it: names, with ``/``, relative to it."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    sidecars: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)
    watched: dict[str, Sequence[int]] = field(default_factory=dict)


def list_files(root: Path, skip: Path | None = None) -> Listing:
    """Walk a folder, level by level and each level in parallel; hidden files are left out, links are followed once.

    Images come with (time of change in ns, size); (0, −1) for one that cannot be read, as a link to itself.
    """
    listing = Listing()
    seen = {_identity(skip)} if skip else set()
    level = [""]
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=f"listing {root.name}", unit=" files", delay=2) as progress:
        while level:
            fresh = []
            for folder in level:
                if (identity := _identity(root / folder)) not in seen:  # else a link back, which would never end
                    seen.add(identity)
                    fresh.append(folder)
            level = []
            for folder, then, files, inside in pool.map(lambda folder: _scan(root, folder), fresh):
                listing.watched[folder] = then
                level += inside
                for name, status in files.items():
                    ending = name[name.rfind(".") :].lower()
                    if ending in EXTENSIONS:
                        listing.images[name] = status
                    elif PurePosixPath(name).name in METADATA:
                        listing.metadata.append(name)
                        listing.watched[name] = status
                    elif ending in SIDECARS:
                        listing.sidecars.add(name)
                progress.update(len(files))
    return listing


def find_images(
    root: Path, pairing: Pairing, skip: Path | None = None
) -> tuple[list[Entry], list[str], dict[str, Sequence[int]]]:
    """The images of a folder and of the folders inside it, sorted by name.

    The mask of ``a/b.jpg`` is the one that its metadata name, or ``a/b-mask.png`` or ``masks/a/b.png``, with any image
    ending; its source and its label map likewise, with "source" and "segmentation" for "mask". Its caption is in its
    metadata, in ``a/b.txt`` or in ``a/b.json``. An image that the metadata do not name counts as well.

    Returns:
        The images; what is wrong with the folder (where ``pairing.lenient``); and what to watch for changes.

    Raises:
        ValueError: no images, and, unless ``pairing.lenient``: a companion without an image, two of one kind for one
            image, an image without one where others have one (or where they are required), a metadata row that names
            a file outside the folder or one that does not exist.
    """
    problems: list[str] = []

    def problem(text: str) -> None:
        if not pairing.lenient:
            raise UserError(text)
        problems.append(text)

    listing = list_files(root, skip)
    described, named = _described(root, listing, pairing, problem)
    images: list[str] = []
    found: dict[str, dict[str, str]] = {kind: {} for kind in COMPANIONS}  # kind → stem of the image → name
    for name in sorted(listing.images):
        kind, stem = (None, "") if name in described else _companion(name)
        if name in named and name not in described:
            continue
        if kind is None:
            images.append(name)
            continue
        if stem in found[kind] and pairing.choice(kind) != "ignore":
            problem(f"two {kind}s for one image, {root / found[kind][stem]} and {root / name}; remove one")
        found[kind].setdefault(stem, name)
    if not images:
        raise UserError(f"no images in root={str(root)!r}; expected files ending in {', '.join(EXTENSIONS)}")
    found = {kind: {} if pairing.choice(kind) == "ignore" else names for kind, names in found.items()}
    entries = []
    for name in images:
        mtime, size = listing.images[name]
        entry, stem = described.get(name, Entry(name)), _stem(name)
        sidecar = next((stem + ending for ending in SIDECARS if stem + ending in listing.sidecars), None)
        caption = None if pairing.captions == "ignore" else sidecar
        pictures: dict[str, Any] = {kind: getattr(entry, kind) or found[kind].get(stem) for kind in COMPANIONS}
        entries.append(replace(entry, size=size, mtime=mtime, caption=caption, **pictures))
    stems = {_stem(name) for name in images}
    for kind, names in found.items():
        for companion in (names[stem] for stem in names if stem not in stems):
            problem(
                f"a {kind} without an image: {root / companion}; name it after its image, remove it, or set "
                f"{kind}s=ignore"
            )
        without = [entry.name for entry in entries if getattr(entry, kind) is None]
        required = len(without) < len(entries) or pairing.choice(kind) == "require"
        if without and required and not pairing.lenient:
            raise UserError(
                f"an image without a {kind}: {root / without[0]} (and {len(without) - 1} more of {len(images)}); "
                f"add {_stem(without[0])}-{kind}.png to {root}, or set {kind}s=ignore"
            )
    return entries, problems, listing.watched


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


def _described(
    root: Path, listing: Listing, pairing: Pairing, problem: Callable[[str], None]
) -> tuple[dict[str, Entry], set[str]]:
    """What metadata files say of images, by their names; and the names of all companions in them."""
    described: dict[str, Entry] = {}
    named: set[str] = set()
    for path in sorted(listing.metadata):
        for number, row in read_metadata(root / path):
            row = rename(row, pairing.columns, CAPTION_COLUMNS, CAPTION)
            for kind in COMPANIONS:
                row = rename(row, pairing.columns, (kind, f"{kind}_file_name"), kind)
            name = _inside(root, path, row.pop(FILE_NAME))
            companions = {kind: _inside(root, path, row.pop(kind, None)) for kind in COMPANIONS}
            where = f"{root / path}, line {number}"
            if name is None or None in companions.values():
                problem(f"{where} names a file outside root={str(root)!r}; only files inside it are read")
            elif name not in listing.images:
                problem(f"{where} names {name}, which is no image in root={str(root)!r}; correct or remove the row")
            else:
                named.update(filter(None, companions.values()))
                kept = {k: other or None for k, other in companions.items() if pairing.choice(k) != "ignore"}
                for kind, other in kept.items():
                    if other and other not in listing.images and not (root / other).is_file():
                        problem(
                            f"{where} names the {kind} {other}, which does not exist in root={str(root)!r}; "
                            f"correct it, or set {kind}s=ignore"
                        )
                columns = {column: value for column, value in row.items() if column is not None}
                if pairing.captions == "ignore":
                    columns.pop(CAPTION, None)
                pictures: dict[str, Any] = kept
                described[name] = Entry(name, columns=columns, **pictures)
    return described, named


def _companion(name: str) -> tuple[str | None, str]:
    """What a picture is by its name: its kind and the stem of its image; None for an image."""
    stem = _stem(name)
    for kind in COMPANIONS:
        of_image = stem.removeprefix(f"{kind}s/").removesuffix(f"-{kind}")
        if of_image != stem:
            return kind, of_image
    return None, stem


def _scan(root: Path, folder: str) -> tuple[str, Sequence[int], dict[str, tuple[int, int]], list[str]]:
    """One folder: its name, its stamp, its files and the folders in it."""
    files: dict[str, tuple[int, int]] = {}
    folders: list[tuple[bool, str]] = []
    then = stamp(root / folder)
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat()
                if entry.is_dir():
                    folders.append((entry.is_symlink(), name))
                else:
                    files[name] = status.st_mtime_ns, status.st_size
            except OSError:  # a link to itself, or to nowhere: an error when it is read
                files[name] = 0, -1
    return folder, then, files, [name for _, name in sorted(folders)]


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _inside(root: Path, metadata: str, name: object) -> str | None:
    """A name in a metadata file as one relative to the root; "" for no name, None outside the root."""
    if name is None or name == "":
        return ""
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), str(name)))
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        return None
    return Path(path).as_posix()


def _stem(name: str) -> str:
    return name[: name.rindex(".")]
