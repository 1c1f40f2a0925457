"""What ends a run leaves a checkpoint that goes on, and an exit status that says so: signals, errors, a full disk."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from running import ROOT
from witness import Run, context, save_for_ever, start, steps_seen, weights

PATIENCE_S = 100
"""Seconds for a process to start or to end on a busy machine."""
STEPS, TROUBLE = 15, 6
TIMEOUT_S = 10


@pytest.fixture(scope="module")
def undisturbed(witness_data, tmp_path_factory):
    """Ranks → a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {ranks: run_of(witness_data, folder / f"{ranks}", ranks=ranks) for ranks in (1, 2)}
    for run in runs.values():
        assert end(start(run)) == [0] * run.ranks
    return runs


def run_of(data, folder, timeout_s=TIMEOUT_S, **settings):
    return Run("buckets", str(data), str(folder), steps=STEPS, timeout_s=timeout_s, **settings)


def end(processes):
    """The exit statuses of processes, all of which end; what is left of them is killed."""
    for process in processes:
        process.join(PATIENCE_S)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def said(run, rank=0):
    """What a rank of `start` printed."""
    with open(f"{run.folder}/output.{rank}.txt") as file:
        return file.read()


def goes_on_as(run, undisturbed):
    """Start a run again; all in all it saw what the other saw, and came to the same weights."""
    assert weights(run) == []
    again = replace(run, trouble=None)
    assert end(start(again)) == [0] * run.ranks, said(run)
    expected = steps_seen(undisturbed)
    found = steps_seen(run)
    assert found.keys() == expected.keys()
    assert all(times == expected[step] * len(times) for step, times in found.items())
    if run.strategy == undisturbed.strategy:  # another one adds gradients up in another order
        assert weights(run) == weights(undisturbed)
    return found


# ---------------------------------------------------------------- alone


@pytest.mark.parametrize(
    ("trouble", "status", "repeated"),
    [
        ("SIGTERM", 128 + signal.SIGTERM, set()),
        ("SIGINT", 128 + signal.SIGINT, set()),
        ("exception", 1, set()),
        ("exception within", 1, {TROUBLE}),
    ],
)
def test_what_ends_a_run_is_saved_and_goes_on(trouble, status, repeated, witness_data, undisturbed, tmp_path):
    run = run_of(witness_data, tmp_path / "run", trouble=trouble, trouble_step=TROUBLE)
    assert end(start(run)) == [status], said(run)
    assert f"step {TROUBLE}" in said(run) or "ArithmeticError" in said(run)
    found = goes_on_as(run, undisturbed[1])
    # It was saved at the very step; one that the trouble came in the middle of is done again.
    assert {step for (_, step), times in found.items() if len(times) > 1} == repeated


def test_a_full_disk_leaves_the_checkpoint_before(witness_data, undisturbed, tmp_path):
    run = run_of(witness_data, tmp_path / "run", save_every=5, trouble="disk", trouble_step=TROUBLE)
    assert end(start(run)) == [1]
    for part in ("last.ckpt", "could not be written", "the one before stays", "File too large", "ckpt_path=last"):
        assert part in said(run)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert not list((tmp_path / "run").glob(".*"))  # nothing half-written takes up room
    found = goes_on_as(run, undisturbed[1])
    assert {step for (_, step), times in found.items() if len(times) > 1} == set(range(5, 10))


def test_a_run_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """With the temporary folder on another file system, as it often is, Lightning's own leaves a torn file."""
    path = tmp_path / "last.ckpt"
    for kill in range(8):
        process = context.Process(target=save_for_ever, args=(str(path), "/dev/shm"))
        process.start()
        while not path.exists() and process.is_alive():
            process.join(0.01)
        process.join(0.5 + 0.01 * kill)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        values = torch.load(path, weights_only=True)["weights"]
        assert len(values) == 2**23
        assert len(values.unique()) == 1
    assert len(list(tmp_path.iterdir())) <= 2  # what a kill leaves half-written is written over, and does not pile up


