"""A shuffled order that is computed where it is asked for, and never stored."""

from math import isqrt

import numpy as np
import numpy.typing as npt

from latentdm.draws import sample_seed

Numbers = npt.NDArray[np.int64]

ROUNDS = 8
"""Of the Feistel network; fewer show in the shuffles of a handful of samples."""


class Permutation:
    """A permutation of 0…count − 1 that follows from (seed, epoch, purpose): any part of it costs what it holds alone.

    A number is a row and a column of a table that is nearly square. In turns the rows are moved by what is drawn for
    the column, and the columns by what is drawn for the row: a Feistel network, each round of which can be undone, and
    so is a permutation of the table. The table has a few cells more than there are numbers; what lands there is sent
    through once more, until it is a number.

    Args:
        count: how many numbers there are.
        seed: the run's seed.
        epoch: the training epoch.
        purpose: what is permuted.

    Example:
        >>> Permutation(5, seed=0, epoch=0, purpose="order")(np.arange(5)).tolist()
        [2, 4, 0, 1, 3]
    """

    def __init__(self, count: int, seed: int, epoch: int, purpose: str) -> None:
        self.count = count
        self._rows = isqrt(max(count - 1, 0)) + 1
        self._columns = -(-count // self._rows) or 1
        keys = [sample_seed(seed, epoch, "dataset", f"{purpose}/{number}") for number in range(ROUNDS)]
        self._keys = np.array(keys, dtype=np.uint64)

    def __call__(self, numbers: Numbers) -> Numbers:
        """Where each number goes: ``n`` int64 in 0…count − 1."""
        moved = self._moved(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(moved >= self.count)):
            moved[outside] = self._moved(moved[outside])
        return moved.astype(np.int64)

    def _moved(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(numbers, columns)
        for number in range(0, ROUNDS, 2):
            row = (row + _scrambled(column + self._keys[number]) % rows) % rows
            column = (column + _scrambled(row + self._keys[number + 1]) % columns) % columns
        moved: npt.NDArray[np.uint64] = row * columns + column
        return moved


def _scrambled(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 bits that look random, each from one number: multiplications by odd constants, with the high bits mixed in."""
    numbers = (numbers ^ (numbers >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    numbers = (numbers ^ (numbers >> np.uint64(29))) * np.uint64(0xA0761D6478BD642F)
    return numbers ^ (numbers >> np.uint64(32))
