"""What an object is, in one line, for the ``repr`` of the classes that a person makes in a notebook."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from typing import Any

from latentdm.errors import shortened

MAX_VALUE = 100
"""Characters of a text that is shown."""

MAX_ITEMS = 10
"""Items of a list or a mapping that are shown."""


def one_line(thing: object, *facts: str, **held: Any) -> str:
    """``Class(facts, setting=value, …)``, with the settings that have no default or another value than it.

    Settings are the parameters of the constructors of its class. They are looked up in the attributes that the object
    itself holds: nothing is computed, loaded or moved, and a setting that is not kept is left out.

    Args:
        thing: whose class and settings are told.
        facts: what else it is, put in front.
        held: settings whose values are kept under other names.

    Example:
        >>> one_line(Captions(dropout=0.1))  # doctest: +SKIP
        'Captions(dropout=0.1)'
    """
    values = vars(thing) | held
    settings = [
        f"{name}={_shown(values[name])}"
        for name, default in _parameters(type(thing))
        if name in values and not _same(values[name], default)
    ]
    return f"{type(thing).__name__}({', '.join([*facts, *settings])})"


def _parameters(kind: type) -> Iterator[tuple[str, Any]]:
    """Name and default of all parameters of the constructors of a class and of its bases."""
    found: dict[str, Any] = {}
    for base in kind.__mro__[:-1]:
        if inspect.isfunction(constructor := vars(base).get("__init__")):
            for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    found.setdefault(name, parameter.default)
    yield from found.items()


def _same(value: object, default: object) -> bool:
    """Whether both are the same to a person: a list like a tuple, a path like its text; nothing is no choice at all."""
    scalar = (bool, int, float, str, type(None))
    if isinstance(value, scalar) and isinstance(default, scalar):
        return value == default
    return value is default or _shown(value) == _shown(default) or (_is_nothing(value) and _is_nothing(default))


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _shown(value: object) -> str:
    """A value in one line; of what may be large, costly to show or private only the kind."""
    if isinstance(value, str | PathLike):
        return shortened(repr(str(value)), MAX_VALUE)
    if isinstance(value, bool | int | float | None):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + _joined(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + _joined(map(_shown, value)) + "]"
    if isinstance(value, partial):  # as Hydra's _partial_ gives it
        arguments = [*map(_shown, value.args), *(f"{name}={_shown(item)}" for name, item in value.keywords.items())]
        return f"{getattr(value.func, '__qualname__', value.func)}({', '.join(arguments)}), not made yet"
    if any(base.__module__.startswith("latentdm.") and "__repr__" in vars(base) for base in type(value).__mro__):
        return repr(value)
    return type(value).__name__


def _joined(items: Iterable[str]) -> str:
    """The first items; an ellipsis stands for those behind them."""
    first = list(islice(items, MAX_ITEMS + 1))
    return ", ".join(first if len(first) <= MAX_ITEMS else [*first[:MAX_ITEMS], "…"])
