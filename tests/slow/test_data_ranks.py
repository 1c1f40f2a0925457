"""Buckets on two ranks, as Lightning starts them: what each rank sees, and where it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bucket_ranks
import pytest
from bucket_ranks import PLAN, SIZES, planned


def lightning(folder, devices, use_distributed_sampler="true", stop=0):
    """Train in other processes; rank → what it saw."""
    command = [sys.executable, bucket_ranks.__file__, folder, devices, use_distributed_sampler, stop]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(bucket_ranks.__file__).parent)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [Path(f"{folder}/seen.rank{rank}") for rank in range(devices)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize("use_distributed_sampler", ["true", "false"])
def test_two_ranks_under_lightning_see_what_was_planned(tmp_path, use_distributed_sampler):
    seen = lightning(tmp_path, 2, use_distributed_sampler)
    for rank in range(2):
        expected = []
        for stage, epoch in (("train", 0), ("train", 1), ("predict", 0)):
            for places in planned(2, epoch, stage == "train")[1][rank]:
                width, height = PLAN.shape(*SIZES[places[0]].tolist())
                expected.append([stage, height, width, places, epoch])
        assert seen[rank] == expected


def test_two_ranks_go_on_in_the_middle_of_an_epoch(tmp_path):
    steps = len(planned(2)[0])
    lightning(tmp_path, 2, stop=steps + 3)
    seen = [[batch for batch in of_rank if batch[0] == "train"] for of_rank in lightning(tmp_path, 2)]
    for rank in range(2):
        assert [batch[3] for batch in seen[rank]] == planned(2)[1][rank] + planned(2, epoch=1)[1][rank]