# ---------------------------------------------------------------- on two ranks


@pytest.mark.parametrize(("trouble", "rank"), [("SIGTERM", 0), ("SIGTERM", 1), ("SIGINT", 1)])
def test_a_rank_that_is_told_to_stop_stops_all_with_a_checkpoint(trouble, rank, witness_data, undisturbed, tmp_path):
    run = run_of(witness_data, tmp_path / "run", ranks=2, trouble=trouble, trouble_step=TROUBLE, trouble_rank=rank)
    told, other = 128 + signal.Signals[trouble], 128 + signal.SIGTERM
    assert end(start(run)) == [told if rank == each else other for each in (0, 1)], said(run)
    goes_on_as(run, undisturbed[2])


@pytest.mark.parametrize(
    ("trouble", "status", "rank", "strategy"),
    [
        ("SIGKILL", -signal.SIGKILL, 0, None),
        ("SIGKILL", -signal.SIGKILL, 1, None),
        ("SIGSTOP", None, 0, None),
        ("SIGSTOP within", None, 1, "fsdp2"),  # where the mesh's own group waits
        ("exception", 1, 1, None),
    ],
)
def test_a_rank_that_is_gone_ends_the_other_with_an_error(
    trouble, status, rank, strategy, witness_data, undisturbed, tmp_path
):
    there = {"trouble": trouble, "trouble_step": TROUBLE, "trouble_rank": rank}
    run = run_of(witness_data, tmp_path / "run", ranks=2, save_every=5, strategy=strategy, **there)
    processes = start(run)
    other = 1 - rank
    assert end([processes[other]]) == [1], said(run, other)
    if status is None:
        assert processes[rank].is_alive()  # stopped, and still there
    else:
        assert end([processes[rank]]) == [status]
    processes[rank].kill()
    processes[rank].join()
    assert "another rank ended" in said(run, other)
    goes_on_as(run, undisturbed[2])


@pytest.mark.parametrize(
    ("trouble", "status", "saved"), [("SIGTERM", 128 + signal.SIGTERM, TROUBLE), ("SIGSTOP", None, 5)]
)
def test_the_same_under_lightnings_launcher(trouble, status, saved, witness_data, undisturbed, tmp_path):
    """The first rank is the process that a person started, and the second its child."""
    timeout_s = 4 * TIMEOUT_S  # which is also the time that the second process has to start
    trouble_there = {"trouble": trouble, "trouble_step": TROUBLE, "trouble_rank": 1}
    run = run_of(witness_data, tmp_path / "run", timeout_s, ranks=2, save_every=5, **trouble_there)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = tmp_path / "output.txt"
    with output.open("w") as file:  # a pipe would stay open as long as the process that is stopped
        process = subprocess.Popen(run.command(), env=environment, stderr=file, start_new_session=True)
        found = process.wait(PATIENCE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is stopped stays so
    if status is None:
        assert found == 1, output.read_text()
        assert "another rank ended" in output.read_text()
    else:
        assert found == status, output.read_text()
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == saved
    goes_on_as(run, undisturbed[2])


# ---------------------------------------------------------------- the example


def test_the_example_is_stopped_and_goes_on(tmp_path):
    command = [
        sys.executable, str(ROOT / "train_example.py"), "hydra.run.dir=run", "pixels.size=64", "pixels.batch_size=2",
        "trainer.limit_val_batches=1", "~callbacks.sample_preview", "ckpt_path=last",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "trainer.max_steps=100000"], cwd=tmp_path, env=environment)
    while not list(tmp_path.glob("run/previews/*.png")) and process.poll() is None:  # the first step's
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.terminate()
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    stopped_at = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert stopped_at > 0
    again = [*command, f"trainer.max_steps={stopped_at + 2}"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    [last] = (tmp_path / "run" / "checkpoints").iterdir()
    assert torch.load(last, weights_only=True)["global_step"] == stopped_at + 2
