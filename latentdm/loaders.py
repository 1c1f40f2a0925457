"""Loaders that the trainer iterates otherwise than everybody else: the same objects, of classes derived from their own.

So Lightning gives them its samplers, whoever holds one saves its state, and a look at a batch shows it as it is.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor


def each(loaders: Any) -> Iterator[Any]:
    """The loaders in any collection that Lightning takes."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from each(loader)
    else:
        yield loaders


def restored(loader: Any) -> None:
    """Undo what was derived before, perhaps for another data module or trainer."""
    if hasattr(type(loader), "_plain_kind"):
        loader.__class__ = type(loader)._plain_kind


def derived(loader: Any, iterate: Callable[[Any, Iterable[Any]], Any], **members: Any) -> bool:
    """Let the trainer iterate over ``iterate(loader, batches)`` instead of the loader's ``batches``.

    Args:
        loader: what has an ``__iter__`` of its own. Its class is replaced, in place.
        iterate: gives the trainer's iterator.
        members: of the class besides.

    Returns:
        Whether that could be done: not with what has no ``__iter__``, a list or dict, nor what was written in C.
    """
    kind: Any = type(loader)
    if not hasattr(kind, "__iter__") or isinstance(loader, Tensor):
        return False

    def __iter__(self: Any) -> Any:
        batches = kind.__iter__(self)
        return iterate(self, batches) if _trainer_asks() else batches

    plain = getattr(kind, "_plain_kind", kind)
    members = {"__iter__": __iter__, "_plain_kind": plain, "__module__": kind.__module__} | members
    try:
        loader.__class__ = type(kind.__name__, (kind,), members)
    except TypeError:
        return False
    return True


def _trainer_asks() -> bool:
    """Whether Lightning called the ``__iter__`` that asks. It calls a loader's as anybody does: its frame tells."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    return frame.f_globals["__name__"] == CombinedLoader.__module__  # type: ignore[no-any-return]
