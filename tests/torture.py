"""Kills training runs and lets them go on: ``python -m tests.torture --minutes 20``, or ``--kills 60``.

For each source, on one rank and on two, a run is recorded that nothing disturbs. Then runs with 0 and 2 workers that
save by steps and by epochs are ended by SIGKILL at random moments, of all ranks or of one, and started again, until
they come to their end: what every step saw must be the same, and on one rank the final weights as well, to the bit. The
rest of the time runs that are long show whether memory and descriptors grow; they are told to stop. One row of JSON a
source, and one of all, goes to the standard output:

``settings``: tried, of 16. ``kills``, ``resumes``: of runs. ``digest_mismatches``: samples that a step saw and ought
not to have seen, or that were never seen in a run that came to its end. ``weight_mismatches``: runs that came to other
weights. ``hangs``: processes that took no step and did not end within ``PATIENCE_S`` seconds; their stacks are printed.
``failures``: processes that ended otherwise than they should. ``leaked_descriptors``: open at the end of a long run and
not at its beginning. ``memory_slope_kib_per_1000_steps``: of resident memory, least squares.

The exit status is 0 where nothing of this went wrong; memory is left to the reader. The folders of runs that went wrong
stay, with what each rank printed and saw, and in ``faults.jsonl`` what it was.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from witness import EPOCH_LENGTH, SHOW_STACKS, SOURCES, Run, rows, start, steps_seen, weights, write_data

PATIENCE_S = 120
LOOK_EVERY_S = 0.005
SOAK_SHARE = 0.3
"""Of the time, for the long runs."""
COUNTS = ("kills", "resumes", "digest_mismatches", "weight_mismatches", "hangs", "failures", "leaked_descriptors")
FAULTS = COUNTS[2:]


@dataclass(frozen=True)
class Variant:
    """Settings that a source is tried with, in turn."""

    ranks: int
    workers: int
    save_every: int
    by_epochs: bool

    def run(self, source, data, folder):
        length = {"epochs": 3} if self.by_epochs else {"steps": 2 * EPOCH_LENGTH // 4 + 3}
        return Run(
            source, data, folder, self.ranks, workers=self.workers, save_every=self.save_every,
            timeout_s=PATIENCE_S // 3, **length,
        )  # fmt: skip


VARIANTS = [
    Variant(ranks, workers, save_every, by_epochs)
    for by_epochs, save_every, workers, ranks in itertools.product((False, True), (3, 0), (0, 2), (1, 2))
]


class Torture:
    """A campaign.

    Args:
        folder: for data and runs.
        minutes: that it takes, about.
        kills: that there are at the least, however long it takes.
        seed: of the moments of the kills.
    """

    def __init__(self, folder, minutes=0.0, kills=0, seed=0):
        self.folder = Path(folder)
        self.kills = kills
        self.random = random.Random(seed)
        self.time_is_over = threading.Event()
        timer = threading.Timer(60 * minutes * (1 - SOAK_SHARE), self.time_is_over.set)
        timer.daemon = True
        timer.start()
        self.soak_s = 60 * minutes * SOAK_SHARE / len(SOURCES)
        self.counts = {source: Counter(dict.fromkeys(COUNTS, 0)) for source in SOURCES}
        self.tried = {source: set() for source in SOURCES}
        self.slopes = dict.fromkeys(SOURCES)
        self.expected = {}  # (source, ranks, by epochs) → as of `undisturbed`
        self.numbers = itertools.count()

    def torture(self):
        """Run it; the rows."""
        write_data(self.folder / "data")
        rounds = list(itertools.product(SOURCES, VARIANTS))
        for source, variant in itertools.cycle(self.random.sample(rounds, len(rounds))):
            if self.time_is_over.is_set() and self.total()["kills"] >= self.kills:
                break
            self.try_one(source, variant)
        for source in SOURCES if self.soak_s else ():
            self.soak(source)
        slopes = [slope for slope in self.slopes.values() if slope is not None]
        each = [
            self.row(source, len(self.tried[source]), self.counts[source], self.slopes[source]) for source in SOURCES
        ]
        tried = len(set.union(*self.tried.values()))
        return [*each, self.row("all", tried, self.total(), max(slopes, default=None))]

    def total(self):
        """The counts of all sources."""
        return sum(self.counts.values(), Counter(dict.fromkeys(COUNTS, 0)))

    def row(self, source, settings, counts, slope):
        return {"source": source, "settings": settings} | {name: counts[name] for name in COUNTS} | {
            "memory_slope_kib_per_1000_steps": None if slope is None else round(slope, 1)
        }  # fmt: skip

    def new_run(self, source, variant):
        return variant.run(source, str(self.folder / "data"), str(self.folder / f"run{next(self.numbers)}"))

    def try_one(self, source, variant):
        """One run that is killed up to three times."""
        counts, kind = self.counts[source], (source, variant.ranks, variant.by_epochs)
        if not self.expected.get(kind, [None])[0]:
            self.expected[kind] = self.undisturbed(source, replace(variant, workers=0, save_every=0))
        seen, final = self.expected[kind]
        if not seen:
            return
        self.tried[source].add(variant)
        run = self.new_run(source, variant)
        before = sum(counts[name] for name in FAULTS)
        for _ in range(self.random.randint(1, 3)):
            processes = start(run)
            counts["resumes"] += bool(rows(run))
            if not self.kill(run, processes, counts, len(seen)):
                break
        else:
            counts["resumes"] += 1
            self.finish(run, start(run), counts, [0])
        self.compare(run, seen, final, counts)
        if sum(counts[name] for name in FAULTS) == before:
            shutil.rmtree(run.folder)

    def undisturbed(self, source, variant):
        """(rank, step) → samples, and the final weights, of a run that nothing disturbs."""
        run = self.new_run(source, variant)
        self.finish(run, start(run), self.counts[source], [0])
        final = weights(run)
        if not final:
            return {}, []  # it did not end, which was counted
        seen = {step: times[0] for step, times in steps_seen(run).items()}
        shutil.rmtree(run.folder)
        return seen, final

    def kill(self, run, processes, counts, steps):
        """Kill all ranks or one, at a random step and a random moment of it; False where the run was faster."""
        target, before = self.random.randint(1, steps), len(rows(run))
        looks = int(PATIENCE_S / LOOK_EVERY_S)
        while looks and all(process.is_alive() for process in processes) and len(rows(run)) < before + target:
            processes[0].join(LOOK_EVERY_S)
            looks -= 1
        if not looks:
            self.fault(run, counts, "hangs")
            show_stacks(processes)
        processes[0].join(self.random.random() * 0.03)
        victims = processes if self.random.random() < 0.5 else [self.random.choice(processes)]
        alive = [process for process in victims if process.is_alive()]
        for process in alive:
            process.kill()
        # A rank that misses another one ends with an error; where all had come to their end nothing was killed.
        self.finish(run, processes, counts, [0, 1, -signal.SIGKILL])
        killed = any(process.exitcode == -signal.SIGKILL for process in processes)
        counts["kills"] += killed
        return killed

    def finish(self, run, processes, counts, statuses):
        """Wait until all have ended, with one of these statuses."""
        for rank, process in enumerate(processes):
            steps = -1
            while process.is_alive() and steps < (steps := len(rows(run))):
                process.join(PATIENCE_S)
            if process.is_alive():
                self.fault(run, counts, "hangs", rank=rank)
                show_stacks([process])
                process.kill()
                process.join()
            elif process.exitcode not in statuses:
                self.fault(run, counts, "failures", rank=rank, status=process.exitcode)

    def compare(self, run, seen, final, counts):
        """Count what differs from the run that nothing disturbed."""
        found, ends = steps_seen(run), weights(run)
        for step in found.keys() | (seen.keys() if ends else ()):
            expected = seen.get(step, [])
            for samples in found.get(step, [[]]):
                wrong = sum(mine != other for mine, other in itertools.zip_longest(samples, expected))
                if wrong:
                    self.fault(run, counts, "digest_mismatches", wrong, step=step, seen=samples, expected=expected)
        if run.ranks == 1 and ends and ends[-1:] != final[-1:]:
            self.fault(run, counts, "weight_mismatches")

    def fault(self, run, counts, name, count=1, **details):
        """Count what went wrong, and note it."""
        counts[name] += count
        with (self.folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps({"fault": name, "run": asdict(run)} | details) + "\n")

    def soak(self, source):
        """One long run, told to stop when its time is over: memory and descriptors."""
        run = replace(
            Variant(1, 0, 50, True).run(source, str(self.folder / "data"), str(self.folder / source)), epochs=-1
        )
        [process] = start(run)
        process.join(self.soak_s)
        if process.is_alive():
            process.terminate()
        counts = self.counts[source]
        self.finish(run, [process], counts, [128 + signal.SIGTERM])
        watched = [row for _, row in rows(run) if "resident_kib" in row]
        early, late = watched[: len(watched) // 2], watched[len(watched) // 2 :]
        if len(early) > 2:
            # The fewest: a shard that is being read is open, and is closed again.
            before, after = (min(row["descriptors"] for row in some) for some in (early, late))
            counts["leaked_descriptors"] += max(0, after - before)
            # The second half: at first allocators and caches fill.
            steps, resident = ([row[name] for row in late] for name in ("step", "resident_kib"))
            self.slopes[source] = float(1000 * np.polyfit(steps, resident, 1)[0])


def show_stacks(processes):
    """Let processes print what they are doing."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, SHOW_STACKS)
        process.join(100 * LOOK_EVERY_S)


def main():
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0, help="how long, about")
    parser.add_argument("--kills", type=int, default=0, help="how many at the least, however long it takes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    settings = parser.parse_args()
    folder = mkdtemp(prefix="torture-")
    print(f"the runs lie in {folder}", file=sys.stderr, flush=True)
    torture = Torture(folder, settings.minutes, settings.kills, settings.seed)
    table = torture.torture()
    for row in table:
        print(json.dumps(row))
    wrong = any(table[-1][name] for name in FAULTS)
    if not settings.keep and not wrong:
        shutil.rmtree(folder)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
