"""`plain_errors`: a mistake in the settings is told in one line. Public as ``latentdm.errors.plain_errors``.

A module of its own, as it needs Hydra, which an encoder in a notebook does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from latentdm.errors import UserError


class ConfigError(CompactHydraException):
    """Of these Hydra prints the text alone; with ``HYDRA_FULL_ERROR=1`` what led to it as well."""


@contextmanager
def plain_errors(cfg: DictConfig) -> Iterator[None]:
    """Tell what is wrong with the settings or the data without a page of traceback, inside of a Hydra app's ``main``.

    Args:
        cfg: the app's config, in which a missing value is looked up by the name that a person types.

    Raises:
        ConfigError: a value is missing, or latentdm found a `UserError`. Any other exception passes.

    Example:
        ``with plain_errors(cfg): train(cfg)``
    """
    try:
        yield
    except Exception as error:
        text = _message(error, cfg)
        if text is None:
            raise
        raise ConfigError(text)  # noqa: B904  # Hydra prints a cause of OmegaConf's; the context is kept for a full error


def _message(error: Exception, cfg: DictConfig) -> str | None:
    """The line to print; None for what may be a bug."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # Hydra wraps what a class raises
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        name = _shortest_key(error.full_key, cfg)
        return f"{name} has no value; give it one: {name}=…"
    if isinstance(error, OmegaConfBaseException):
        return " ".join(str(error).split())
    return str(error) if isinstance(error, UserError) else None


def _shortest_key(key: str, cfg: DictConfig) -> str:
    """The shortest end of a key that has no value in ``cfg``: ``datamodule.encoder.vae.source`` → ``vae.source``."""
    names = key.split(".")
    for first in reversed(range(len(names))):
        *group, name = names[first:]
        node = OmegaConf.select(cfg, ".".join(group)) if group else cfg
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
            return ".".join([*group, name])
    return key
