"""The config groups and their choices, with what the comment of each YAML says in its first sentence."""

import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from textwrap import shorten

WIDTH = 120
"""Of a line, in characters."""


def choices(folder: str | Path | None = None) -> dict[str, dict[str, str]]:
    """Group → choice → summary, in the order of the alphabet.

    Args:
        folder: of configs of a user's own, whose choices come before those of latentdm of the same name.
    """
    roots: list[Traversable] = [files("latentdm.conf")]
    if folder is not None and Path(folder).is_dir():
        roots.append(Path(folder))
    found: dict[str, dict[str, str]] = {}
    for root in roots:
        for group in root.iterdir():
            if group.is_dir() and not group.name.startswith((".", "_")):
                found.setdefault(group.name, {}).update(_summaries(group))
    return {group: dict(sorted(found[group].items())) for group in sorted(found) if found[group]}


def listed(folder: str | Path | None = None) -> str:
    """The same as text, a line a choice."""
    lines = ["groups and choices, as in masks=random:"]
    for group, named in choices(folder).items():
        width = max(map(len, named))
        lines.append(f"  {group}")
        for name, text in named.items():
            lines.append(f"    {name:<{width}}  {shorten(text, WIDTH - width - 6, placeholder=' …')}".rstrip())
    return "\n".join(lines)


def _summaries(group: Traversable) -> Iterator[tuple[str, str]]:
    for file in group.iterdir():
        if file.is_file() and file.name.endswith(".yaml"):
            yield file.name.removesuffix(".yaml"), summary(file.read_bytes().decode(errors="replace"))


def summary(yaml: str) -> str:
    """The first sentence of the comment that a YAML begins with, behind the command that uses it; "" without one."""
    comment = []
    for line in yaml.splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").rstrip()
        if not text.startswith(("@package", "python ", "latentdm ")):
            comment.append(text)
    return re.split(r"(?<=[.;:]) (?=[A-Z`])", " ".join(comment), maxsplit=1)[0].rstrip(".;:")
