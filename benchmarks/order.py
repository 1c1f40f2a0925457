"""The order of an epoch: what it holds, how long the first batch takes, and each one after it.

One rank of eight with 16 samples a batch, in the middle of an epoch, as after a resume.
"""

import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.rows import row
from latentdm.data.order import GlobalOrder, Key

RANKS, BATCH = 8, 16


class _Samples:
    """So many samples, perhaps in buckets, which the dataset holds anyway."""

    def __init__(self, count: int, bucket_of: npt.NDArray[np.uint8] | None = None) -> None:
        self.count = count
        self.bucket_of = bucket_of

    def __len__(self) -> int:
        return self.count


@cache
def _bucketed(count: int) -> _Samples:
    return _Samples(count, np.random.default_rng(0).integers(0, 33, count, dtype=np.uint8))


def _batches(samples: Any) -> Iterator[list[Key]]:
    """The batches of a rank from the middle of an epoch on."""
    order = GlobalOrder(samples, BATCH, num_replicas=RANKS, rank=3, drop_last=True)
    return order.batches(1, [(RANKS * BATCH, len(samples) // (2 * RANKS * BATCH))])


def _bytes(samples: Any) -> float:
    tracemalloc.start()
    batches = _batches(samples)
    next(batches)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(samples)


def _start(samples: Any) -> float:
    seconds = []
    for _ in range(5):
        began = perf_counter()
        next(_batches(samples))
        seconds.append(perf_counter() - began)
    return median(seconds)


def _batch(samples: Any) -> float:
    batches = _batches(samples)
    next(batches)
    microseconds = []
    for _ in range(5):
        began = perf_counter()
        for _ in range(200):
            next(batches)
        microseconds.append((perf_counter() - began) / 200 * 1e6)
    return median(microseconds)


_SIZES: dict[str, tuple[int, Callable[[int], Any], str]] = {
    "": (10**8, _Samples, "10⁸ samples"),
    "_1e6": (10**6, _Samples, "10⁶ samples"),
    "_buckets": (10**8, _bucketed, "10⁸ samples in 33 buckets, beside the dataset's one byte of each"),
    "_buckets_1e6": (10**6, _bucketed, "10⁶ samples in 33 buckets, beside the dataset's one byte of each"),
}
_MEASURES: dict[str, tuple[Callable[[Any], float], str, str]] = {
    "order_bytes_per_sample": (_bytes, "bytes", "aim: below 1 on each rank; a stored permutation takes 8"),
    "order_start_s": (_start, "s", "until the first batch in the middle of an epoch; aim: below 1"),
    "order_us_per_batch": (_batch, "µs", f"a rank's batch of {BATCH}"),
}
for _name, (_measure, _unit, _what) in _MEASURES.items():
    for _suffix, (_count, _make, _which) in _SIZES.items():

        @row(_name + _suffix, _unit, f"{_which}; {_what}")
        def _row(
            quick: bool,
            measure: Callable[[Any], float] = _measure,
            make: Callable[[int], Any] = _make,
            count: int = _count,
        ) -> float:
            return measure(make(count))
