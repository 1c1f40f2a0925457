"""The rows of a benchmark: functions registered by name, in any module of this folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

Measure = Callable[[bool], float | None]


@dataclass(frozen=True)
class Row:
    """A measurement.

    Args:
        name: with its unit at the end.
        unit: of the value.
        versus: what it is measured against, or what it takes to reach the aim.
        measure: gives the value, quick or thorough; None where a quick run leaves it out.
    """

    name: str
    unit: str
    versus: str
    measure: Measure

    def line(self, quick: bool) -> str | None:
        """The measured row as one line of JSON, or None. A row may set torch's threads: the next has them back."""
        threads = torch.get_num_threads()
        try:
            measured = self.measure(quick)
        finally:
            torch.set_num_threads(threads)
        if measured is None:
            return None
        value = float(f"{measured:.4g}")
        return json.dumps(
            {"name": self.name, "value": value, "unit": self.unit, "versus": self.versus}, ensure_ascii=False
        )


ROWS: dict[str, Row] = {}


def row(name: str, unit: str, versus: str) -> Callable[[Measure], Measure]:
    """Register a function as a row.

    Args:
        name: of the row.
        unit: of the number that the function gives.
        versus: what the number compares with.

    Raises:
        ValueError: the name is taken.
    """

    def register(measure: Measure) -> Measure:
        if name in ROWS:
            raise ValueError(f"benchmarks: two rows are called {name!r}")
        ROWS[name] = Row(name, unit, versus, measure)
        return measure

    return register


def interleaved(functions: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; they take turns, so that a busy machine is busy for all of them.

    A function may return the seconds of the part that counts; otherwise the whole call does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        names = list(functions)
        for name in names if turn % 2 == 0 else reversed(names):
            began = perf_counter()
            counted = functions[name]()
            seconds[name].append(perf_counter() - began if counted is None else counted)
    return seconds
