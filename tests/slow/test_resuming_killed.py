"""Runs that are killed, resumed, and moved to another number of ranks see what one run on one rank sees."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import kills
import pytest
from four_sources import SOURCES, forked, noted, write_sources

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def fit(folder, source, notes, ranks=1, **settings):
    """Train; step → what all ranks saw, together."""
    assert forked(folder, source, notes, ranks=ranks, **settings) == 0
    seen = noted(notes, ranks)
    for rank in range(ranks):
        (notes / f"rank{rank}").unlink()
    return {step: (epoch, set(digests)) for step, (epoch, digests, _) in seen.items()}


@cache
def straight(folder, source):
    """What one rank sees to which nothing happens."""
    return fit(folder, source, Path(mkdtemp(dir=folder)))


def test_killed_runs_end_as_if_nothing_had_happened():
    command = [sys.executable, "-W", "ignore", kills.__file__, "--kills", "40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["source"] for row in rows} == set(SOURCES)
    assert sum(row["kills"] for row in rows) >= 40
    for row in rows:
        assert row["digest_mismatches"] == row["weight_mismatches"] == 0, row


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_moves_from_one_rank_to_two_to_four_and_back(folder, source, tmp_path):
    steps = {}
    for ranks, until in ((1, 2), (2, 4), (4, 7), (1, 12)):
        steps |= fit(folder, source, tmp_path, ranks, save="each", resume=True, max_epochs=-1, max_steps=until)
    assert steps == {step: seen for step, seen in straight(folder, source).items() if step <= 12}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (4, 0), (1, 2)])
def test_ranks_and_workers_change_nothing(folder, source, ranks, workers, tmp_path):
    assert fit(folder, source, tmp_path, ranks, workers=workers) == straight(folder, source)
