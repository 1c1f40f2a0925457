"""What is written about an image: in files beside it, or in a metadata file for a whole folder; and its captions.

An image may have several *rows*, each with one caption or none: of these one is drawn for each sample and epoch.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from latentdm.batch import CAPTION, EPOCH, NAMES
from latentdm.cache.rows import CACHED
from latentdm.data.files import read_file
from latentdm.data.names import ending_of
from latentdm.data.skips import SampleError
from latentdm.data.texts import check, decode, parse_json, quoted

FILE_COLUMNS = ("file_name", "image_file_name")
"""The columns that name the image, as in Hugging Face's imagefolder: the first that is there."""

CAPTION_COLUMNS = ("caption", "text")
"""The columns that hold the caption unless a user names another one: the first that is there."""

RESERVED = frozenset({*NAMES, EPOCH, CACHED, "name", ""}) - {CAPTION}
"""Columns that a text cannot bring, because a batch has these names for something else."""

OPAQUE = re.compile(r"\b(?:large_|fixed_size_)?(?:binary|timestamp|date|time|decimal|duration|interval|extension)\d*\b")
"""Types of Parquet's columns that no metadata file of text could hold."""


NAMED = re.compile(rb'"(?:%s)"\s*:\s*"([^"\\]+)"' % "|".join(FILE_COLUMNS).encode())
"""The name of an image in a line that is no JSON."""


class NoMetadataError(SampleError):
    """A JSON file describes no images."""


class Row(NamedTuple):
    """What a metadata file says of one image.

    Attributes:
        where: the file and the line, counted from 1, or the number of the row.
        columns: what it holds, which may be no columns; as `read_metadata` gives it, all but the image's name.
        problem: what is wrong with the row.
        anywhere: the image may be in another folder than the name says: tools write the paths of another machine.
        name: of the image, as it is written there; "" where it is unknown.
    """

    where: str
    columns: Any
    problem: str = ""
    anywhere: bool = False
    name: str = ""


