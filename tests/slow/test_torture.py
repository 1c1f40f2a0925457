"""Some of the torture: runs that are killed and go on see and come to the same, and nothing hangs or leaks."""

import json
import os
import subprocess
import sys

from running import ROOT

MINUTES = "2"


def test_torture():
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture", "--minutes", MINUTES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["source"] for row in rows] == ["folder", "buckets", "huggingface", "webdataset", "all"], done.stderr
    total = rows[-1]
    assert total["kills"] > 0
    assert total["resumes"] > 0
    wrong = ("digest_mismatches", "weight_mismatches", "hangs", "failures", "leaked_descriptors")
    assert {name: total[name] for name in wrong} == dict.fromkeys(wrong, 0), done.stdout
    assert done.returncode == 0
    assert total["memory_slope_kib_per_1000_steps"] is not None
