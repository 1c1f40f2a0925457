"""The rows of a benchmark: functions registered by name, in any module of this folder."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
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


@contextmanager
def own_processes(makers: Mapping[str, Callable[[], Callable[[], None]]]) -> Iterator[dict[str, Callable[[], float]]]:
    """Each function in a process of its own, which makes it and then runs it when it is asked to.

    Args:
        makers: name → what makes the function; pickled, so a function of a module or a ``partial`` of one.

    Yields:
        Name → a function that runs it there and returns its seconds, as `interleaved` takes them.
    """
    context = get_context("spawn")  # a forked process would share what this one has done to its memory
    with ExitStack() as stack:
        functions: dict[str, Callable[[], float]] = {}
        for name, maker in makers.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(maker, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is noticed
            stack.callback(process.join)
            stack.callback(ours.close)
            functions[name] = partial(_ask, ours)
        yield functions


def _ask(connection: Connection) -> float:
    """Have a process run its function; seconds."""
    connection.send(None)
    return float(connection.recv())


def _serve(maker: Callable[[], Callable[[], None]], connection: Connection) -> None:
    function = maker()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        began = perf_counter()
        function()
        connection.send(perf_counter() - began)
