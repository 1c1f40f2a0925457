"""Runs that are killed, resumed, and moved to another number of ranks see what one run on one rank sees."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import four_sources
import pytest
import torch
from four_sources import SOURCES, noted, write_sources

KILLED = -9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def run(folder, source, notes, *options, ends_with=0):
    """A fit in a process of its own, or of its ranks."""
    command = [sys.executable, "-W", "ignore", four_sources.__file__, folder, source, notes, *options]
    root = Path(four_sources.__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == ends_with, done.stderr


@cache
def straight(folder, source):
    """What a run sees that nothing happens to, and its last weights."""
    notes = Path(mkdtemp(dir=folder))
    run(folder, source, notes)
    return noted(notes), torch.load(notes / "weights.pt")


def sets(steps):
    return {step: (epoch, set(digests)) for step, (epoch, digests, _) in steps.items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("workers", "save", "kills"), [(0, "steps", (2, 8)), (2, "epochs", (8, 6))])
def test_a_killed_run_ends_as_if_nothing_had_happened(folder, source, workers, save, kills, tmp_path):
    options = ("--workers", workers, "--save", save, "--resume", "--max-epochs", -1, "--max-steps", 15)
    for kill in kills:
        run(folder, source, tmp_path, *options, "--kill", kill, ends_with=KILLED)
    run(folder, source, tmp_path, *options)
    steps, weights = noted(tmp_path), torch.load(tmp_path / "weights.pt")
    expected, _ = straight(folder, source)
    assert steps == {step: expected[step] for step in range(1, 16)}
    if len(expected) == 15:
        for name, weight in straight(folder, source)[1].items():
            assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_moves_from_one_rank_to_two_to_four_and_back(folder, source, tmp_path):
    steps = {}
    for ranks, until in ((1, 2), (2, 4), (4, 7), (1, 12)):
        run(
            folder,
            source,
            tmp_path,
            "--ranks",
            ranks,
            "--max-epochs",
            -1,
            "--max-steps",
            until,
            "--save",
            "each",
            "--resume",
        )
        steps |= {step: seen for step, seen in noted(tmp_path, ranks).items() if step <= until}
        for rank in range(ranks):
            (tmp_path / f"rank{rank}").unlink()
    expected, _ = straight(folder, source)
    assert sets(steps) == {step: seen for step, seen in sets(expected).items() if step <= 12}


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_and_workers_change_nothing(folder, source, tmp_path):
    for ranks, workers in ((2, 1), (4, 0)):
        notes = tmp_path / f"{ranks}"
        notes.mkdir()
        run(folder, source, notes, "--ranks", ranks, "--workers", workers)
        assert sets(noted(notes, ranks)) == sets(straight(folder, source)[0])
