"""What is written about an image: in a file beside it, or in a ``metadata.jsonl`` or ``.csv`` for a whole folder."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentdm.batch import CAPTION
from latentdm.data.files import read_file
from latentdm.data.skips import SampleError
from latentdm.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".json")

MAX_BYTES = 4 << 30
"""The most that a file of texts may hold."""

FILE_NAME = "file_name"
"""The column that names the image, as in Hugging Face's imagefolder."""

CAPTION_COLUMNS = ("caption", "text")
"""The columns that hold the caption unless a user names another one: the first that is there."""


def read_sidecar(path: Path) -> dict[str, Any]:
    """The caption in a text file, or the columns of a JSON file, which may also be the caption alone.

    Raises:
        SampleError: the file is not UTF-8 or no JSON.
    """
    text = _text(path)
    if path.suffix.lower() != ".json":
        return {CAPTION: text.strip()}
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise SampleError(f"cannot read {path}: it is no JSON ({error}); repair or remove the file") from error
    if isinstance(content, str):
        return {CAPTION: content}
    if not isinstance(content, dict):
        raise SampleError(f"cannot read {path}: it holds neither an object nor a text; repair or remove it")
    return rename(content, {}, CAPTION_COLUMNS, CAPTION)


def read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file, each with its line number, counted from 1.

    Raises:
        ValueError: the file is not UTF-8, a row is no object, or one lacks ``file_name``.
    """
    lines = _text(path).splitlines()
    if path.suffix.lower() == ".csv":
        rows: Iterator[tuple[int, Any]] = enumerate(csv.DictReader(lines), start=2)
    else:
        rows = ((number, _json(line, path, number)) for number, line in enumerate(lines, start=1) if line.strip())
    for number, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
            raise UserError(f"{path}, line {number}: a row must have a column {FILE_NAME!r}, got {row!r}")
        yield number, row


def rename(row: Mapping[str, Any], columns: Mapping[str, str], usual: tuple[str, ...], name: str) -> dict[str, Any]:
    """The row with one of its columns under our name: the one that ``columns`` says, else the first usual one."""
    theirs = columns.get(name) or next((column for column in usual if column in row), None)
    return {name if column == theirs else column: value for column, value in row.items()}


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number} is no JSON ({error}); repair it") from error


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"cannot read {path}: it is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error}; repair or remove the file") from error