def read_sidecar(file: Path | bytes, name: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The caption in a text file, or the columns of a JSON file, which may also be captions alone.

    Args:
        file: the file, or its content.
        name: its name, and what an error calls a content.
        columns: our name of a column → its name in a JSON file.

    Returns:
        Its columns; ``caption`` is a text or a list of texts. Of a labelme file, which holds polygons, nothing.

    Raises:
        SampleError: the file is not UTF-8 or no JSON, or its caption no text.
    """
    content, what = (file, name) if isinstance(file, bytes) else (read_file(file), str(file))
    text = decode(content, what)
    if ending_of(name) != ".json":
        return {CAPTION: text.strip()}
    found = parse_json(text, what)
    if isinstance(found, str | list):
        found = {CAPTION: found}
    if not isinstance(found, dict):
        raise SampleError(f"cannot read {what}: it holds neither an object nor a text; repair or remove it")
    if is_labelme(found):
        tell_once("labelme's JSON files beside images are left out: their polygons are not read as masks")
        return {}
    row = renamed(found, columns or {})
    listed(row.get(CAPTION), what)
    kept, reserved = without_reserved(row)
    for column in sorted(reserved):
        tell_once(f"left out of JSON beside images: {reserved_note({column})}")
    return kept


def is_labelme(content: Mapping[str, Any]) -> bool:
    """Whether an object is labelme's: polygons on an image."""
    return "shapes" in content and "imagePath" in content


def read_metadata(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a metadata file: CSV after RFC 4180, JSON lines, Parquet, or one JSON value as sd-scripts writes it.

    Args:
        path: the file.
        columns: our name of a column → its name there; ``image`` for the one that names the image.

    Raises:
        SampleError: the file as a whole cannot be read. What is wrong with a row is that row's ``problem``.
        NoMetadataError: it is JSON of another kind.
    """
    read = {".csv": _csv_rows, ".jsonl": _json_lines, ".parquet": _parquet_rows, ".json": _json_rows}
    for where, content, problem, anywhere, _ in read[ending_of(path.name)](path):
        if problem and not content:
            yield Row(where, {}, problem)
            continue
        written = content if isinstance(content, dict) else {}
        row = renamed(written, {name: theirs for name, theirs in (columns or {}).items() if name != "image"})
        of_image = (columns or {}).get("image") or next((name for name in FILE_COLUMNS if name in row), FILE_COLUMNS[0])
        name = row.pop(of_image, None)
        try:
            check([name, row], where)
            listed(row.get(CAPTION), where)
        except SampleError as error:
            problem = problem or str(error)
        if not isinstance(name, str) or not name:
            hint = "separate columns by commas" if re.search("[;\t]", "".join(written)) else "or columns={image: …}"
            remedy = f"add it, {hint}" if content is written else "correct or remove it"
            problem = f"{where}: a row must have a column {of_image!r}, got {quoted(content)}; {remedy}"
            yield Row(where, {}, problem)
        else:
            yield Row(where, row, problem, anywhere, name)


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under our names: those that ``columns`` says, and the usual ones of a caption."""
    taken = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    left = {name: value for name, value in row.items() if name not in columns.values()}
    usual = next((name for name in CAPTION_COLUMNS if name in left), None)
    if CAPTION not in taken and usual is not None:
        taken[CAPTION] = left.pop(usual)
    return {**left, **taken}


def without_reserved(row: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The row without the columns whose names a batch needs; and those: any that begins with a zero as this alone."""
    left = {name if name in RESERVED else "\0" for name in row if name in RESERVED or name.startswith("\0")}
    return {name: value for name, value in row.items() if name not in RESERVED and not name.startswith("\0")}, left


def reserved_note(columns: set[str]) -> str:
    """What to say of columns that were left out."""
    names = ", ".join(sorted(map(repr, columns)))
    return f"columns {names}, whose names a batch has for something else (another name: columns={{my_name: …}})"


def listed(caption: object, what: object = "") -> list[str]:
    """The captions of a caption column: one text, several, or none.

    Raises:
        SampleError: it holds something else.
    """
    captions: list[Any] = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not all(isinstance(text, str) for text in captions):
        got = quoted(caption)
        raise SampleError(f"cannot read {what}: its caption must be a text or a list of texts, got {got}")
    return captions


def rows_of_image(
    described: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]] = (), what: object = ""
) -> list[dict[str, Any]]:
    """All that is written about an image, as rows of which one is drawn for each sample and epoch.

    Args:
        described: its rows in metadata files.
        beside: the columns of the files beside it, which belong to every row.
        what: what an error calls it.

    Returns:
        At least one row; each has one caption, or None where there is none at all.

    Raises:
        SampleError: a caption is no text.
    """
    shared: dict[str, Any] = {}
    for columns in beside:
        shared |= columns
    shared.pop(CAPTION, None)
    rows: list[dict[str, Any]] = []
    for row in described or [{}]:
        whole = {**shared, **row}
        captions = listed(whole.pop(CAPTION, None), what)
        without = {**whole, CAPTION: None} if CAPTION in row else whole
        rows += [{**whole, CAPTION: text} for text in captions] or [without]
    known = {row.get(CAPTION) for row in rows}
    further = dict.fromkeys(text for columns in beside for text in listed(columns.get(CAPTION)) if text not in known)
    rows += [{**rows[0], CAPTION: text} for text in further]
    told = [row for row in rows if row.get(CAPTION)]
    return told or [row for row in rows if row.get(CAPTION) is not None] or rows


@cache
def tell_once(text: str) -> None:
    """Say something once a process, however many samples it concerns."""
    rank_zero_info(text)


def _csv_rows(path: Path) -> Iterator[Row]:
    """The records after RFC 4180: quoted fields of any length, with line breaks in them; empty lines are left out."""
    text = decode(read_file(path), path, "surrogateescape")
    usual = csv.field_size_limit(max(len(text), 1))
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    head: list[str] | None = None
    try:
        while True:
            where = f"{path}, line {lines.line_num + 1}"
            try:
                record = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if head is None:
                    raise SampleError(f"cannot read {where}: it is no CSV ({error}); repair it") from error
                yield Row(where, {}, f"cannot read {where}: it is no CSV ({error}); repair it, with quotes in pairs")
                continue
            if head is not None and record:
                problem = (
                    f"{where} has {len(record)} cells where the first line names {len(head)}; put quotes around a text "
                    "with a comma in it"
                )
                columns = dict(zip(head, record, strict=False))
                yield Row(where, columns, problem if len(record) > len(head) else "")
            elif record:
                head = [name.strip() for name in record]
                twice = next((name for name, count in Counter(head).items() if name and count > 1), None)
                if twice is not None:
                    raise SampleError(f"cannot read {where}: two columns have the name {quoted(twice)}; rename one")
    finally:
        csv.field_size_limit(usual)


def _json_lines(path: Path) -> Iterator[Row]:
    content = read_file(path)
    decode(content[:2] if content[:1] in (b"\xff", b"\xfe") else b"", path)  # UTF-16, whose lines are no lines
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(decode(line, where), where)
        except SampleError as error:
            name = NAMED.search(line)  # then it is that image's error
            yield Row(where, {FILE_COLUMNS[0]: name[1].decode("utf-8", "replace")} if name else {}, str(error))
        else:
            yield Row(where, row)


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of rows, or an object of captions, or of sd-scripts' captions and tags, by the paths of their images."""
    content = parse_json(decode(read_file(path), path), path)
    if isinstance(content, list):
        for number, row in enumerate(content, start=1):
            yield Row(f"{path}, row {number}", row)
    elif isinstance(content, dict) and all(isinstance(row, dict | str) for row in content.values()):
        for number, (name, value) in enumerate(content.items(), start=1):
            row = {"caption": value} if isinstance(value, str) else value
            texts = [row[part] for part in ("caption", "tags") if isinstance(row.get(part), str) and row[part]]
            others = {column: value for column, value in row.items() if column not in ("caption", "tags")}
            # As sd-scripts joins them; what it adds on sizes has no meaning here.
            others.pop("train_resolution", None)
            columns = {**others, FILE_COLUMNS[0]: name, **({CAPTION: ", ".join(texts)} if texts else {})}
            yield Row(f"{path}, row {number}", columns, anywhere=True)
    else:
        raise NoMetadataError(f"{path} holds neither rows nor objects by the names of images")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        table = pq.read_table(pa.BufferReader(read_file(path)))
        opaque = [field.name for field in table.schema if OPAQUE.search(str(field.type))]
        rows = table.drop_columns(opaque).to_pylist()
    except pa.ArrowException as error:
        raise SampleError(f"cannot read {path}: it is no Parquet ({quoted(str(error))}); replace it") from error
    if opaque:
        tell_once(f"left out of {path}: the columns {', '.join(opaque)}, which hold no texts or numbers")
    for number, row in enumerate(rows, start=1):
        yield Row(f"{path}, row {number}", row)
