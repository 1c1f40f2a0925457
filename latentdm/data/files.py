"""Which images a folder holds, which mask and which caption belong to each, and which side of the split each is on."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from latentdm.data.images import EXTENSIONS
from latentdm.data.index import THREADS, Entry, stamp
from latentdm.data.metadata import (
    CAPTION,
    CAPTION_COLUMNS,
    FILE_NAME,
    MASK_COLUMNS,
    METADATA,
    SIDECARS,
    read_metadata,
    rename,
)
from latentdm.errors import UserError

MASK_SUFFIX = "-mask"
MASK_FOLDER = "masks"


@dataclass(frozen=True)
class Pairing:
    """How masks and captions are told.

    Attributes:
        masks: ``"auto"``, ``"require"`` or ``"ignore"``, see `latentdm.data.ImageFolderData`.
        captions: the same.
        columns: our name of a metadata column → its name there.
        lenient: what is wrong with a single image is told when it is read, and not at once.
    """

    masks: str = "auto"
    captions: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    lenient: bool = False


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
    root: Path, owner: str, pairing: Pairing, skip: Path | None = None
) -> tuple[list[Entry], list[str], dict[str, Sequence[int]]]:
    """The images of a folder and of the folders inside it, sorted by name.

    The mask of ``a/b.jpg`` is the one that its metadata name, or ``a/b-mask.png`` or ``masks/a/b.png``, with any image
    ending. Its caption is in its metadata, in ``a/b.txt`` or in ``a/b.json``. An image that the metadata do not name
    counts as well.

    Returns:
        The images; what is wrong with the folder (where ``pairing.lenient``); and what to watch for changes.

    Raises:
        ValueError: no images, and, unless ``pairing.lenient``: a mask without an image, two masks for one image, an
            image without a mask where others have one (or where they are required), a metadata row that names a file
            outside the folder or one that is not there.
    """
    problems: list[str] = []

    def problem(text: str) -> None:
        if not pairing.lenient:
            raise UserError(text)
        problems.append(text)

    listing = list_files(root, skip)
    described: dict[str, Entry] = {}
    for path in sorted(listing.metadata):
        for number, row in read_metadata(root / path, owner):
            row = rename(rename(row, pairing.columns, CAPTION_COLUMNS, CAPTION), pairing.columns, MASK_COLUMNS, "mask")
            names = [_inside(root, path, row.pop(column, None)) for column in (FILE_NAME, "mask")]
            where = f"{owner}: {root / path}, line {number}"
            if None in names:
                problem(f"{where} names a file outside root={str(root)!r}; only files inside it are read")
            elif names[0] not in listing.images:
                problem(f"{where} names {names[0]}, which is no image in root={str(root)!r}; correct or remove the row")
            else:
                mask = names[1] if pairing.masks != "ignore" else None
                columns = {name: value for name, value in row.items() if name is not None}
                if pairing.captions == "ignore":
                    columns.pop(CAPTION, None)
                described[names[0]] = Entry(names[0], mask=mask or None, columns=columns)

    named = {entry.mask for entry in described.values()}
    images: list[str] = []
    mask_of: dict[str, str] = {}
    for name in sorted(listing.images):
        stem = _masked_stem(name)
        if name in named and name not in described:
            continue
        if stem is not None and name not in described:
            if stem in mask_of and pairing.masks != "ignore":
                problem(f"{owner}: two masks for one image, {root / mask_of[stem]} and {root / name}; remove one")
            mask_of.setdefault(stem, name)
        else:
            images.append(name)
    if not images:
        raise UserError(f"{owner}: no images in root={str(root)!r}; expected files ending in {', '.join(EXTENSIONS)}")
    if pairing.masks == "ignore":
        mask_of = {}
    entries = []
    for name in images:
        mtime, size = listing.images[name]
        entry = described.get(name, Entry(name))
        sidecar = next((_stem(name) + ending for ending in SIDECARS if _stem(name) + ending in listing.sidecars), None)
        caption = None if pairing.captions == "ignore" else sidecar
        mask = entry.mask or mask_of.get(_stem(name))
        entries.append(replace(entry, size=size, mtime=mtime, mask=mask, caption=caption))
    stems = {_stem(name) for name in images}
    for stem, mask in mask_of.items():
        if stem not in stems:
            problem(
                f"{owner}: a mask without an image: {root / mask}; name it after its image, remove it, "
                "or set masks=ignore"
            )
    without = [entry.name for entry in entries if entry.mask is None]
    if without and not pairing.lenient and (len(without) < len(entries) or pairing.masks == "require"):
        raise UserError(
            f"{owner}: an image without a mask: {root / without[0]} (and {len(without) - 1} more of {len(images)}); "
            f"add {_stem(without[0])}{MASK_SUFFIX}.png to {root}, or set masks=ignore"
        )
    return entries, problems, listing.watched


def split_hashes(
    hashes: npt.NDArray[np.float64], val_share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split by a hash of each image, so that it stays on its side when others are added.

    So ``val_share`` is met on average. Neither side is left empty where there are two images and ``val_share`` is
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
            except OSError:  # a link to itself, or to nowhere: told when it is read
                files[name] = 0, -1
    return folder, then, files, [name for _, name in sorted(folders)]


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _inside(root: Path, metadata: str, name: object) -> str | None:
    """A name in a metadata file as one relative to the root; "" where there is none, None outside the root."""
    if name is None or name == "":
        return ""
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), str(name)))
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        return None
    return Path(path).as_posix()


def _masked_stem(name: str) -> str | None:
    """The stem of the image that a mask is for; None for an image."""
    stem = _stem(name)
    image_stem = stem.removeprefix(f"{MASK_FOLDER}/").removesuffix(MASK_SUFFIX)
    return image_stem if image_stem != stem else None


def _stem(name: str) -> str:
    return name[: name.rindex(".")]
