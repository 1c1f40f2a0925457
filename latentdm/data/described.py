"""What the metadata files of a folder say, by the images that they name.

An index keeps it as the columns of an image. Three of them are no columns of a user's, whose names never begin with
a zero: further rows of the image, further files beside it, and what is wrong with it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from latentdm.batch import CAPTION
from latentdm.data.files import asked
from latentdm.data.geometry import COMPANIONS
from latentdm.data.index import is_inside
from latentdm.data.listing import Listing
from latentdm.data.matching import Names
from latentdm.data.metadata import NoMetadataError, Row, read_metadata, reserved_note, without_reserved
from latentdm.data.names import folded, stem_of
from latentdm.data.skips import SampleError
from latentdm.data.texts import quoted
from latentdm.errors import UserError, shortened

ROWS = "\0rows"
TEXTS = "\0texts"
BROKEN = "\0broken"

MAX_NAME = 200
"""Characters of a file's name in an error."""


@dataclass
class Description:
    """What metadata say of one image.

    Attributes:
        where: the first row.
        companions: ``mask``, ``source`` and ``segmentation``, as far as a row names them.
        rows: its columns, one set a row.
        broken: what is wrong with a row of it.
    """

    where: str
    companions: dict[str, str] = field(default_factory=dict)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    broken: str = ""

    def columns(self) -> dict[str, Any]:
        """For the index: the first row, and in `ROWS` those that differ from all before."""
        if self.broken:
            return {BROKEN: self.broken}
        if len(self.rows) == 1:
            return dict(self.rows[0])
        first, *others = {json.dumps(row, sort_keys=True): row for row in self.rows}.values()
        return {**first, ROWS: others} if others else dict(first)


