"""Tar shards as files that others wrote: what may be opened, and what a member may take.

A member's head says how large it is. A sparse or a compressed one can promise gigabytes in a kilobyte, which would be
taken before the first byte of it is looked at.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from latentdm.data.files import open_file, open_stream, size_of
from latentdm.data.skips import SampleError
from latentdm.errors import UserError
from latentdm.extras import require

MAX_MEMBER_BYTES = 128 << 20
"""The most that a member may hold, unless its shard is a larger file."""

PIPE = "pipe:"
"""What a shard begins with that is a command."""

REMOTE = re.compile(r"[A-Za-z][\w+.-]*:(//|:)")
"""How an address begins that fsspec opens."""

LOCAL = re.compile(r"(file|local):(//)?")
"""How a path may begin that fsspec takes for one as well."""

MAX_HEAD_BYTES = 1 << 20
"""The most that the long name and the further attributes of a member may take."""

META = re.compile(r"__[^/]*__($|/)")
"""Names of members that describe the shard."""


def check_shards(shards: Sequence[str], allow_pipe: bool) -> None:
    """Raise UserError where one is a command, unless these are allowed."""
    commands = [shard for shard in shards if shard.lstrip().lower().startswith(PIPE)]
    if commands and not allow_pipe:
        raise UserError(
            f"shards holds {commands[0][:100]!r}, which runs a command with your rights; set allow_pipe=true if you "
            "trust whoever wrote it"
        )


def open_shard(shard: str, owner: str) -> AbstractContextManager[BinaryIO]:
    """A shard as a stream each reading of which ends in time: a local file, the output of a command, or an address.

    Raises:
        SampleError: it is no regular file, or does not answer in time.
        ImportError: a package is missing that opens it; the message names ``owner`` and the extra.
        Exception: whatever the package raises.
    """
    if shard.startswith(PIPE):
        gopen = require("webdataset", extra="webdataset", needed_by=owner).gopen
        return open_stream(lambda: gopen(shard), shard)
    local = LOCAL.match(shard)
    if local or not REMOTE.match(shard):
        return open_file(Path(shard[local.end() if local else 0 :]).expanduser())
    fsspec = require("fsspec", extra="webdataset", needed_by=owner)
    return open_stream(lambda: fsspec.open(shard, "rb").open(), shard)


class _Head(tarfile.TarInfo):
    """The head of a member, which Python would read whole, whatever it promises."""

    @classmethod
    def frombuf(cls, *arguments: Any, **named: Any) -> "_Head":
        head = super().frombuf(*arguments, **named)
        long = head.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if head.type == tarfile.GNUTYPE_SPARSE or (long and head.size > MAX_HEAD_BYTES):
            raise tarfile.ReadError(f"a head of {head.size} bytes, or a sparse member; write the shard anew without it")
        return head


def members(stream: BinaryIO, shard: str) -> Iterator[tuple[str, bytes]]:
    """The files in a shard: their names and contents.

    Raises:
        SampleError: a member is larger than it may be.
        tarfile.TarError: the shard is broken, or a head promises more than it may.
    """
    limit = max(MAX_MEMBER_BYTES, size_of(stream))
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Head) as tar:
        for member in tar:
            if not member.isreg() or META.match(member.name):
                continue
            if member.issparse() or member.size > limit:
                what = "is sparse" if member.issparse() else f"holds {member.size} bytes, more than {limit}"
                raise SampleError(
                    f"cannot read {shard}: its member {member.name} {what}; write the shard anew without it"
                )
            content = tar.extractfile(member)
            yield member.name, b"" if content is None else content.read()
            tar.members = []  # type: ignore[attr-defined]  # it would remember them all
