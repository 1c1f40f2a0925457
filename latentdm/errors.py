"""A user's mistake: an error of its own kind, told in one line. A bug keeps its traceback."""

from contextlib import ContextDecorator
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdm.config_errors import ConfigError, plain_errors

__all__ = [
    "ConfigError",
    "MissingExtraError",
    "RunError",
    "UserError",
    "UserTypeError",
    "attributed",
    "plain_errors",
    "shortened",
]


MAX_LENGTH = 2000
"""Characters of a text of an error."""


def shortened(text: str, length: int = MAX_LENGTH) -> str:
    """A text with its middle left out if it is longer than that: the cause stands in front, the remedy at the end."""
    if len(text) <= length:
        return text
    kept = length // 2
    return f"{text[:kept]} […] {text[-kept:]}"


class UserError(ValueError):
    """What a user's settings or data make impossible; its text names the remedy.

    Attributes:
        owner: the class that says so, where the text does not name it yet: see `attributed`.
    """

    owner: str | None = None

    def __str__(self) -> str:
        """The text, with its owner in front; what it quotes may be of any length, and is cut."""
        text = super().__str__()
        if "Traceback (most recent call last)" not in text:  # of a worker: its loader takes the traceback off
            text = shortened(text)
        return f"{self.owner}: {text}" if self.owner else text


class UserTypeError(UserError, TypeError):
    """An object of the wrong kind was given."""


class RunError(UserError, RuntimeError):
    """A run cannot go on, for a reason outside of the program: a process was killed, a file is gone."""


class MissingExtraError(UserError, ImportError):
    """A package that an extra of latentdm brings is not installed."""


class attributed(ContextDecorator):  # a class: every batch enters two, and a generator costs more
    """Name the class on whose behalf something is done, in an error of code that serves many.

    Args:
        owner: the name of that class.

    Example:
        >>> with attributed("InpaintEncoder"):
        ...     raise UserError("pixels: the batch is empty")
        Traceback (most recent call last):
        latentdm.errors.UserError: InpaintEncoder: pixels: the batch is empty
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError) and error.owner is None:
            error.owner = self._owner


def __getattr__(name: str) -> Any:
    """What needs Hydra is imported on first use."""
    if name in ("ConfigError", "plain_errors"):
        return getattr(import_module("latentdm.config_errors"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
