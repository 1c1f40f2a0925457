"""Texts as they come from files and shards: decoded, parsed and checked. What is wrong with one is its sample's error.

A column's value becomes a part of a batch: what cannot travel there (a number of more than 64 bits, a text that no
encoding has, nesting without end) is found here, and not by a worker or a tokenizer later.
"""

import json
from collections import Counter
from reprlib import Repr
from typing import Any

from latentdm.data.skips import SampleError

MAX_DEPTH = 32
"""Levels of lists and objects in a column. Whatever sends a batch to a device or a process calls itself for each."""

INTEGER_DIGITS = 19
"""Of the largest integer of 64 bits."""

MAX_LOOKED_AT = 1000
"""Bytes of a file by which its encoding is told."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a file begins that Windows calls Unicode."""


def decode(content: bytes, what: object, errors: str = "strict") -> str:
    """A text in UTF-8, without the mark that some editors put in front.

    Args:
        content: the text.
        what: what an error calls it.
        errors: "surrogateescape" keeps bytes that are not UTF-8, for `check` to find.

    Raises:
        SampleError: it is not UTF-8.
    """
    if content.startswith(UTF_16) or _alternates(content):
        raise SampleError(f"cannot read {what}: it is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise SampleError(f"cannot read {what}: it is not UTF-8 ({error}); save it as UTF-8") from error


def parse_json(text: str, what: object) -> Any:
    """A JSON value whose parts can all travel in a batch.

    Raises:
        SampleError: it is no JSON, or see `check`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise SampleError(f"cannot read {what}: it is nested too deep") from error
    except ValueError as error:
        raise SampleError(f"cannot read {what}: it is no JSON ({error}); repair or remove it") from error
    check(value, what)
    return value


def check(value: object, what: object) -> None:
    """Whether a value can be a part of a batch.

    Raises:
        SampleError: a text in it is not Unicode, an integer has more than 64 bits, it is nested too deep, or it is no
            value that JSON has.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for part in level:
            if isinstance(part, str):
                _check_text(part, what)
            elif isinstance(part, dict):
                inside += [*part, *part.values()]
            elif isinstance(part, list | tuple):
                inside += part
            elif isinstance(part, int) and not -(2**63) <= part < 2**63:
                raise SampleError(f"cannot read {what}: {_too_large(str(part))}")
            elif part is not None and not isinstance(part, int | float):
                raise SampleError(f"cannot read {what}: it holds a {type(part).__name__}; write it as a text")
        if not inside:
            return
        level = inside
    raise SampleError(f"cannot read {what}: it is nested more than {MAX_DEPTH} levels deep")


def quoted(value: object) -> str:
    """A value as an error quotes it: its beginning and its end where it is long."""
    short = Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _alternates(content: bytes) -> bool:
    """Whether every other byte is zero, as in UTF-16 without a mark: each of them would be a character of UTF-8."""
    even, odd = content[:MAX_LOOKED_AT:2], content[1:MAX_LOOKED_AT:2]
    return len(content) >= 4 and any(not a.strip(b"\0") and 0 not in b for a, b in ((even, odd), (odd, even)))


def _check_text(text: str, what: object) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that `decode` kept, or written so on purpose, which is no better
            raise SampleError(f"cannot read {what}: it is not UTF-8; save it as UTF-8") from error
        raise SampleError(f"cannot read {what}: \\u{code:04x} is half a character; write both or none") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{quoted(twice)} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > INTEGER_DIGITS:  # Python's own limit has a text of its own, which advises another thing
        raise ValueError(_too_large(text))
    return int(text)


def _too_large(digits: str) -> str:
    return f"the integer {quoted(digits).strip(chr(39))} has more than 64 bits; write it as a text"
