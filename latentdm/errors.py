"""A user's mistake, told in one line; a bug keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb

from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

PACKAGE = Path(__file__).parent


class Mistake(CompactHydraException):
    """Of these Hydra prints the text alone; with ``HYDRA_FULL_ERROR=1`` what led to it as well."""


@contextmanager
def plain_errors(cfg: DictConfig) -> Iterator[None]:
    """Tell what is wrong with the settings or the data without a page of traceback, inside of a Hydra app's ``main``.

    Args:
        cfg: the app's config, in which a missing value is looked up by the name that a person types.

    Raises:
        Mistake: a value is missing, or latentdm raised an error on purpose. Any other exception passes.

    Example:
        ``with plain_errors(cfg): train(cfg)``
    """
    try:
        yield
    except Exception as error:
        said = _said(error, cfg)
        if said is None:
            raise
        raise Mistake(said)  # noqa: B904  # Hydra prints a cause of OmegaConf's too; the context is kept for a full error


def _said(error: Exception, cfg: DictConfig) -> str | None:
    """The line to print; None for what may be a bug."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # Hydra wraps what a class says
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        name = _typed(error.full_key, cfg)
        return f"{name} has no value; give it one: {name}=…"
    if isinstance(error, OmegaConfBaseException):
        return " ".join(str(error).split())
    return str(error) if _meant(error) else None


def _meant(error: Exception) -> bool:
    """Whether a ``raise`` of this package made it, and not an operation that failed here or elsewhere."""
    last = extract_tb(error.__traceback__, limit=-1)
    return bool(last) and Path(last[0].filename).is_relative_to(PACKAGE) and (last[0].line or "").startswith("raise ")


def _typed(key: str, cfg: DictConfig) -> str:
    """The shortest end of a key that has no value in ``cfg``: ``datamodule.encoder.vae.source`` → ``vae.source``."""
    names = key.split(".")
    for first in reversed(range(len(names))):
        *group, name = names[first:]
        node = OmegaConf.select(cfg, ".".join(group)) if group else cfg
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
            return ".".join([*group, name])
    return key