def stored(columns: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What an index keeps as the columns of an image: its rows, and the names of further files beside it.

    Raises:
        SampleError: a row of it is broken; or somebody has changed the index.
    """
    first = dict(columns or {})
    if BROKEN in first:
        raise SampleError(str(first[BROKEN]))
    others, names = first.pop(ROWS, []), first.pop(TEXTS, [])
    rows = [first, *others] if isinstance(others, list) else [others]
    if not all(isinstance(row, dict) for row in rows) or not isinstance(names, list):
        raise SampleError(f"the index holds columns that are none, {quoted(columns)}; remove it")
    if wrong := [name for name in names if not isinstance(name, str) or not is_inside(name)]:
        raise SampleError(f"the index names {quoted(wrong[0])}, which lies outside of its folder; remove it")
    return rows, names


class Descriptions:
    """What the metadata files of a folder say.

    Args:
        root: the folder.
        listing: what lies in it; a file that turns out to be no metadata becomes one of its ``others``.
        choices: of ``mask``, ``source`` and ``caption``: ``"ignore"`` leaves those out.
        columns: our name → that of a column.
        lenient: what is wrong with an image is an error when it is read, and not at once.

    Attributes:
        images: of each image that they describe, by its name.
        companions: the names of all masks and sources in them.
        notes: what was left out.
        problems: what is wrong with a file or a row, unless that is a matter of one image.

    Raises:
        UserError: unless lenient: what is wrong with a file or a row, with its line.
    """

    def __init__(
        self, root: Path, listing: Listing, choices: Mapping[str, str], columns: Mapping[str, str], lenient: bool
    ) -> None:
        self.root = root
        self.listing = listing
        self.choices = choices
        self.lenient = lenient
        self.images: dict[str, Description] = {}
        self.companions: set[str] = set()
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._names = Names(listing.images)
        self._reserved: set[str] = set()
        for path in sorted(listing.metadata):
            self._read(path, columns)
        if self._reserved:
            self.notes.append(reserved_note(self._reserved))

    def problem(self, text: str) -> None:
        """Something is wrong with the folder: an error, unless lenient."""
        if not self.lenient:
            raise UserError(text)
        self.problems.append(text)

    def _read(self, path: str, columns: Mapping[str, str]) -> None:
        known, strangers, rows = len(self.images), [], 0
        try:
            for row in read_metadata(self.root / path, columns):
                rows += 1
                if row.anywhere and self._image(path, row) is None:
                    strangers.append(row.name)
                else:
                    self._add(path, row)
            if not rows:
                self.notes.append(f"{path} has no rows")
        except NoMetadataError:
            self.listing.others.append(path)
        except SampleError as error:
            self.problem(str(error))
        if strangers and len(self.images) == known:  # some other object of objects
            self.listing.others.append(path)
        elif strangers:
            count = f"{len(strangers)} row{'s' * (len(strangers) > 1)}"
            self.notes.append(f"{count} of {path} on images that are not here ({strangers[0]})")

    def _add(self, path: str, row: Row) -> None:
        name = self._image(path, row)
        if name is None:
            self.problem(row.problem or self._stranger(path, row))
            return
        columns = dict(row.columns)
        companions, problem = self._companions(path, row.where, columns)
        if self.choices[CAPTION] == "ignore":
            columns.pop(CAPTION, None)
        of_image = self.images.setdefault(name, Description(row.where))
        kept, reserved = without_reserved(columns)
        of_image.rows.append(kept)
        self._reserved |= reserved
        for kind, other in companions.items():
            if of_image.companions.setdefault(kind, other) != other:
                first = _cut(of_image.companions[kind])
                problem = (
                    f"{row.where} names another {kind} of {name} than {of_image.where} does, {_cut(other)} and not "
                    f"{first}; rows of one image may differ in captions and other columns alone"
                )
        problem = row.problem or problem
        if problem and not self.lenient:
            raise UserError(problem)
        of_image.broken = of_image.broken or problem

    def _companions(self, path: str, where: str, columns: dict[str, Any]) -> tuple[dict[str, str], str]:
        """The masks and sources that a row names, which leave its columns; and what is wrong with them."""
        companions: dict[str, str] = {}
        problem = ""
        for kind in COMPANIONS:
            value = columns.pop(kind if kind in columns else f"{kind}_file_name", None)
            if value is None or value == "":
                continue
            written = inside(self.root, path, str(value))
            if written is None:
                problem = self._outside(where)
                continue
            other = self._find(written) or written
            self.companions.add(other)
            if self.choices[kind] == "ignore":
                continue
            if other in self.listing.images or asked(partial(os.path.isfile, self.root / other), self.root / other):
                companions[kind] = other
            else:
                problem = (
                    f"{where} names the {kind} {_cut(other)}, which does not exist in root={str(self.root)!r}; correct "
                    f"it, or set {kind}s=ignore"
                )
        return companions, problem

    def _image(self, path: str, row: Row) -> str | None:
        """The image that a row describes, as far as there is one."""
        name = inside(self.root, path, row.name) if row.name else None
        found = self._find(name) if name else None
        return self._anywhere.get(_last(row.name.replace("\\", "/"))) if found is None and row.anywhere else found

    def _find(self, name: str) -> str | None:
        """The picture of a name, in which backslashes may stand for slashes."""
        return self._names.find(name) or self._names.find(os.path.normpath(name.replace("\\", "/")))

    @cached_property
    def _anywhere(self) -> dict[str, str | None]:
        """The last part of a name, without its ending or with it → the only image that has it, in whatever folder."""
        stems: dict[str, str | None] = {}
        whole: dict[str, str | None] = {}
        for name in self.listing.images:
            for found, key in ((stems, _last(stem_of(name))), (whole, _last(name))):
                found[key] = None if key in found else name
        return stems | whole

    def _stranger(self, path: str, row: Row) -> str:
        name = inside(self.root, path, row.name)
        if name is None:
            return self._outside(row.where)
        what = f"{_cut(name)}, which is no image in root={str(self.root)!r}"
        return f"{row.where} names {what}; correct or remove the row"

    def _outside(self, where: str) -> str:
        return f"{where} names a file outside root={str(self.root)!r}; only files inside it are read"


def inside(root: Path, metadata: str, name: str) -> str | None:
    """A name in a metadata file as one relative to the root; None outside the root."""
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), name))
    if os.path.isabs(path):
        path = os.path.relpath(path, root.absolute())
    return None if path.split(os.sep)[0] == os.pardir else Path(path).as_posix()


def _last(name: str) -> str:
    return folded(name.rpartition("/")[2])


def _cut(name: str) -> str:
    return shortened(name, MAX_NAME)
