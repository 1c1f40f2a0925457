"""What the metadata files of a folder say, by the images that they name.

An index keeps it as the columns of an image. Three of them are no columns of a user's, whose names never begin with
a zero: further rows of the image, further files beside it, and what is wrong with it.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from latentdm.batch import CAPTION
from latentdm.data.files import asked
from latentdm.data.geometry import COMPANIONS
from latentdm.data.index import is_inside
from latentdm.data.listing import Listing
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


@dataclass
class Descriptions:
    """What the metadata files of a folder say.

    Attributes:
        images: of each image that they describe, by its name.
        companions: the names of all masks and sources in them.
        notes: what was left out.
        problems: what is wrong with a file or a row, unless that is a matter of one image.
    """

    images: dict[str, Description] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Names:
    """Finds the files of a folder by the names that people write for them."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._folded: dict[str, str | None] | None = None
        self._anywhere: dict[str, str | None] | None = None

    def find(self, name: str) -> str | None:
        """The file of a name; but for case, Unicode form and backslashes where it is the only one."""
        if name in self._names:
            return name
        if self._folded is None:
            self._folded = _unique(self._names, folded)
        return self._folded.get(folded(name)) or self._folded.get(folded(os.path.normpath(name.replace("\\", "/"))))

    def anywhere(self, name: str) -> str | None:
        """The file of that name, with or without its ending, in whatever folder, if it is the only one."""
        if self._anywhere is None:
            whole, stems = _unique(self._names, _last), _unique(self._names, lambda name: _last(stem_of(name)))
            self._anywhere = {**stems, **whole}
        return self._anywhere.get(_last(name.replace("\\", "/")))


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


class Describer:
    """Reads the metadata files of a folder.

    Args:
        root: the folder.
        listing: what lies in it; a file that turns out to be no metadata becomes one of its ``others``.
        choices: of ``mask``, ``source`` and ``caption``: ``"ignore"`` leaves those out.
        columns: our name → that of a column.
        lenient: what is wrong with an image is an error when it is read, and not at once.
    """

    def __init__(
        self, root: Path, listing: Listing, choices: Mapping[str, str], columns: Mapping[str, str], lenient: bool
    ) -> None:
        self.root = root
        self.listing = listing
        self.choices = choices
        self.columns = columns
        self.lenient = lenient
        self.names = Names(listing.images)
        self.found = Descriptions()
        self.reserved: set[str] = set()

    def __call__(self) -> Descriptions:
        """All that they say.

        Raises:
            UserError: unless lenient: what is wrong with a file or a row, with its line.
        """
        for path in sorted(self.listing.metadata):
            known, strangers, rows = len(self.found.images), [], 0
            try:
                for row in read_metadata(self.root / path, self.columns):
                    rows += 1
                    if row.anywhere and self._image(path, row) is None:
                        strangers.append(row.name)
                    else:
                        self._add(path, row)
                if not rows:
                    self.found.notes.append(f"{path} has no rows")
            except NoMetadataError:
                self.listing.others.append(path)
            except SampleError as error:
                self._problem(str(error))
            if strangers and len(self.found.images) == known:  # some other object of objects
                self.listing.others.append(path)
            elif strangers:
                count = f"{len(strangers)} row{'s' * (len(strangers) > 1)}"
                self.found.notes.append(f"{count} of {path} on images that are not here ({strangers[0]})")
        if self.reserved:
            self.found.notes.append(reserved_note(self.reserved))
        return self.found

    def _add(self, path: str, row: Row) -> None:
        name = self._image(path, row)
        if name is None:
            self._problem(row.problem or self._stranger(path, row))
            return
        columns = dict(row.columns)
        companions, problem = self._companions(path, row.where, columns)
        if self.choices[CAPTION] == "ignore":
            columns.pop(CAPTION, None)
        of_image = self.found.images.setdefault(name, Description(row.where))
        of_image.rows.append(without_reserved(columns, self.reserved.add))
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
            other = self.names.find(written) or written
            self.found.companions.add(other)
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
        found = self.names.find(name) if name else None
        return self.names.anywhere(row.name) if found is None and row.anywhere else found

    def _stranger(self, path: str, row: Row) -> str:
        name = inside(self.root, path, row.name)
        if name is None:
            return self._outside(row.where)
        what = f"{_cut(name)}, which is no image in root={str(self.root)!r}"
        return f"{row.where} names {what}; correct or remove the row"

    def _outside(self, where: str) -> str:
        return f"{where} names a file outside root={str(self.root)!r}; only files inside it are read"

    def _problem(self, text: str) -> None:
        if not self.lenient:
            raise UserError(text)
        self.found.problems.append(text)


def inside(root: Path, metadata: str, name: str) -> str | None:
    """A name in a metadata file as one relative to the root; None outside the root."""
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), name))
    if os.path.isabs(path):
        path = os.path.relpath(path, root.absolute())
    return None if path.split(os.sep)[0] == os.pardir else Path(path).as_posix()


def _unique(names: Collection[str], key: Callable[[str], str]) -> dict[str, str | None]:
    """Key → the only name that has it; None where several do."""
    found: dict[str, str | None] = {}
    for name in names:
        made = key(name)
        found[made] = None if made in found else name
    return found


def _last(name: str) -> str:
    return folded(name.rpartition("/")[2])


def _cut(name: str) -> str:
    return shortened(name, MAX_NAME)
