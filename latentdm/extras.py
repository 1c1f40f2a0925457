"""Packages that a user may not need are imported late; a missing one is answered with the extra that brings it."""

from importlib import import_module
from typing import Any

from latentdm.errors import MissingExtraError


def require(module: str, extra: str | None, needed_by: str) -> Any:
    """Import an optional module.

    Args:
        module: dotted name, as in ``import module``.
        extra: the extra of latentdm that installs it; None where no extra does.
        needed_by: what asked for it, as the subject of the error.

    Raises:
        MissingExtraError: the module is not installed; it is an ImportError as well.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        wanted = module if extra is None else f"'latentdm[{extra}]'"
        raise MissingExtraError(
            f"{needed_by} needs the package {error.name!r}; install it with: pip install {wanted}"
        ) from error
