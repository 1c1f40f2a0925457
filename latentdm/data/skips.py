"""Samples that cannot be read: the error that says so, and the report of those that were skipped.

Workers and ranks are processes of their own, and one of them may be killed. So each skipped sample is written down at
once, as a line of JSON in a folder that all of them see; whoever needs the sum reads the lines.
"""

import json
import os
import warnings
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path

from latentdm.errors import UserError


class SampleError(UserError):
    """One sample cannot be read; says which and why. With ``on_error="skip"`` another one replaces it."""


class TooManySkipped(UserError, RuntimeError):
    """More samples cannot be read than may be skipped."""


class Skips:
    """The samples that were skipped so far, by any worker of any rank.

    Args:
        folder: where the lines go; made when the first sample is skipped.
        rank: of this process and its workers, which share a file.
        ranks: how many there are.
        limit: the share of the samples that may be skipped.
        total: the number of samples, and of what else is written down.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit: float, total: int) -> None:
        self.folder = folder
        self.rank = rank
        self.ranks = ranks
        self.limit = limit
        self.total = total
        self._why: dict[str, str] = {}
        self._read: dict[int, int] = {}
        self._full = False
        with suppress(OSError):
            self._file(rank).unlink(missing_ok=True)  # of an earlier run

    def add(self, name: str, why: str, new_epochs: int = 1) -> None:
        """Write a sample down, once however often it is skipped.

        Args:
            name: the sample.
            why: the text of its error.
            new_epochs: the epochs so far that each brought ``total`` new samples: 1 where all have the same ones.

        Raises:
            TooManySkipped: more than the limit.
        """
        if name not in self._why:
            self._why[name] = why
            if not self._full:
                self._write(name, why)
        skipped, read = len(self.read()), self.total * new_epochs
        if skipped > self.limit * read:
            raise TooManySkipped(
                f"{skipped} of {read} samples cannot be read, more than max_skipped_share={self.limit}; they are "
                f"listed in {self.folder}. The last one: {why}"
            )

    def read(self) -> dict[str, str]:
        """Name → why, of all samples skipped so far; only what is new is read."""
        for rank in range(self.ranks):
            try:
                with self._file(rank).open("rb") as file:
                    file.seek(self._read.get(rank, 0))
                    new = file.read()
            except OSError:  # most often nobody has skipped any
                continue
            new = new[: new.rfind(b"\n") + 1]  # another process may be writing the last line
            self._read[rank] = self._read.get(rank, 0) + len(new)
            for line in new.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a disk that was full has torn it
                    entry = json.loads(line)
                    self._why[entry["name"]] = entry["why"]
        return self._why

    def report(self, shown: int = 10) -> str:
        """What was skipped, as a text; empty where nothing was."""
        skipped = self.read()
        if not skipped:
            return ""
        lines = [f"  {why}" for why in list(skipped.values())[:shown]]
        more = f"\n  and {len(skipped) - shown} more" if len(skipped) > shown else ""
        listed = "those of each process were counted, none listed" if self._full else f"all are listed in {self.folder}"
        return (
            f"{len(skipped)} of {self.total} samples could not be read and were replaced by others; {listed}:\n"
            + "\n".join(lines)
            + more
        )

    def _write(self, name: str, why: str) -> None:
        """Write a line; where that cannot be done, warn once, and go on counting."""
        line = (json.dumps({"name": name, "why": why}) + "\n").encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending is not torn apart by those of other workers.
            file = os.open(self._file(self.rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(file, line)
            finally:
                os.close(file)
            if written < len(line):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
        except OSError as error:
            self._full = True
            warnings.warn(
                f"skipped samples cannot be listed in {self.folder} ({error}): each process counts its own from here "
                "on, and max_skipped_share holds for these",
                stacklevel=2,
            )

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.jsonl"
