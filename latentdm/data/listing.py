"""What lies in a folder and the folders inside it, sorted by what its names say."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from latentdm.data.decode import EXTENSIONS
from latentdm.data.files import asked, threads
from latentdm.data.index import NO_STAMP, stamp
from latentdm.data.names import SIDECARS, ending_of, is_metadata
from latentdm.errors import UserError

AT_ONCE = 1024
"""Entries of a folder that are asked for at once: for each the storage has the time of a file."""


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

    def __iadd__(self, other: "Listing") -> "Listing":
        """What lies in another folder as well."""
        for name in fields(self):
            ours, theirs = getattr(self, name.name), getattr(other, name.name)
            if isinstance(ours, dict):
                ours.update(theirs)
            else:
                ours += theirs
        return self


def list_files(root: Path, skip: Path | None = None, start: str = "") -> Listing:
    """Walk a folder, level by level and each level in parallel; hidden files are left out, links are followed once.

    Args:
        root: what names are relative to.
        skip: a folder to leave out.
        start: the name of the folder to walk.

    Raises:
        NoAnswerError: a folder does not answer; names it. Without its files a list would be another one each time.
    """
    listing = Listing()
    seen = {_identity(skip)} if skip else set()
    level = [start]
    with threads() as pool, tqdm(desc=f"listing {root.name}", unit=" files", delay=2) as progress:
        while level:
            fresh = []
            for folder in level:
                if (identity := _identity(root / folder)) not in seen:  # else a link back, which would never end
                    seen.add(identity)
                    fresh.append(folder)
            level = []
            for found, folders in pool.map(partial(_scan, root), fresh):
                listing += found
                level += [name for _, name in sorted(folders)]
                progress.update(sum(map(len, (found.images, found.sidecars, found.metadata, found.others))))
    return listing


def _scan(root: Path, folder: str) -> tuple[Listing, list[tuple[bool, str]]]:
    """What lies in one folder; and the folders there: whether each is a link, and its name."""
    path = root / folder
    found, folders = Listing(), list[tuple[bool, str]]()
    # A folder that cannot be listed has no stamp, so that it is listed anew the next time.
    found.watched[folder] = asked(lambda: stamp(path), path)
    try:
        entries = asked(lambda: os.scandir(path), path, discard=lambda late: late.close())
        # The clock is that of each piece: a folder of a million files may take longer than any of them.
        while asked(lambda: _take(entries, folder, found, folders), path, discard=lambda _: entries.close()) == AT_ONCE:
            pass
    except OSError as error:
        found.watched[folder] = NO_STAMP
        found.problems.append(f"cannot list {path}: {error.strerror}; let it be read, or move it out of the root")
    return found, folders


def _take(entries: Iterator["os.DirEntry[str]"], folder: str, found: Listing, folders: list[tuple[bool, str]]) -> int:
    """Put some entries where they belong; how many there were."""
    count = 0
    for entry in islice(entries, AT_ONCE):
        count += 1
        if entry.name.startswith("."):
            continue
        name = f"{folder}/{entry.name}" if folder else entry.name
        try:
            details = entry.stat()
            status = details.st_mtime_ns, details.st_size
            if entry.is_dir():
                folders.append((entry.is_symlink(), name))
                continue
        except OSError:  # a link to itself, or to nowhere: an error when it is read
            status = NO_STAMP
        ending = ending_of(name)
        if ending in EXTENSIONS:
            found.images[name] = status
        elif is_metadata(name):
            found.metadata.append(name)
            found.watched[name] = status
        elif ending in SIDECARS:
            found.sidecars.append(name)
        else:
            found.others.append(name)
    return count


def existing_folder(setting: str, value: str | Path, which: str) -> Path:
    """The folder that a setting names; of what, an error says.

    Raises:
        UserError: there is none, or it does not answer.
    """
    path = Path(value).expanduser()
    if not asked(path.is_dir, path):
        what = "is a file" if asked(path.is_file, path) else "does not exist"
        raise UserError(f"{setting}={str(value)!r} {what}; give a folder of {which} (searched from {Path.cwd()})")
    return path


def name_inside(root: Path, folder: Path) -> str | None:
    """The name of a folder inside another one; None where it lies elsewhere."""
    resolved = asked(folder.resolve, folder), asked(root.resolve, root)
    for inner, outer in ((os.path.abspath(folder), os.path.abspath(root)), resolved):
        name = Path(os.path.relpath(inner, outer)).as_posix()
        if name.split("/")[0] not in (os.curdir, os.pardir):
            return name
    return None


def _identity(folder: Path) -> tuple[int, int]:
    status = asked(lambda: os.stat(folder), folder)
    return status.st_dev, status.st_ino
