"""A user's mistake: an error of its own kind, told in one line. A bug keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UserError(ValueError):
    """What a user's settings or data make impossible; its text names the remedy.

    Attributes:
        owner: the class that says so, where the text does not name it yet: see `attributed`.
    """

    owner: str | None = None

    def __str__(self) -> str:
        """The text, with its owner in front."""
        return f"{self.owner}: {super().__str__()}" if self.owner else super().__str__()


class UserTypeError(UserError, TypeError):
    """An object of the wrong kind was given."""


class RunError(UserError, RuntimeError):
    """A run cannot go on, for a reason outside of the program: a process was killed, a file is gone."""


class MissingExtraError(UserError, ImportError):
    """A package that an extra of latentdm brings is not installed."""


@contextmanager
def attributed(owner: str) -> Iterator[None]:
    """Name the class on whose behalf something is done, in an error of code that serves many.

    Example:
        >>> with attributed("InpaintEncoder"):
        ...     raise UserError("pixels: the batch is empty")
        Traceback (most recent call last):
        latentdm.errors.UserError: InpaintEncoder: pixels: the batch is empty
    """
    try:
        yield
    except UserError as error:
        if error.owner is None:
            error.owner = owner
        raise


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
