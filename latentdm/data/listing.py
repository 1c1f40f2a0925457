"""What lies in a folder and the folders inside it, sorted by what its names say."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from latentdm.data.decode import EXTENSIONS
from latentdm.data.index import THREADS, stamp
from latentdm.data.names import SIDECARS, ending_of, is_metadata


@dataclass
class Listing:
    """Names, with ``/``, relative to a folder.

    Attributes:
        images: the pictures, with (time of change in ns, size); (0, −1) for one that cannot be read, as a link to
            itself.
        sidecars: files that may hold the caption of an image.
        metadata: files that may describe images.
        others: all other files.
        polygons: sidecars that turned out to be labelme's.
        watched: what to watch for changes: each folder's and each metadata file's `stamp`.
        problems: folders that cannot be listed.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    sidecars: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    polygons: list[str] = field(default_factory=list)
    watched: dict[str, Sequence[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def list_files(root: Path, skip: Path | None = None, start: str = "") -> Listing:
    """Walk a folder, level by level and each level in parallel; hidden files are left out, links are followed once.

    Args:
        root: what names are relative to.
        skip: a folder to leave out.
        start: the name of the folder to walk.
    """
    listing = Listing()
    seen = {_identity(skip)} if skip else set()
    level = [start]
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=f"listing {root.name}", unit=" files", delay=2) as progress:
        while level:
            fresh = []
            for folder in level:
                if (identity := _identity(root / folder)) not in seen:  # else a link back, which would never end
                    seen.add(identity)
                    fresh.append(folder)
            level = []
            for folder, then, files, inside, problem in pool.map(lambda folder: _scan(root, folder), fresh):
                listing.watched[folder] = then
                listing.problems += problem
                level += inside
                for name, status in files.items():
                    ending = ending_of(name)
                    if ending in EXTENSIONS:
                        listing.images[name] = status
                    elif is_metadata(name):
                        listing.metadata.append(name)
                        listing.watched[name] = status
                    elif ending in SIDECARS:
                        listing.sidecars.append(name)
                    else:
                        listing.others.append(name)
                progress.update(len(files))
    return listing


def _scan(root: Path, folder: str) -> tuple[str, Sequence[int], dict[str, tuple[int, int]], list[str], list[str]]:
    """One folder: its name, its stamp, its files, the folders in it, and why it cannot be listed."""
    files: dict[str, tuple[int, int]] = {}
    folders: list[tuple[bool, str]] = []
    then = stamp(root / folder)
    problems = []
    try:
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
    except OSError as error:
        problems.append(f"cannot list {root / folder}: {error.strerror}; let it be read, or move it out of the root")
    return folder, then, files, [name for _, name in sorted(folders)], problems


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
