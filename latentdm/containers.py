"""What a batch may be: a dict, a tuple, a list or a dataclass; how its items are read, and how it is built anew."""

from collections.abc import Iterable, Mapping, MutableMapping, Set
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from latentdm.errors import UserError

MAPPINGS = (dict, Mapping)
"""What a dict batch may be. A plain dict is known at once, where the abstract class alone would take its time."""

_BATCHES = (tuple, list, *MAPPINGS)


def is_batch(batch: object) -> bool:
    """Whether something is a batch that can hold images: a dict, tuple, list or dataclass."""
    return isinstance(batch, _BATCHES) or (is_dataclass(batch) and not isinstance(batch, type))


def fields_of(batch: Any) -> dict[str, Any] | None:
    """The fields of a dataclass or of a named tuple; None for anything else."""
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    return batch._asdict() if isinstance(batch, tuple) and hasattr(batch, "_asdict") else None


def items_of(batch: Any) -> Iterable[tuple[Any, Any]]:
    """Key or position → value, of all that a batch holds."""
    if isinstance(batch, MAPPINGS):
        return batch.items()
    named = fields_of(batch)
    return enumerate(batch) if named is None else named.items()


def is_frozen(batch: Any) -> bool:
    """Whether a batch is a frozen dataclass: Lightning does not move one to a device."""
    return is_dataclass(batch) and not isinstance(batch, type) and batch.__dataclass_params__.frozen  # type: ignore[attr-defined]


def rebuild(batch: Any, placed: Mapping[Any, Any], leaving: Set[Any] = frozenset()) -> Any:
    """A batch of the same kind with some places filled, and for a dict some keys gone; the batch itself stays as it is.

    A named tuple whose positions grow becomes a plain one. Where the fields of a dataclass or of a named tuple would be
    others than before, or are frozen, the batch becomes a dict whose keys are attributes as well.
    """
    if isinstance(batch, MAPPINGS):
        # a plain dict is known at once
        keeps_kind = type(batch) is not dict and isinstance(batch, MutableMapping)
        rebuilt: Any = copy(batch) if keeps_kind else dict(batch)
        for key in leaving:
            rebuilt.pop(key, None)
        rebuilt.update(placed)
        return rebuilt
    named = fields_of(batch)
    if named is not None and not any(isinstance(key, int) for key in placed):
        return _rebuilt_fields(batch, named, placed, leaving - placed.keys())
    items = {**dict(enumerate(batch)), **placed}
    if max(items) >= len(items):
        raise UserError(
            f"LatentDataModule: keys: position {max(items)} leaves a gap after a batch of {len(batch)}; "
            f"use {len(batch)}"
        )
    row = [items[position] for position in range(len(items))]
    if hasattr(batch, "_make") and len(row) == len(batch):
        return batch._make(row)
    return row if isinstance(batch, list) else tuple(row)


def _rebuilt_fields(batch: Any, named: dict[str, Any], placed: Mapping[Any, Any], leaving: Set[Any]) -> Any:
    if not placed.keys() <= named.keys() or leaving & named.keys() or is_frozen(batch):
        from lightning.fabric.utilities.data import AttributeDict  # late: an encoder in a notebook does not need it

        return AttributeDict({**{key: value for key, value in named.items() if key not in leaving}, **placed})
    if isinstance(batch, tuple):
        return batch._replace(**placed)  # type: ignore[attr-defined]
    rebuilt = copy(batch)  # its __init__ may check, or change, what it is given
    for key, value in placed.items():
        setattr(rebuilt, key, value)
    return rebuilt
