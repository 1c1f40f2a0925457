"""Filling a cache with Ray Data: an actor around the encoder. Ray itself is not needed to import this.

Rows are jobs of `latentdm.cache.wanted.Jobs`, as numbers; images are read by the actor, by the data module's own code.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from latentdm.cache.fill import ready_to_fill
from latentdm.cache.wanted import Jobs, Passed
from latentdm.data.skips import SampleError

MakeDataModule = Callable[[], Any]
"""A function that makes a `latentdm.LatentDataModule` with a cache; Ray sends it to each actor."""


def _prepared(make_datamodule: MakeDataModule, device: torch.device) -> tuple[Any, Jobs]:
    datamodule = make_datamodule()
    return datamodule, Jobs(ready_to_fill(datamodule, device).able())


def jobs(make_datamodule: MakeDataModule) -> list[dict[str, int]]:
    """A row for each image that is to be encoded, in each of its variants."""
    _, found = _prepared(make_datamodule, torch.device("cpu"))
    return [{"job": number} for number in range(len(found))]


class EncodeActor:
    """Encodes jobs into the cache; for ``map_batches`` of Ray Data, or any other engine that calls it.

    Args:
        make_datamodule: see `MakeDataModule`.
        device: where to encode; None: cuda if there is one, else the CPU.

    Example:
        >>> ray.data.from_items(jobs(make)).map_batches(EncodeActor, fn_constructor_args=(make,))  # doctest: +SKIP
    """

    def __init__(self, make_datamodule: MakeDataModule, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.datamodule, self.jobs = _prepared(make_datamodule, self.device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode what is not there.

        Args:
            batch: ``job`` ``n`` integers.

        Returns:
            ``job``, and ``why`` ``n`` texts: why it could not be read, "" where it is in the cache. What is in there
            when this returns stays.
        """
        why, groups = [], dict[tuple[int, ...], list[Any]]()
        for number in batch["job"]:
            try:
                sample = self.jobs[int(number)]
                groups.setdefault(tuple(sample["cached"].sizes[-2:]), []).append(sample)
                why.append("")
            except SampleError as error:
                why.append(str(error))
        for samples in groups.values():
            encoded = self.jobs.collate(samples)
            if not isinstance(encoded, Passed):
                self.datamodule.process(encoded, self.device)
        self.datamodule.cache.flush()
        return {"job": np.asarray(batch["job"]), "why": np.asarray(why, dtype=object)}
