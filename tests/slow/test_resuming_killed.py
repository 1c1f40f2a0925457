"""Runs that are killed, resumed, and moved to another number of ranks see what one run on one rank sees."""

from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp

import pytest
from four_sources import COUNT, GLOBAL_BATCH, SOURCES, cache_in, forked, noted, steps, write_sources

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

KILLED = -9
STEPS = {"max_epochs": -1, "max_steps": 2 * (COUNT // GLOBAL_BATCH) + 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def fit(folder, source, notes, ranks=1, status=0, **settings):
    """Train; step → what all ranks saw, together."""
    notes.mkdir(exist_ok=True)
    assert forked(folder, source, notes, ranks=ranks, **settings) == status
    seen = noted(notes, ranks)
    for rank in range(ranks):
        (notes / f"rank{rank}").unlink()
    return {step: (epoch, set(digests)) for step, (epoch, digests, _) in seen.items()}


@cache
def straight(folder, source):
    """What one rank sees to which nothing happens."""
    return fit(folder, source, Path(mkdtemp(dir=folder)))


def until(seen, last):
    return {step: samples for step, samples in seen.items() if step <= last}


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_of_max_steps_goes_on_at_an_epoch_s_end_and_within(folder, source, tmp_path):
    """Killed in the middle of the second epoch, after a checkpoint at the first one's end, or of three steps more."""
    for number, (save, workers) in enumerate(product(("epochs", "steps"), (0, 2))):
        notes, run = tmp_path / f"{number}", {"workers": workers, "save": save, **STEPS}
        first = fit(folder, source, notes, status=KILLED, kill=COUNT // GLOBAL_BATCH + 5, **run)
        rest = fit(folder, source, notes, resume=True, **run)
        assert min(rest) <= max(first) + 1
        assert first | rest == until(straight(folder, source), STEPS["max_steps"])
        assert until(rest, max(first)) == {step: samples for step, samples in first.items() if step in rest}


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_moves_from_two_ranks_to_one_to_two_to_four_and_back(folder, source, tmp_path):
    seen = {}
    for ranks, last in ((2, 2), (1, 3), (2, 4), (4, 7), (1, 12)):
        seen |= fit(folder, source, tmp_path, ranks, save="each", resume=True, max_epochs=-1, max_steps=last)
    assert seen == until(straight(folder, source), 12)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_ranks_and_workers_change_nothing(folder, source, tmp_path):
    alone = [set(step) for step in steps(folder, source, epoch=1)]
    for ranks, workers in product((1, 2, 4), (0, 1, 3)):  # one rank after another, and then two at once
        assert [set(step) for step in steps(folder, source, ranks, workers, epoch=1)] == alone
    assert fit(folder, source, tmp_path, 2, workers=1) == straight(folder, source)


@pytest.mark.parametrize("source", ["squares", "buckets"])
def test_a_cache_changes_nothing_that_is_seen(folder, source, tmp_path):
    """It is filled by a run that is killed, and read by one on two ranks; then one in memory does both."""
    data = {"random_crop": False}
    whole = fit(folder, source, tmp_path / "whole", data=data)
    on_disk = {"data": {**data, "cache": cache_in(tmp_path / "cache")}}
    first = fit(folder, source, tmp_path / "disk", status=KILLED, kill=9, workers=2, save="each", **on_disk)
    rest = fit(folder, source, tmp_path / "disk", 2, workers=2, resume=True, **on_disk)
    assert first | rest == whole
    in_memory = {"data": {**data, "cache": cache_in(None)}}
    assert fit(folder, source, tmp_path / "memory", 2, **in_memory) == whole


@pytest.mark.parametrize("source", SOURCES)
def test_nor_do_ranks_workers_and_a_kill_where_crops_are_variants_of_a_cache(folder, source, tmp_path):
    def data(name):
        return {"data": {"cache": cache_in(tmp_path / name, variants=2)}}

    whole = fit(folder, source, tmp_path / "whole", **data("one"))
    first = fit(folder, source, tmp_path / "run", 2, status=1, kill=9, workers=2, save="each", **data("two"))
    rest = fit(folder, source, tmp_path / "run", resume=True, **data("two"))
    assert first | rest == whole
    assert fit(folder, source, tmp_path / "read", 2, **data("one")) == whole  # where all was encoded before
