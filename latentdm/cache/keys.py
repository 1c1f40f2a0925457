"""What a cached entry is found by: a hash over all that decides its bytes."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from inspect import isroutine
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentdm.data.decode import ImageFile
from latentdm.data.files import open_file
from latentdm.data.skips import SampleError
from latentdm.errors import UserError

KEY_BYTES = 16
"""128 bits: two of 10¹² entries are alike once in 10¹⁵ times."""

PIXELS_VERSION = 1
"""Raised whenever the same file and settings come to give other pixels; then no entry from before is found."""

IDENTITIES = ("stat", "content")


def key_of(*parts: object) -> bytes:
    """The key of what some parts decide: texts, numbers, bytes, and lists and dicts of them."""
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part if isinstance(part, bytes) else canonical(part)
        digest.update(b"%d:" % len(content))  # so that no two lists of parts run together into one
        digest.update(content)
    return digest.digest()


def canonical(value: object) -> bytes:
    """A value of JSON as bytes, alike on every machine; file names need not be UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def identity(file: ImageFile, how: str) -> list[Any]:
    """What tells one state of a file from every other.

    Args:
        file: a path, or what the file holds.
        how: ``"stat"`` takes the path with the size and the times of change as they are now; ``"content"`` reads it.
            What a file holds is always hashed.

    Raises:
        SampleError: the file cannot be read.
    """
    try:
        if isinstance(file, Path) and how == "stat":
            # Both times: some programs put the one back after they have written, and none can put the other back.
            status = os.stat(file)
            return [os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if isinstance(file, Path):
            with open_file(file) as opened:
                content = opened.read()
        else:
            content = file
    except OSError as error:
        raise SampleError(f"cannot read {file!s}: {error}; repair or remove the file") from error
    return ["content", blake2b(content, digest_size=KEY_BYTES).hexdigest(), len(content)]


def described(value: Any, owner: str) -> Any:
    """The settings of an object, as JSON: its class and all of its attributes, and theirs.

    Raises:
        UserError: it holds something whose state cannot be told, such as a function or a network.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): described(item, owner) for name, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [described(item, owner) for item in items]
    if isroutine(value) or isinstance(value, type | nn.Module) or not hasattr(value, "__dict__"):
        raise UserError(f"{owner} holds {value!r}, whose state no key can tell")
    kind = type(value)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **described(vars(value), owner)}


@cache
def decoder() -> dict[str, str]:
    """The versions of what decodes and resizes images."""
    import PIL
    from PIL import features

    libraries = {name: str(features.version(name)) for name in ("jpg", "webp", "zlib", "littlecms2")}
    return {"pixels": str(PIXELS_VERSION), "Pillow": PIL.__version__, **libraries}
