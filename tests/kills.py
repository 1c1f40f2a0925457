"""Kills runs of all four sources at random steps until they have ended: ``python tests/kills.py --kills 60``.

Prints a line of JSON for each kind of run: its kills and resumes, the steps that differ from a run that was left alone,
and whether the last weights are the same to the bit.
"""

import json
import random
import sys
from argparse import ArgumentParser
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from four_sources import SOURCES, forked, noted, write_sources  # noqa: E402

RUN = {"max_epochs": -1, "max_steps": 15}


def tortured(folder, source, notes, chance, **settings):
    """Kill and resume until the run has ended; returns the number of kills."""
    kills = 0
    while True:
        ended = forked(folder, source, notes, kill=chance.randint(2, 9), resume=True, **settings)
        if ended == 0:
            return kills
        if ended != -9:
            raise SystemExit(f"{source}: a run ended with {ended}")
        kills += 1


def main():
    """Parse the command line and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="at least so many in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    torch.set_num_threads(1)
    total = 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        kinds = list(product(("steps", "epochs"), (0, 2), SOURCES))
        straight = {}
        while total < options.kills:
            for number, (save, workers, source) in enumerate(kinds):
                if source not in straight:
                    notes = folder / f"straight_{source}"
                    notes.mkdir()
                    assert forked(folder, source, notes, **RUN) == 0
                    straight[source] = noted(notes), torch.load(notes / "weights.pt")
                notes = folder / f"{total}_{number}"
                notes.mkdir()
                kills = tortured(folder, source, notes, chance, workers=workers, save=save, **RUN)
                expected, weights = straight[source]
                steps, last = noted(notes), torch.load(notes / "weights.pt")
                row = {
                    "source": source,
                    "workers": workers,
                    "save": save,
                    "kills": kills,
                    "resumes": kills,
                    "steps": len(expected),
                    "digest_mismatches": sum(steps.get(step) != seen for step, seen in expected.items()),
                    "weight_mismatches": sum(not torch.equal(last[name], weight) for name, weight in weights.items()),
                }
                print(json.dumps(row), flush=True)
                total += kills
                if total >= options.kills:
                    break


if __name__ == "__main__":
    main()
